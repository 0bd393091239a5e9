"""Bytes or a file → RGB uint8 (3, H, W), for every kind of image that people have on disk.

What is not plain RGB becomes so by these rules:

- transparency (RGBA, LA, palettes and gray values marked transparent) is composited on white;
- 16-bit gray is divided by 257, so that 65535 is white; 32-bit gray within 0..255 or 0..65535 is read as 8 or 16 bits,
  floats within 0..1 as such, and any other range is stretched from its minimum to its maximum;
- the EXIF orientation is applied; of an animation the first frame is taken.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from unlabeled.ssl.data.source import DecodeError

_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2"}
_NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
EXTENSIONS = frozenset(_JPEG | _NETPBM | {".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
"""File names that are taken for images, in lower case."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """What an image says of itself before it is decoded."""

    format: str
    mode: str
    """Pillow's name of the channels, such as ``RGB``, ``L`` or ``CMYK``."""


def decode_rgb(data: bytes | str | os.PathLike[str], name: str | None = None) -> torch.Tensor:
    """Decodes an encoded image, or the file at a path, to uint8 (3, H, W).

    `name` is what the error calls it. Raises DecodeError, in one line, for whatever cannot be decoded: truncated,
    corrupt or empty data, decompression bombs, other kinds of files, and paths that are no files.
    """
    called = name or (f"image of {len(data)} bytes" if isinstance(data, bytes) else _printable(data))
    content = data if isinstance(data, bytes) else read_bytes(data, called)
    with _decoding(called), _open(content, called) as image:
        image.load()
        return rgb_tensor(_upright(image))


def rgb_tensor(image: Image.Image) -> torch.Tensor:
    """Pillow image of any mode → RGB uint8 (3, H, W), by this module's rules (orientation excepted)."""
    pixels = np.array(_to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_header(content: bytes, name: str) -> Header:
    """Format and mode of an encoded image without decoding it. Raises DecodeError as `decode_rgb` does."""
    with _decoding(name), _open(content, name) as image:
        return Header(image.format or "?", image.mode)


def read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """The content of a regular file. Raises DecodeError when there is no such file or it cannot be read."""
    try:
        # a pipe or a device would block for ever: only regular files are opened
        if not os.path.isfile(path):
            reason = "is not a file" if os.path.exists(path) else "there is no such file"
            raise DecodeError(f"{name}: {reason}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DecodeError(f"{name}: cannot be read ({_one_line(error)})") from error


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Silences Pillow's warnings and turns whatever goes wrong inside into a DecodeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DecodeError:
            raise
        except Exception as error:  # corrupt files surface as OSError, SyntaxError, struct.error, KeyError, ...
            raise DecodeError(f"{name}: cannot be decoded ({_one_line(error)})") from error


def _open(content: bytes, name: str) -> Image.Image:
    if not content:
        raise DecodeError(f"{name}: is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        raise DecodeError(f"{name}: is not an image of a known format ({len(content)} bytes)") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats this Pillow was built with. Not all that it knows: some of its plugins start other programs."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an image with broken EXIF is still an image, taken as it lies
        orientation = 1
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        return _gray(_to_255(np.asarray(image).astype(np.float64), unit_range=image.mode == "F"))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_255(values: npt.NDArray[np.float64], *, unit_range: bool) -> npt.NDArray[np.float64]:
    """Values of unknown range → 0..255; those that are not finite become 0."""
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    clean = np.where(finite, values, low)
    if low >= 0 and unit_range and high <= 1:
        return clean * 255
    if low >= 0 and high <= 255:
        return clean
    if low >= 0 and high <= 65535:
        return clean / 257
    return (clean - low) * 255 / (high - low) if high > low else np.zeros_like(clean)


def _gray(values: npt.NDArray[np.float64]) -> Image.Image:
    return Image.fromarray((values + 0.5).astype(np.uint8)).convert("RGB")


def _printable(path: str | os.PathLike[str]) -> str:
    """A path that any terminal can show, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
