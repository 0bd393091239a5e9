import errno
import os
from pathlib import Path

import pytest
import torch

from unlabeled.ssl.core.errors import CheckpointError
from unlabeled.ssl.train import checkpoint as module
from unlabeled.ssl.train.checkpoint import complete, last_checkpoint, load_checkpoint, save_checkpoint


def save(folder: Path, step: int, keep: int = 2) -> Path:
    weight = torch.full((3,), float(step))
    return save_checkpoint(
        folder,
        step,
        model={"w": weight, "tied": weight},
        optimizer={"state": {0: weight}},
        state={"step": step},
        keep=keep,
    )


def test_round_trip_and_keep_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [path.name for path in complete(tmp_path)] == ["step_00000002", "step_00000010"]
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    model, optimizer, state = load_checkpoint(newest)
    assert torch.equal(model["w"], torch.full((3,), 10.0))
    assert torch.equal(model["tied"], model["w"])
    assert torch.equal(optimizer["state"][0], model["w"])
    assert state == {"step": 10}
    assert sorted(path.name for path in newest.iterdir()) == ["model.safetensors", "optimizer.pt", "state.json"]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("victim", ["save_file", "flush"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, victim, full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left on device.*resumes from"):
        save(tmp_path, 2)
    monkeypatch.undo()
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)[2] == {"step": 1}
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_an_unreadable_checkpoint_names_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\x80noise")
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be read .*write 'step_00000001' into") as caught:
        load_checkpoint(tmp_path / "step_00000002")
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"state": os.system}, path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_last_naming_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "last").write_text("step_00000007")
    with pytest.raises(CheckpointError, match=r"names step_00000007, which is missing"):
        last_checkpoint(tmp_path)
