"""Every kind of bad input gives one clear line and exit code 2, and loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unlabeled.cli import main
from unlabeled.eval.registry import evaluator_config, evaluator_names, settle
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.train import checkpoint
from unlabeled.ssl.train import loop as engine
from unlabeled.workflows.pretrain import pretrain_config

VIT = [
    "backbone=vit_tiny_patch16_224",
    "backbone.size=32",
    "backbone.kwargs={patch_size:8,embed_dim:16,depth:1,num_heads:2}",
]
TINY = [
    *VIT, "task=mae", "task.decoder={dim:16,depth:1,heads:2}", "epochs=2", "batch_size=8",
    "schedule.warmup_epochs=0", "engine.workers=0", "engine.device=cpu", "engine.checkpoint_steps=2",
    "log.tensorboard=false", "log.every=1", "evaluate.final=false",
]  # fmt: skip


def pretrain(out: Path, *overrides: str) -> int:
    data = [] if any(override.startswith("data=") for override in overrides) else ["data=shapes", "data.count=32"]
    return main(["pretrain", *TINY, *data, f"out={out}", *overrides])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, without the log."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unlabeled")]
    assert len(lines) == 1, lines
    return lines[0]


def write_images(folder: Path, count: int, corrupt: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index:03d}.png"
        if index < corrupt:
            path.write_bytes(b"not an image")
        else:
            Image.effect_noise((40, 40), 60).convert("RGB").save(path)
    return folder


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=mea"], "task: 'mea' is not a pretext task; did you mean 'mae'?"),
        (["task.mask_ration=0.5"], "task.mask_ration: there is no such setting in task; did you mean 'mask_ratio'"),
        (["task.mask_ratio=0.99"], "task.mask_ratio: 0.99 leaves 0 of 4x4 cells visible"),
        (["task.decoder.heads=3"], "dim 16 is no multiple of heads 3"),
        (["backbone=resnet81"], "backbone.name: 'resnet81' is not a timm model; did you mean"),
        (["backbone=resnet18", "~backbone.kwargs"], "backbone: resnet18 cannot do MAE: it lacks token_dropp"),
        (["backbone.size=36"], "36x36 is not a multiple of vit_tiny_patch16_224's patch, 8; give 32 or 40"),
        (["backbone.kwargs.dept=1"], "backbone.kwargs.dept: vit_tiny_patch16_224 takes no such argument; remove it"),
        (["backbone.checkpoint=nowhere.safetensors"], "nowhere.safetensors: there is no such file"),
        (["data=foldr"], "data: 'foldr' is not a data source; did you mean 'folder'?"),
        (["data=folder"], "data.path: not given"),
        (["data=folder", "data.count=32"], "data.count: 32 has no effect with data=folder, it is a setting of sha"),
        (["data.labels=true"], "data.labels: True has no effect with data=shapes, it is a setting of fold"),
        (["evaluate.data=folder", "evaluate.final=true"], "data.path: not given"),
        (["evaluate.data=foldr"], "evaluate.data: 'foldr' is not a data source; did you mean 'folder'?"),
        (["data=folder", "data.path=nowhere"], "nowhere"),
        (["data=parquet", "data.path=nowhere.parquet"], "nowhere.parquet"),
        (["recipe=cifra10"], "recipe: 'cifra10' does not exist"),
        (["optim.name=adamm"], "optim.name: 'adamm' is not an optimizer; did you mean"),
        (["optim.kwargs={wrong:1}"], "optim: adamw does not take these settings"),
        (["optm.lr=1"], "optm: there is no such setting; did you mean 'optim'?"),
        (["optim.lr=fast"], "optim.lr: 'fast' is not possible; give a valid number"),
        (["epochs=0"], "epochs: 0 is not possible; give greater than 0"),
        (["batch_size=64"], "batch_size: 64 is larger than the data (32 images); give batch_size=32 or less"),
        (["engine.accumulation=3"], "batch_size: 8 cannot be split over 1 processes x 3 micro-steps"),
        (["evaluate.final=true", "data=digits", "evaluate.evaluators=[knn,segmentation]"],
         "evaluate.data: the data has no masks; give data=voc or data=shapes"),
        (["evaluate.evaluators=[knn,liner]"], "evaluate.evaluators: 'liner' is not an evaluator; did you mean 'linear"),
        (["evaluate.knn.kk=3"], "evaluate.knn.kk: there is no such setting in evaluate.knn; did you mean 'k'?"),
        (["evaluate.knn.k=[0]"], "evaluate.knn.k: [0] is not possible; give integers of at least 1"),
        (["evaluate.evry=3"], "evaluate.evry: there is no such setting in evaluate; did you mean 'every'?"),
        (["evaluate.lineer.epochs=3"], "evaluate.lineer: there is no such setting in evaluate; did you mean 'linear'"),
        (["evaluate.few_shot.ways=3"], "evaluate.few_shot: ways=3 has no effect, few_shot is not among the evaluators; "
         "add it to evaluate.evaluators, or remove evaluate.few_shot"),
        (["evaluate={cluster:{restarts:3}}"], "evaluate.cluster: restarts=3 has no effect, cluster is not among"),
        (["evaluate.embedding=tnse"], "evaluate.embedding: 'tnse' is not an embedding method; did you mean 'tsne'?"),
        (["evaluate.data=foldr", "evaluate.final=true"], "data: 'foldr' is not a data source; did you mean 'folder'?"),
        (["evaluate.data={name:folder,path:nowhere}", "evaluate.final=true"], "nowhere"),
        (["reference=nowhere.pth"], "nowhere.pth: there is no such file"),
        (["epochs"], "'epochs' is not a setting; write key=value"),
        (["/"], "'/' is not a setting; for a folder of images write data=folder data.path=/"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert pretrain(tmp_path / "run", *overrides) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is known to fit"


def test_what_an_evaluation_needs_is_refused_before_a_sweep_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "evaluate.evaluators=[knn],[knn,liner]", f"out={tmp_path / 'sweep'}"]
    assert main(["pretrain", "--multirun", *overrides]) == 2
    assert "'liner' is not an evaluator; did you mean 'linear'?" in error_line(capsys)
    assert not (tmp_path / "sweep").exists()


def test_settings_of_what_runs_are_used_and_written_out_in_full(tmp_path: Path) -> None:
    few = ["evaluate.evaluators=[few_shot,cluster]", "evaluate.few_shot.ways=3"]
    config = pretrain_config([*TINY, *few])
    stored = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))["evaluate"]
    assert (stored["few_shot"]["ways"], stored["few_shot"]["queries"]) == (3, 15)
    assert stored["cluster"]["restarts"] == 5
    assert not {"knn", "linear", "spectrum"} & stored.keys()
    during = pretrain_config([*TINY, *few, "evaluate.every=1", "evaluate.knn.k=[5]"])
    assert evaluator_config(during.evaluate, "knn").model_dump()["k"] == (5,)
    assert pretrain_config([*TINY, "evaluate.evaluators=all", "evaluate.few_shot.ways=3"]).evaluate.few_shot.ways == 3


def test_sections_that_overrides_did_not_set_need_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = EvaluateConfig.model_validate({"few_shot": {"ways": 3}})
    assert evaluator_config(settle(evaluate, given=()), "few_shot").model_dump()["ways"] == 3
    assert pretrain(tmp_path / "run") == 0
    record = tmp_path / "run" / "config.yaml"
    before = yaml.safe_load(record.read_text())  # older versions wrote sections for all evaluators
    before["evaluate"] |= {name: evaluator_config(evaluate, name).model_dump(mode="json") for name in evaluator_names()}
    record.write_text(yaml.safe_dump(before))
    assert pretrain(tmp_path / "run") == 0
    target = ["evaluate", str(tmp_path / "run"), "evaluate.baselines=false", "device=cpu", "workers=0"]
    assert main([*target, "evaluate.evaluators=[knn]"]) == 0
    capsys.readouterr()
    assert main([*target, "evaluate.cluster.restarts=2"]) == 2
    assert "evaluate.cluster: restarts=2 has no effect" in error_line(capsys)


def test_a_file_for_a_folder_and_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert pretrain(tmp_path / "run", "data=folder", f"data.path={tmp_path / 'empty'}") == 2
    assert "empty" in error_line(capsys)
    assert pretrain(tmp_path / "run", "data=folder", f"data.path={tmp_path / 'empty' / 'notes.txt'}") == 2
    assert "notes.txt is a file" in error_line(capsys)


def test_some_corrupt_images_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 40, corrupt=2)
    assert pretrain(tmp_path / "run", "data=folder", f"data.path={folder}", "data.max_bad_fraction=0.1") == 0
    listed = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert len(listed) == 2
    assert "000.png" in "".join(listed)


@pytest.mark.parametrize(("corrupt", "message"), [(4, "bad_images.jsonl"), (40, "cannot be decoded")])
def test_too_many_corrupt_images_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], corrupt: int, message: str
) -> None:
    folder = write_images(tmp_path / "images", 40, corrupt)
    assert pretrain(tmp_path / "run", "data=folder", f"data.path={folder}") == 2
    assert message in error_line(capsys)


def test_another_runs_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run") == 0
    before = files_of(tmp_path / "run")
    capsys.readouterr()
    assert pretrain(tmp_path / "run", "optim.lr=1e-2") == 2
    assert "holds another run (optim.lr: 0.00015 there, 0.01 here)" in error_line(capsys)
    assert pretrain(tmp_path / "run", "resume=never") == 2
    assert "already holds step_00000008" in error_line(capsys)
    assert files_of(tmp_path / "run") == before


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run") == 0
    record = tmp_path / "run" / "config.yaml"
    record.write_text("".join(line for line in record.open() if "patch_embed_lr" not in line))
    capsys.readouterr()
    assert pretrain(tmp_path / "run", "optim.patch_embed_lr=0.5") == 2
    assert "holds another run (optim.patch_embed_lr: 1 there, 0.5 here)" in error_line(capsys)
    assert pretrain(tmp_path / "run") == 0


def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, calls = checkpoint.save_file, []

    def save_until_full(*arguments: object) -> None:
        calls.append(1)
        full() if len(calls) > 1 else save(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", save_until_full)
    assert pretrain(tmp_path / "run") == 2
    assert "step 4 could not be written" in error_line(capsys)
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step_00000002"
    monkeypatch.undo()
    assert pretrain(tmp_path / "run") == 0
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step_00000008"


def test_an_unreadable_checkpoint_is_named_with_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run") == 0
    (tmp_path / "run" / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"cut short")
    capsys.readouterr()
    assert pretrain(tmp_path / "run") == 2
    assert "step_00000008 cannot be read" in (line := error_line(capsys))
    assert "write 'step_00000006' into" in line


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient_norm = engine.gradient_norm

    def spoil(run: engine.Training) -> object:
        norm = gradient_norm(run)
        return norm * float("nan") if run.saver.newest() else norm

    monkeypatch.setattr(engine, "gradient_norm", spoil)
    assert pretrain(tmp_path / "run") == 2
    line = error_line(capsys)
    assert "not finite at step 2" in line
    assert "step_00000002" in line
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step_00000002"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["no_such_run"], "'no_such_run' is not a run folder, weights file or timm model"),
        (["resnet18", "pretrained=false"], "data: not given"),
        (["resnet18", "pretrained=false", "data=shapes", "dat.count=8"], "dat: there is no such setting"),
        (["gone.safetensors"], "'gone.safetensors' does not exist"),
        (["gone", "evaluate.evaluators=[liner]"], "'liner' is not an evaluator; did you mean 'linear'?"),
        (["gone", "evaluate.few_shot.ways=3"], "evaluate.few_shot: ways=3 has no effect"),
        (["gone", "evaluate.embedding=tnse"], "'tnse' is not an embedding method; did you mean 'tsne'?"),
    ],
)
def test_evaluate(capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert main(["evaluate", *overrides]) == 2
    assert message in error_line(capsys)


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "data=folder", f"data.path={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in error_line(capsys)
    folder = write_images(tmp_path / "images", 10, corrupt=1)
    assert main(["doctor", "data=folder", f"data.path={folder}", "workers=0"]) == 0
    assert "000.png" in capsys.readouterr().out
    shutil.rmtree(folder)
