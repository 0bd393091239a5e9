"""What a number was measured with: the machine and the versions of the libraries that shape it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from unlabeled._version import __version__

_LIBRARIES = ("torch", "torchvision", "timm", "lightly", "faiss-cpu", "numpy")


def hardware(device: torch.device | str) -> dict[str, str]:
    """What `device` is, in words, with the machine around it."""
    device = torch.device(device)
    facts = {"device": device.type, "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    facts["processor"] = _processor()
    facts["cores"] = str(os.cpu_count() or 1)
    facts["threads"] = str(torch.get_num_threads())
    return facts


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries under it."""
    found = {"unlabeled": __version__, "python": platform.python_version()}
    found.update({library: _version(library) for library in _LIBRARIES})
    return found


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
