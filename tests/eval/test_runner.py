"""A complete evaluation on images whose classes are colors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_helpers import MemorySource, tiny_vit

from unlabeled.eval.base import FeatureSplit
from unlabeled.eval.dense.maps import CAPTIONS
from unlabeled.eval.encoded_dataset import random_twin
from unlabeled.eval.evaluators.knn import KnnConfig
from unlabeled.eval.evaluators.linear import LinearConfig
from unlabeled.eval.runner import evaluate_backbone, online_knn
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import DataError

CONFIG = EvaluateConfig(knn=KnnConfig(k=(5, 20)), linear=LinearConfig(epochs=5, lr=(0.01, 0.1), weight_decay=(0.0,)))


def sources(**options) -> tuple[MemorySource, MemorySource]:
    return MemorySource(48, **options), MemorySource(21, seed=1, split="test", **options)


def test_backbone_pixels_and_random_weights_are_measured_alike(tmp_path: Path) -> None:
    train, test = sources(corrupt=(2, 4))
    results = evaluate_backbone(tiny_vit(seed=1), train, test, CONFIG, work=tmp_path, seed=3)
    assert results is not None
    assert list(results.encoders) == ["backbone", "pixels", "random"]
    assert results.headline == ("knn/k20", "linear/top1")
    for encoder in results.encoders.values():
        assert set(encoder.metrics) == {
            "knn/k5", "knn/k20", "linear/top1", "linear/holdout_top1",
            "linear/lr", "linear/weight_decay", "linear/diverged",
        }  # fmt: skip
        assert encoder.arrays["linear/confusion"].sum() == results.test_images == 19
        assert set(encoder.seconds) == {"features", "knn", "linear"}
    assert [encoder.dimension for encoder in results.encoders.values()] == [32, 3072, 32]
    assert results.encoders["pixels"].metrics["knn/k5"] == 1.0, "the classes are colors"
    assert results.skipped == {"train": ("train-2.png", "train-4.png"), "test": ("test-2.png", "test-4.png")}
    assert results.train_images == 46
    assert results.majority == pytest.approx(7 / 19)
    assert results.seconds > sum(results.encoders["backbone"].seconds.values())
    assert len(list((tmp_path / "features").iterdir())) == 6


def test_the_gallery_shows_the_true_neighbors_past_a_corrupt_image() -> None:
    train, test = sources(corrupt=(0, 1))
    results = evaluate_backbone(tiny_vit(), train, test, CONFIG)
    assert results is not None
    assert len(results.gallery) == 8
    for row in results.gallery:
        number = int(row.query.name.removeprefix("test-").removesuffix(".png"))
        assert torch.equal(row.query.image, test._images[number])
        assert row.query.label == number % 3
        assert len(row.neighbors) == 5
        similarities = [near.similarity for near in row.neighbors]
        assert similarities == sorted(similarities, reverse=True)
        for near in row.neighbors:
            index = int(near.name.removeprefix("train-").removesuffix(".png"))
            assert torch.equal(near.image, train._images[index])
            assert near.label == index % 3


def test_the_same_seed_gives_the_same_evidence_and_another_another_twin() -> None:
    one, two = (evaluate_backbone(tiny_vit(), *sources(), CONFIG, seed=3) for _ in range(2))
    assert one is not None
    assert two is not None
    assert {name: encoder.metrics for name, encoder in one.encoders.items()} == {
        name: encoder.metrics for name, encoder in two.encoders.items()
    }
    state = torch.get_rng_state()
    backbone = create_backbone("resnet10t", size=(32, 64))
    torch.set_rng_state(state)
    twins = [random_twin(backbone, seed).model.state_dict()["conv1.0.weight"] for seed in (3, 3, 4)]
    assert torch.equal(twins[0], twins[1])
    assert not torch.equal(twins[0], twins[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert random_twin(backbone, 0).input_size == (32, 64)


def test_a_module_without_a_timm_name_is_measured_without_a_random_twin() -> None:
    backbone = Backbone(tiny_vit().model, size=(32, 32))
    results = evaluate_backbone(backbone, *sources(), CONFIG)
    assert results is not None
    assert list(results.encoders) == ["backbone", "pixels"]
    assert "no baseline with random weights" in results.encoders["backbone"].notes[0]


def test_baselines_can_be_left_out_and_images_limited() -> None:
    config = CONFIG.model_copy(update={"baselines": False, "limit": 12})
    train, test = sources()
    results = evaluate_backbone(tiny_vit(), train, test, config)
    assert results is not None
    assert list(results.encoders) == ["backbone"]
    assert (results.train_images, results.test_images) == (12, 12)
    assert train.reads <= 12 + 40, "only the chosen images and the gallery are read"


@pytest.mark.parametrize("chosen", ["pixels", "random"])
def test_one_baseline_alone(chosen: Literal["pixels", "random"]) -> None:
    results = evaluate_backbone(tiny_vit(), *sources(), CONFIG.model_copy(update={"baselines": (chosen,)}))
    assert results is not None
    assert list(results.encoders) == ["backbone", chosen]


def test_test_classes_in_another_order_are_renumbered() -> None:
    train, test = sources()
    test.classes = ("blue", "red")
    test._labels = torch.tensor([{0: 1, 1: 0, 2: 0}[label] for label in test._labels.tolist()])
    config = CONFIG.model_copy(update={"baselines": False})
    results = evaluate_backbone(tiny_vit(), train, test, config)
    assert results is not None
    np.testing.assert_array_equal(results.test_labels, [0, 2, 2] * 7)
    test.classes = ("blue", "mauve")
    with pytest.raises(DataError, match="test class 'mauve' is not among the 3 training classes"):
        evaluate_backbone(tiny_vit(), train, test, config)


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match=r"the data has no labels.*data\.labels=true"):
        evaluate_backbone(tiny_vit(), *sources(classes=None), CONFIG)


def test_a_diverged_backbone_raises_and_a_broken_baseline_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tiny_vit()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="48 of 48 training features are NaN"):
        evaluate_backbone(broken, *sources(), CONFIG)
    monkeypatch.setattr(
        "unlabeled.eval.runner.raw_pixels",
        lambda source, **_: FeatureSplit(np.full((len(source), 2), np.nan, np.float32), source.labels().numpy()),
    )
    results = evaluate_backbone(tiny_vit(), *sources(), CONFIG)
    assert results is not None
    assert results.encoders["pixels"].metrics == {}
    assert "NaN or infinite" in results.encoders["pixels"].notes[0]


def test_points_and_maps_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def map_images(backbone: Backbone, images: torch.Tensor, *, device: torch.device) -> dict[str, torch.Tensor]:
        seen.append(images)
        return {"attention": images[0]}

    monkeypatch.setattr("unlabeled.eval.dense.feature_maps.map_images", map_images)
    train, test = sources(corrupt=(0, 1))
    results = evaluate_backbone(tiny_vit(), train, test, CONFIG.model_copy(update={"maps": 4}))
    assert results is not None
    assert seen[0].shape == (4, 3, 32, 32)
    assert all(any(torch.equal(image, one) for one in test._images[2:]) for image in seen[0])
    assert torch.equal(results.maps[CAPTIONS["attention"]], seen[0][0])
    assert results.embedding is not None
    assert results.embedding.points.shape == (19, 2)
    off = evaluate_backbone(tiny_vit(), *sources(), CONFIG.model_copy(update={"maps": 0, "embedding": None}))
    assert off is not None
    assert (off.embedding, off.maps, len(seen)) == (None, {}, 1)


def test_online_knn_gives_the_suites_number_and_leaves_the_network_training() -> None:
    backbone = tiny_vit().train()
    state = torch.get_rng_state()
    found = online_knn(backbone, *sources(), CONFIG, "cpu")
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    results = evaluate_backbone(backbone, *sources(), CONFIG.model_copy(update={"baselines": False}))
    assert results is not None
    assert found == {key: value for key, value in results.encoders["backbone"].metrics.items() if key[:3] == "knn"}


def _evaluate_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = evaluate_backbone(tiny_vit(), *sources(), CONFIG, work=Path(folder))
    online = online_knn(tiny_vit(), *sources(), CONFIG, "cpu")
    if rank == 0:
        assert results is not None
        metrics = {f"{name}/{key}": v for name, e in results.encoders.items() for key, v in e.metrics.items()}
        np.savez(f"{folder}/found.npz", online=online["knn/k20"], **metrics)
    elif results is not None or online:
        raise AssertionError("only the first process evaluates")
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


def test_two_processes_give_the_evidence_of_one(tmp_path: Path) -> None:
    mp.start_processes(_evaluate_in_process, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    found = np.load(tmp_path / "found.npz")
    results = evaluate_backbone(tiny_vit(), *sources(), CONFIG)
    assert results is not None
    for name, encoder in results.encoders.items():
        for key, value in encoder.metrics.items():
            assert found[f"{name}/{key}"] == pytest.approx(value), (name, key)
    assert found["online"] == found["backbone/knn/k20"]
