"""The wheel works where there is no clone: it brings its configs and templates along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installed_wheel_pretrains_evaluates_and_reports(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, site, work = (tmp_path / name for name in ("wheels", "site", "work"))
    work.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("unlabeled-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, unlabeled; assert unlabeled.__file__.startswith(sys.argv.pop(1)), unlabeled.__file__; "
        "from unlabeled.cli import main; sys.exit(main())"
    )
    overrides = [
        "task=rotation", "data=digits", "backbone=resnet18", "backbone.size=32",
        "backbone.kwargs={channels:[8,8,8,8],stem_width:8}", "debug=true", "out=run",
    ]  # fmt: skip
    command = [sys.executable, "-c", code, str(site), "pretrain", *overrides]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "report" / "report.html").is_file()
    assert sorted(path.name for path in work.iterdir()) == ["run"], "no folder of Hydra's or anybody's"
