"""Weighted nearest neighbors: every number of the published implementation (facebookresearch/dinov2)."""

from __future__ import annotations

import numpy as np
import pytest
from eval_helpers import plain_values

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import KnnConfig, KnnEvaluator, class_scores, nearest_neighbors
from unlabeled.eval.neighbors.search import normalized


def test_neighbors_scores_predictions_and_accuracies(golden) -> None:
    pair = golden("knn")
    config = pair.config
    tensors = {name: tensor.numpy() for name, tensor in pair.tensors.items()}
    train = FeatureSplit(tensors["input/train_features"], tensors["input/train_labels"])
    test = FeatureSplit(tensors["input/test_features"], tensors["input/test_labels"])
    classes, ks = config["classes"], sorted(config["k"])

    np.testing.assert_allclose(normalized(test.features), tensors["expect/test_features_normalised"], atol=1e-6)
    indices, similarities = nearest_neighbors(train.features, test.features, max(ks))
    np.testing.assert_allclose(similarities, tensors["expect/neighbour_similarity"], atol=1e-6)
    apart = np.diff(similarities, axis=1) < -2e-6  # neighbors closer than rounding may swap
    clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True) & np.pad(apart, ((0, 0), (0, 1)))
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(indices[clear], tensors["expect/neighbour_index"][clear])
    for k, scores in class_scores(train.labels[indices], similarities, ks, config["temperature"], classes):
        np.testing.assert_allclose(scores, tensors[f"expect/probabilities_k{k}"], atol=1e-5)
        np.testing.assert_array_equal(scores.argmax(1), tensors[f"expect/prediction_k{k}"])

    evaluator = KnnEvaluator(KnnConfig(k=tuple(ks), temperature=config["temperature"]))
    found = plain_values(
        evaluator.run(EncodedDataset(FeatureSet(train, test, tuple(str(label) for label in range(classes)))))
    )
    headline = evaluator.headline_k(len(train))
    np.testing.assert_array_equal(found["predictions"], tensors[f"expect/prediction_k{headline}"])
    np.testing.assert_array_equal(found["neighbors"], indices[:, :headline])
    for k in ks:
        assert found[f"k{k}"] == pytest.approx(float(tensors[f"expect/top1_k{k}"]), abs=1e-6)
        if classes > 5:
            assert found[f"k{k}_top5"] == pytest.approx(float(tensors[f"expect/top5_k{k}"]), abs=1e-6)
