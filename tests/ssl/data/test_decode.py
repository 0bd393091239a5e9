"""Every kind of image that people have, and every way in which one can be broken."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.decode import decode_rgb, read_header, rgb_tensor
from unlabeled.ssl.data.source import DecodeError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def color(decoded: torch.Tensor, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(decoded[:, y, x].tolist())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_kinds_give_the_exact_pixels(kind: str) -> None:
    image = noise()
    decoded = decode_rgb(saved(image, kind))
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert torch.equal(decoded, torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {}), ("GIF", {})])
def test_lossy_kinds_give_nearly_the_color(kind: str, options: dict[str, object]) -> None:
    decoded = decode_rgb(saved(Image.new("RGB", (32, 16), (200, 100, 50)), kind, **options))
    assert decoded.shape == (3, 16, 32)
    assert (decoded.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_gray_is_repeated_in_three_channels(kind: str) -> None:
    decoded = decode_rgb(saved(Image.new("L", (8, 8), 77), kind))
    assert color(decoded) == (77, 77, 77)


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (8, 8), 0)
    image.putpixel((3, 0), 1)
    decoded = decode_rgb(saved(image, "PNG"))
    assert color(decoded, 3) == (255, 255, 255)
    assert color(decoded, 4) == (0, 0, 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (4, 4), (*RED, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*RED, 255)), RED),
        (Image.new("RGBA", (4, 4), (*RED, 51)), (255, 204, 204)),
        (Image.new("LA", (4, 4), (0, 51)), (204, 204, 204)),
        (Image.new("LA", (4, 4), (90, 255)), (90, 90, 90)),
    ],
)
def test_transparency_is_composited_on_white(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert color(decode_rgb(saved(image, "PNG"))) == expected


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_becomes_its_colors(kind: str) -> None:
    decoded = decode_rgb(saved(palette(), kind))
    assert color(decoded) == RED
    assert color(decoded, 1) == GREEN


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(kind: str) -> None:
    decoded = decode_rgb(saved(palette(), kind, transparency=0))
    assert color(decoded) == (255, 255, 255)
    assert color(decoded, 1) == GREEN


def test_transparent_gray_value_becomes_white() -> None:
    image = Image.new("L", (4, 4), 10)
    image.putpixel((1, 0), 20)
    decoded = decode_rgb(saved(image, "PNG", transparency=10))
    assert color(decoded) == (255, 255, 255)
    assert color(decoded, 1) == (20, 20, 20)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    decoded = decode_rgb(saved(Image.fromarray(values), kind))
    assert decoded[0, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 200.0]], dtype=np.float32), [0, 100, 200]),
        (np.array([[np.nan, -1.0, 1.0]], dtype=np.float32), [0, 0, 255]),
        (np.array([[7, 7, 7]], dtype=np.int32), [7, 7, 7]),
    ],
)
def test_thirty_two_bit_gray(values: np.ndarray, expected: list[int]) -> None:
    decoded = decode_rgb(saved(Image.fromarray(values), "TIFF"))
    assert decoded[1, 0].tolist() == expected


def test_cmyk_becomes_rgb() -> None:
    decoded = decode_rgb(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert color(decoded) == RED
    jpeg = decode_rgb(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert (jpeg.float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 6


def corner_of(orientation: int) -> tuple[int, int]:
    """Where (x, y) the first stored pixel of a 3 x 2 image is shown, by the EXIF standard's table."""
    return {1: (0, 0), 2: (2, 0), 3: (2, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 2), 8: (0, 2)}[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    image = Image.new("RGB", (3, 2), BLUE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_rgb(saved(image, kind, exif=exif))
    assert decoded.shape == ((3, 2, 3) if orientation < 5 else (3, 3, 2))
    assert color(decoded, *corner_of(orientation)) == RED


def test_broken_exif_does_not_spoil_a_image() -> None:
    data = saved(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert decode_rgb(data).shape == (3, 8, 8)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), shade) for shade in (RED, GREEN)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert color(decode_rgb(data)) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_images_raise(kind: str, part: float) -> None:
    data = saved(noise(size=(120, 80)), kind)
    with pytest.raises(DecodeError, match=r"^cut: (cannot be decoded \(.+\)|is not an image of a known format .+)$"):
        decode_rgb(data[: int(len(data) * part)], name="cut")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, I am a text", r"is not an image of a known format \(18 bytes\)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known format"),
        (b"\xff\xd8\xff\xe0" + b"\x00" * 50, r"cannot be decoded|is not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\x07" * 64, r"cannot be decoded|is not an image"),
    ],
)
def test_what_is_no_image_raises_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as caught:
        decode_rgb(data, name="odd.jpg")
    assert str(caught.value).startswith("odd.jpg: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bomb_raises() -> None:
    with pytest.raises(DecodeError, match=r"^bomb: cannot be decoded \(.*decompression bomb"):
        decode_rgb(png_of_size(30000, 30000), name="bomb")


def test_warnings_of_pillow_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    data = saved(noise(size=(40, 24)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(data).shape == (3, 24, 40)
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(data))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    assert torch.equal(decode_rgb(path), decode_rgb(str(path)))
    assert torch.equal(decode_rgb(path), rgb_tensor(noise()))
    assert read_header(path.read_bytes(), "a") == ("PNG", "RGB")


def test_paths_that_are_no_files_raise(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DecodeError, match=r"gone\.jpg: there is no such file"):
        decode_rgb(tmp_path / "gone.jpg")
    with pytest.raises(DecodeError, match="is not a file"):
        decode_rgb(tmp_path)
    with pytest.raises(DecodeError, match=r"pipe\.jpg: is not a file"):
        decode_rgb(tmp_path / "pipe.jpg")
