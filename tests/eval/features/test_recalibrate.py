"""Re-estimated batch-norm statistics: their values, what does not change, and when it is done."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_helpers import MemorySource, tiny_vit
from torch import Tensor, nn

from unlabeled.eval.evaluators.knn import KnnConfig
from unlabeled.eval.evaluators.linear import LinearConfig
from unlabeled.eval.features.cache import weights_identity
from unlabeled.eval.features.recalibrate import batch_norms, recalibrated, recalibration_images
from unlabeled.eval.results import Results
from unlabeled.eval.runner import evaluate_backbone, online_knn
from unlabeled.pretext.predictive.rotation import Rotation
from unlabeled.report.page import write_report
from unlabeled.report.summary import RunSummary
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.schema import EvaluateConfig, PretrainConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.task import PretextTask
from unlabeled.workflows.evaluate import Target, saw_masked_images_only

CONFIG = EvaluateConfig(
    knn=KnnConfig(k=(5, 20)), linear=LinearConfig(epochs=2, lr=(0.1,), weight_decay=(0.0,)), recalibrate=True
)


class Probe(nn.Module):
    """Two batch norms, the second without running statistics, and a dropout, in the surface of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.9)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.plain(self.norm(self.drop(self.conv(x))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features.mean((2, 3))


def probe() -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(Probe(), size=(32, 32))
    with torch.no_grad():
        backbone.model.norm.running_mean.fill_(7)
        backbone.model.norm.weight.uniform_()
    return backbone


def resnet(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return create_backbone("resnet10t", size=(32, 32), drop_path_rate=0.5)


def results_of(backbone: Backbone, config: EvaluateConfig, **options) -> Results:
    train, test = MemorySource(40), MemorySource(12, seed=1, split="test")
    found = evaluate_backbone(backbone, train, test, config, **options)
    assert found is not None
    return found


@pytest.mark.parametrize("batch_size", [64, 7])
def test_statistics_are_those_of_all_positions_of_all_images(batch_size: int) -> None:
    backbone, source = probe(), MemorySource(30)
    found = recalibrated(backbone, source, count=30, batch_size=batch_size).model.norm
    with torch.no_grad():
        images = torch.stack([source.read(index) for index in range(30)])
        values = backbone.model.conv(backbone.normalize(images)).transpose(0, 1).flatten(1).double()  # without dropout
    torch.testing.assert_close(found.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.running_var.double(), values.var(1, correction=1), rtol=1e-5, atol=1e-6)


def test_one_batch_gives_what_torch_gives_with_a_cumulative_average() -> None:
    backbone, source = resnet(), MemorySource(24)
    found = recalibrated(backbone, source, count=24, batch_size=24)
    reference = resnet().eval()
    for norm in batch_norms(reference):
        norm.momentum, norm.training = None, True
        norm.reset_running_stats()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        reference.pooled(reference.normalize(torch.stack([source.read(index) for index in order])))
    assert len(batch_norms(found)) == len(batch_norms(reference)) > 5
    for own, theirs in zip(batch_norms(found), batch_norms(reference), strict=True):
        torch.testing.assert_close(own.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)


def test_everything_else_is_left_as_it_was() -> None:
    backbone = probe().train()
    backbone.model.drop.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    found = recalibrated(backbone, MemorySource(20), count=10, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training
    assert not backbone.model.drop.training
    assert not any(part.training for part in found.modules())
    assert not any(norm._forward_pre_hooks for norm in found.modules())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
        changed = not torch.equal(found.state_dict()[name], before[name])
        assert changed == name.endswith(("running_mean", "running_var")), name


def test_the_same_images_are_taken_each_time_and_in_no_order_of_classes() -> None:
    class Recorder(MemorySource):
        def __init__(self) -> None:
            super().__init__(60)
            self.order: list[int] = []

        def read(self, index: int) -> Tensor:
            self.order.append(index)
            return super().read(index)

    sources = [Recorder(), Recorder()]
    one, two = (recalibrated(resnet(), source, count=16, batch_size=5) for source in sources)
    assert sources[0].order == sources[1].order
    assert len(set(sources[0].order)) == 16
    assert sources[0].order != sorted(sources[0].order)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_undecodable_images_are_left_out_and_a_lone_one_in_its_batch_too() -> None:
    whole = recalibrated(probe(), MemorySource(6, corrupt=(1, 2)), count=6, batch_size=6)
    source = MemorySource(6)
    images = torch.stack([source.read(index) for index in (0, 3, 4, 5)])
    with torch.no_grad():
        values = whole.model.conv(whole.normalize(images))
    torch.testing.assert_close(whole.model.norm.running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    # maps of one position: batches of two, and one image is left over
    recalibrated(resnet(), MemorySource(5), count=5, batch_size=1)
    with pytest.raises(DataError, match=r"recalibrate: fewer than two of 3 training images can be decoded"):
        recalibrated(resnet(), MemorySource(3, corrupt=(0, 1)), count=3)


@pytest.mark.parametrize(
    ("setting", "masked", "images"),
    [("auto", False, 0), ("auto", True, 9), (True, False, 9), (False, True, 0)],
)
def test_when_it_is_done(setting: bool | str, masked: bool, images: int, caplog: pytest.LogCaptureFixture) -> None:
    config = EvaluateConfig.model_validate({"recalibrate": setting, "recalibrate_images": 9})
    assert recalibration_images(config, resnet(), masked) == images
    with caplog.at_level(logging.WARNING, logger="unlabeled"):
        assert recalibration_images(config, tiny_vit(), masked) == 0
    assert ("vit_tiny_patch16_224 has no batch norms" in caplog.text) == (setting is True)


def test_a_network_without_batch_norms_is_measured_as_it_is(tmp_path: Path) -> None:
    plain = CONFIG.model_copy(update={"recalibrate": False})
    on, off = (results_of(tiny_vit(seed=1), config, work=tmp_path) for config in (CONFIG, plain))
    assert on.recalibrated == off.recalibrated == 0
    assert len(list((tmp_path / "features").iterdir())) == 6, "the cached features of one are those of the other"


def test_backbone_and_random_weights_are_treated_alike_and_cached_apart(tmp_path: Path) -> None:
    shifted = resnet(seed=1)
    with torch.no_grad():
        for norm in batch_norms(shifted):
            norm.running_var.fill_(100.0)
    before = weights_identity(shifted)
    off = results_of(shifted, CONFIG.model_copy(update={"recalibrate": "auto"}), work=tmp_path)
    on = results_of(shifted, CONFIG.model_copy(update={"recalibrate": "auto"}), work=tmp_path, masked_statistics=True)
    assert (off.recalibrated, on.recalibrated) == (0, 40)
    assert weights_identity(shifted) == before, "the backbone itself keeps its statistics"
    twin = recalibrated(shifted, MemorySource(40), count=40)
    assert weights_identity(twin) != before
    assert len(list((tmp_path / "features").iterdir())) == 2 * 2 + 2 + 2 * 2, "pixels are shared, networks are not"
    again = results_of(twin, CONFIG.model_copy(update={"recalibrate": False, "baselines": False}))
    assert on.encoders["backbone"].metrics == again.encoders["backbone"].metrics


def test_knn_during_the_run_is_that_of_the_end() -> None:
    backbone = resnet(seed=2).train()
    train, test = MemorySource(40), MemorySource(12, seed=1, split="test")
    config = CONFIG.model_copy(update={"recalibrate": "auto", "baselines": False})
    found = online_knn(backbone, train, test, config, "cpu", masked_statistics=True)
    results = results_of(backbone, config, masked_statistics=True)
    assert found == {key: value for key, value in results.encoders["backbone"].metrics.items() if key[:3] == "knn"}
    assert backbone.training


def test_the_report_says_so(tmp_path: Path) -> None:
    summary = RunSummary("title", "resnet10t", "shapes", 1, "cpu", 0)
    for results, said in ((results_of(resnet(), CONFIG), True), (results_of(tiny_vit(), CONFIG), False)):
        write_report(tmp_path, summary, results, None, None)
        document = json.loads((tmp_path / "report" / "report.json").read_text())
        assert document["results"]["recalibrated"] == (40 if said else 0)
        assert any("recomputed on 40 unmasked training images" in note for note in document["notes"]) == said
        for name in ("report.md", "report.html"):
            text = (tmp_path / "report" / name).read_text()
            assert ("recomputed on 40 unmasked training images" in text) == said, name


def test_the_command_asks_the_runs_task(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PretextTask.masked_statistics is False
    config = PretrainConfig.model_validate({"task": {"name": "rotation"}})
    monkeypatch.setattr(Rotation, "masked_statistics", True)
    assert saw_masked_images_only(Target(resnet(), "run", config))
    assert not saw_masked_images_only(Target(resnet(), "a file of weights"))
    unknown = PretrainConfig.model_validate({"task": {"name": "rotatoin"}})
    with pytest.raises(
        ConfigError, match=r"recalibrate: auto needs the run's task .*'rotatoin'.*set it to true or false"
    ):
        saw_masked_images_only(Target(resnet(), "run", unknown))
    assert not saw_masked_images_only(Target(tiny_vit(), "run", unknown))


def _in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(recalibrated(resnet(), MemorySource(9), count=9, batch_size=4).state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


def test_two_processes_end_with_the_numbers_of_one(tmp_path: Path) -> None:
    mp.start_processes(_in_process, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = recalibrated(resnet(), MemorySource(9), count=9, batch_size=4).state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=f"{rank} {name}")
