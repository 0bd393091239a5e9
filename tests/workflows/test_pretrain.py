"""What the evaluation at the end of a run knows of its task."""

from __future__ import annotations

import pytest

from unlabeled.ssl.config.schema import PretrainConfig
from unlabeled.workflows.pretrain import saw_masked_images_only


@pytest.mark.parametrize(
    ("task", "masked"),
    [
        ({"name": "rotation"}, False),
        ({"name": "spark"}, True),
        ({"name": "multi", "tasks": [{"name": "rotation"}, {"name": "spark"}]}, True),
        ({"name": "multi", "tasks": [{"name": "rotation"}, {"name": "simclr"}]}, False),
    ],
)
def test_a_mixture_is_asked_for_the_statistics_of_its_tasks(task: dict, masked: bool) -> None:
    assert saw_masked_images_only(PretrainConfig.model_validate({"task": task})) is masked
