"""The package must never shadow the standard library's `ssl`, and nothing runnable lies directly in it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ssl_is_the_standard_library_from_the_repository_root() -> None:
    code = "import ssl, asyncio, sysconfig; assert ssl.__file__.startswith(sysconfig.get_path('stdlib')), ssl.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_nothing_runnable_lies_directly_in_the_package() -> None:
    assert sorted(path.name for path in (ROOT / "unlabeled").glob("*.py")) == [
        "__init__.py",
        "_moved.py",
        "_version.py",
        "api.py",
    ]


def test_import_does_no_work() -> None:
    code = "import sys, unlabeled; assert 'torch' not in sys.modules and 'timm' not in sys.modules; dir(unlabeled)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
