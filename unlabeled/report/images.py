"""Images of a report: embedded in its page, and stored in the run folder so that a later report can show them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlabeled.eval.gallery import shrunk
from unlabeled.ssl.core.errors import DataError

FOLDER = "pictures"
"""Subfolder of the run folder with the task's images as PNG files."""

PIXELATED = 96
"""Images up to this height are shown enlarged with sharp pixels, and stored losslessly."""
_COLORS = 256
"""Up to this many colors an image is a drawing, which PNG compresses well; a photograph has more."""
_LONGEST = (1600, 1100, 750, 500, 320)
"""Longer side in pixels to try: the first at which all images of a page fit into `_BUDGET`."""
_BUDGET = 1_800_000
"""Characters of all encoded images of a page, without its gallery: small enough for a phone."""


def shown_images(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[dict[str, Any]]]:
    """Prepares images for the templates, shrunk together to fit the page's budget.

    `groups` maps group → name → uint8 (3, H, W). Each returned entry has ``name``, ``uri``, ``css``, ``width`` (CSS
    pixels) and ``wide`` (needs a row of its own).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for longest in _LONGEST:
        found = {
            group: [_shown(name, shrunk(image, longest)) for name, image in images.items()]
            for group, images in groups.items()
        }
        if sum(len(entry["uri"]) for entries in found.values() for entry in entries) <= _BUDGET:
            break  # if even the smallest does not fit, it is used anyway
    return found


def _shown(name: str, image: Tensor) -> dict[str, Any]:
    height, width = image.shape[-2:]
    # small images are enlarged by a whole factor, so that all their pixels get the same size
    enlarged = width * max(1, round(2 * PIXELATED / height)) if height <= PIXELATED else width
    named = name.replace("_", " ")
    return {"name": named, "uri": data_uri(image), "css": css_class(image), "width": enlarged, "wide": enlarged > 480}


def css_class(image: Tensor) -> str:
    """The CSS class for an image of this size: ``small`` gets sharp pixels."""
    return "small" if image.shape[-2] <= PIXELATED else ""


def data_uri(image: Tensor) -> str:
    """uint8 (3, H, W) → ``data:image/...;base64,...``: PNG for small images and few colors, else JPEG."""
    pillow = _pillow(image)
    # getcolors returns None for more than _COLORS colors
    small = pillow.height <= PIXELATED and pillow.width <= 8 * PIXELATED
    kind = "PNG" if small or pillow.getcolors(_COLORS) else "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(_encoded(pillow, kind)).decode()}"


def save_images(folder: Path, images: Mapping[str, Tensor]) -> None:
    """Writes each image, uint8 (3, H, W), to ``folder/pictures/NAME.png`` and deletes older ones."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    for name, image in images.items():
        # names may come from plugins and contain separators such as "/"
        safe = re.sub(r"[^\w.-]+", "_", name)
        (target / f"{safe}.png").write_bytes(_encoded(_pillow(image), "PNG"))


def read_images(folder: Path) -> dict[str, Tensor]:
    """Reads what `save_images` wrote into `folder`, by name; {} if there is none.

    Raises DataError for a file that cannot be decoded.
    """
    return {file.stem: _read(file) for file in sorted((folder / FOLDER).glob("*.png"))}


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as pillow:
            return torch.from_numpy(np.array(pillow.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise DataError(f"report: {file} cannot be read ({error}); remove it") from None


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def _encoded(pillow: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    pillow.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return buffer.getvalue()
