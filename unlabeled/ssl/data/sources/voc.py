"""Images with masks and boxes in the form of PASCAL VOC (Everingham et al., IJCV 2010), whole or in part."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.decode import EXTENSIONS
from unlabeled.ssl.data.source import DecodeError, SourceConfig, Split
from unlabeled.ssl.data.sources.files import FileSource
from unlabeled.ssl.data.sources.layout import existing_folder, holdout

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""In the order of the masks' values from 1."""
NO_OBJECT = "no object"
"""Class of images that show none; it comes last, and only where there are such images."""
_IGNORE = 255


class VocObject(NamedTuple):
    """One object of an annotation."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels from the corner; VOC's own count from 1 and include the last."""

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return max(right - left, 0.0) * max(bottom - top, 0.0)


class VocConfig(SourceConfig):
    """Images in PASCAL VOC's layout, with masks and boxes where there are any."""

    path: Path | None = None
    """Folder that holds JPEGImages and, optionally, SegmentationClass (masks), Annotations (boxes),
    ImageSets/Segmentation/train.txt and val.txt (lists of the splits) and classes.txt (for other classes than
    VOC's)."""
    dataset: str | None = None
    """Sub-folder of ImageSets to take the lists from; null: Segmentation if it exists, else Main."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of the images that is held out for testing if there are no lists. [fraction]"""


class VocSource(FileSource):
    """Data in the form of PASCAL VOC: masks, boxes and lists, as far as they are there.

    The folder has ``JPEGImages``, and as far as they are there ``SegmentationClass``, ``Annotations``, ``ImageSets``.
    The splits are the lists ``train.txt`` and ``val.txt`` (else ``test.txt``) of ``ImageSets/Segmentation``, of
    ``ImageSets/Main`` where there is no such folder, or of ``ImageSets/{data.dataset}``. Without lists a part of all
    images is held out, chosen by a hash of the name.

    Classes are the lines of ``classes.txt``, in the order of the masks' values from 1; without that file VOC's twenty,
    or, if the annotations name others, all their names by the alphabet. The label of an image is the class whose boxes
    are largest together; without an annotation the class with most pixels in the mask. With neither annotations nor
    masks there are no labels.
    """

    Config: ClassVar[type[SourceConfig]] = VocConfig

    def __init__(self, config: VocConfig, split: Split = "train") -> None:
        self.root = _root(existing_folder(config.path, "data.path"))
        images = _by_stem(self.root / "JPEGImages", EXTENSIONS)
        if not images:
            raise DataError(f"data.path: no images in {self.root / 'JPEGImages'}")
        self._masks = _by_stem(self.root / "SegmentationClass", {".png"})
        parts = _splits(self.root, config, images)
        self._stems = parts[split]
        self._files = [images[stem] for stem in self._stems]
        self.classes: list[str] | None = None
        self._names: tuple[str, ...] = ()
        self._labels: torch.Tensor | None = None
        annotated = (self.root / "Annotations").is_dir()
        if annotated or self._masks:
            objects = {stem: self._objects(stem) for part in parts.values() for stem in part} if annotated else {}
            self._names = _class_names(self.root, {one.name for found in objects.values() for one in found or ()})
            labels = {part: [self._label(stem, objects.get(stem)) for stem in stems] for part, stems in parts.items()}
            empty = any(-1 in found for found in labels.values())
            self.classes = [*self._names, NO_OBJECT] if empty else list(self._names)
            self._labels = torch.tensor(labels[split]).remainder(len(self.classes))  # -1 → the last

    def __len__(self) -> int:
        return len(self._stems)

    def encoded(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / "JPEGImages" / self._files[index]

    def mask(self, index: int) -> torch.Tensor:
        """uint8 (H, W): 0 is background, class c is c + 1, 255 unknown; all unknown for an image without a mask.

        Raises DataError for a folder without masks and for values beyond the classes, DecodeError for a broken file.
        """
        if not self._masks:
            raise DataError(f"data.path: {self.root} has no masks; put them into SegmentationClass, named as images")
        found = self._mask(self._stems[index])
        return torch.full(self.read(index).shape[1:], _IGNORE, dtype=torch.uint8) if found is None else found

    def boxes(self, index: int) -> torch.Tensor | None:
        """Boxes of all annotated objects, also difficult ones, float32 (N, 4); None without an annotation."""
        objects = self._objects(self._stems[index])
        if objects is None:
            return None
        return torch.tensor([one.box for one in objects], dtype=torch.float32).reshape(-1, 4)

    def _objects(self, stem: str) -> list[VocObject] | None:
        file = self.root / "Annotations" / f"{stem}.xml"
        return _read_annotation(file) if file.is_file() else None

    def _mask(self, stem: str) -> torch.Tensor | None:
        name = self._masks.get(stem)
        if name is None:
            return None
        mask = _read_mask(self.root / "SegmentationClass" / name)
        largest = int(torch.where(mask == _IGNORE, 0, mask).max())
        if largest > len(self._names):
            raise DataError(
                f"data.path: {name} of {self.root} has value {largest}, and there are {len(self._names)} classes; "
                "write classes.txt there, one name a line, in the order of the values from 1"
            )
        return mask

    def _label(self, stem: str, objects: Sequence[VocObject] | None) -> int:
        """The class that is largest; -1 for an image without objects."""
        sizes = np.zeros(len(self._names))
        if objects:
            for one in objects:
                if one.name not in self._names:
                    raise DataError(f"data.path: class {one.name!r} of {stem}.xml is not in classes.txt; add it there")
                sizes[self._names.index(one.name)] += one.area
        elif (mask := self._mask(stem)) is not None:
            sizes += np.bincount(mask.numpy().ravel(), minlength=256)[1 : len(sizes) + 1]
        return int(sizes.argmax()) if sizes.any() else -1


def _root(folder: Path) -> Path:
    if (folder / "JPEGImages").is_dir():
        return folder
    near = sorted([*folder.glob("*/JPEGImages"), *folder.glob("*/*/JPEGImages")])
    remedy = f"data.path={near[-1].parent}" if near else "the folder that it lies in, such as VOCdevkit/VOC2012"
    raise DataError(f"data.path: {folder} has no folder JPEGImages; give {remedy}")


def _by_stem(folder: Path, extensions: Iterable[str]) -> dict[str, str]:
    """Name without extension → name of each file of one of the kinds, in the order of names; {} without the folder."""
    if not folder.is_dir():
        return {}
    kinds = set(extensions)
    split = (os.path.splitext(name) for name in sorted(os.listdir(folder)) if not name.startswith("."))
    return {stem: stem + kind for stem, kind in split if kind.lower() in kinds}


def _splits(root: Path, config: VocConfig, images: dict[str, str]) -> dict[Split, list[str]]:
    """Split → stems of its images."""
    folders = (config.dataset,) if config.dataset is not None else ("Segmentation", "Main")
    lists = next((root / "ImageSets" / name for name in folders if (root / "ImageSets" / name).is_dir()), None)
    if lists is None and config.dataset is not None:
        raise DataError(f"data.dataset: {root / 'ImageSets'} has no folder {config.dataset}; remove it or give another")
    if lists is None:
        order = functools.partial(hashlib.blake2b, digest_size=8)
        digests = b"".join(order(os.fsencode(stem)).digest() for stem in images)
        keys = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
        stems, one_class = list(images), torch.zeros(len(images), dtype=torch.int64)
        train, test = (holdout(one_class, config.test_fraction, split, keys) for split in ("train", "test"))
        return {"train": [stems[i] for i in train.tolist()], "test": [stems[i] for i in test.tolist()]}
    held = next((name for name in ("val", "test") if (lists / f"{name}.txt").is_file()), "val")
    return {"train": _listed(lists / "train.txt", images), "test": _listed(lists / f"{held}.txt", images)}


def _listed(file: Path, images: dict[str, str]) -> list[str]:
    try:
        stems = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"data.path: {file} cannot be read ({error.strerror}); each split needs its list") from error
    missing = [stem for stem in stems if stem not in images]
    if missing or not stems:
        shown = f"{len(missing)} names that JPEGImages lacks, such as {missing[0]}" if missing else "no names"
        raise DataError(f"data.path: {file} has {shown}; complete the data or mend the list")
    return stems


def _class_names(root: Path, annotated: set[str]) -> tuple[str, ...]:
    file = root / "classes.txt"
    if file.is_file():
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(set(names)) < len(names) or not 0 < len(names) < _IGNORE:
            raise DataError(f"data.path: {file} has {len(names)} names; give 1 to 254 different ones, one a line")
        return names
    return VOC_CLASSES if annotated <= set(VOC_CLASSES) else tuple(sorted(annotated))


def _read_annotation(file: Path) -> list[VocObject]:
    try:
        found = ElementTree.parse(file).getroot().findall("object")
        return [_object(one) for one in found if one.find("bndbox") is not None]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise DataError(f"data.path: {file} is not an annotation of VOC ({error}); mend or remove it") from error


def _object(element: ElementTree.Element) -> VocObject:
    left, top, right, bottom = (
        float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return VocObject(element.findtext("name", "").strip(), (left - 1, top - 1, right, bottom))


def _read_mask(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as image:
            mode, values = image.mode, np.array(image)
    except Exception as error:  # what a damaged file raises is up to Pillow's plugins
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{file}: cannot be decoded ({reason})") from error
    if mode not in ("P", "L"):
        raise DataError(f"data.path: mask {file} is of mode {mode}; save class numbers, in gray or with a palette")
    return torch.from_numpy(values.astype(np.uint8))
