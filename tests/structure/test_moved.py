"""Import paths of version 0.1.0 lead to where things are now, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from unlabeled import _moved

PACKAGE = Path(_moved.__file__).parent
OLD_NAMES = [
    ("unlabeled.ssl.networks", "nin_cifar", "unlabeled.ssl.backbones.networks"),
    ("unlabeled.ssl.networks.convmae", "ConvViT", "unlabeled.ssl.backbones.networks.convmae"),
    ("unlabeled.ssl.ranks", "gather_across_ranks", "unlabeled.ssl.core.distributed"),
    ("unlabeled.eval.subject", "EncodedDataset", "unlabeled.eval.encoded_dataset"),
    ("unlabeled.ssl.probe", "modes_kept", "unlabeled.ssl.backbones.shapes"),
    ("unlabeled.pretext.base", "PretextTask", "unlabeled.ssl.task"),
    ("unlabeled.pretext.base", "Views", "unlabeled.ssl.data.views"),
    ("unlabeled.ssl.compose", "pretrain_config", "unlabeled.workflows.pretrain"),
    ("unlabeled.pretext.mae", "MAE", "unlabeled.pretext.masked_image.mae"),
    ("unlabeled.eval.report.document", "read_report", "unlabeled.report.document"),
    ("unlabeled.ssl.cli", "main", "unlabeled.cli"),
]


@pytest.mark.parametrize(("old", "name", "new"), OLD_NAMES)
def test_an_old_name_is_the_new_thing_and_says_so(old: str, name: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now unlabeled\."):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
    assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_old_name_leads_somewhere_and_is_gone_itself() -> None:
    for old, targets in _moved.MOVED.items():
        assert not (PACKAGE / old.replace(".", "/")).exists(), old  # or the finder would never be asked
        assert not (PACKAGE / f"{old.replace('.', '/')}.py").exists(), old
        for target in targets.split():
            importlib.import_module(f"unlabeled.{target}")


def test_the_warning_names_the_line_of_the_import() -> None:
    code = "import unlabeled\nfrom unlabeled.ssl.errors import ConfigError\n"
    command = [sys.executable, "-W", "default::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "<string>:2: DeprecationWarning: unlabeled.ssl.errors is now unlabeled.ssl.core.errors" in done.stderr


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"unlabeled.ssl.nothing"):
        importlib.import_module("unlabeled.ssl.nothing")
