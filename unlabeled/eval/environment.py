"""The machine and the library versions that an evaluation ran with, for the report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from unlabeled._version import __version__

_LIBRARIES = ("torch", "torchvision", "timm", "lightly", "faiss-cpu", "numpy")


def hardware(device: torch.device | str) -> dict[str, str]:
    """Describes `device` and its machine: system, processor, cores, threads, and the accelerator if there is one."""
    device = torch.device(device)
    facts = {"device": device.type, "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    facts["processor"] = _processor()
    facts["cores"] = str(os.cpu_count() or 1)
    facts["threads"] = str(torch.get_num_threads())
    return facts


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that influence results."""
    found = {"unlabeled": __version__, "python": platform.python_version()}
    found.update({library: _version(library) for library in _LIBRARIES})
    return found


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform.processor() is empty or only the architecture
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
