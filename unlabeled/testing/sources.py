"""The contract of a data source as rules, and `check_source`, which checks a source against them.

`docs/how-to/own-source.md` explains the rules.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import DataError, first_line
from unlabeled.ssl.data.decode import decode_rgb
from unlabeled.ssl.data.registry import source_class
from unlabeled.ssl.data.source import (
    DecodeError,
    ImageSource,
    MaskSource,
    SourceClass,
    SourceConfig,
    Split,
    annotated_boxes,
    encoded,
)
from unlabeled.testing.case import ContractError, checked_class, listed, require
from unlabeled.testing.check import run_check
from unlabeled.testing.surface import require_documented

_SAMPLE = 8
"""Number of images that are read, spread over the source."""
_DESCRIBED = 2000
"""Number of images whose description is checked."""
_UNKNOWN = 255
"""Mask value of pixels without a known class."""
_PLAIN = "keep paths and tables, open files in read, and define the class at module level"

_THERE = """
import hashlib, pickle, sys
path, given = pickle.loads(open(sys.argv[1], "rb").read())
sys.path[:] = path
found = []
for content, indices in given:
    try:
        source = pickle.loads(content)
        found.append([hashlib.sha256(source.read(index).numpy().tobytes()).hexdigest() for index in indices])
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
open(sys.argv[2], "wb").write(pickle.dumps(found))
"""
"""Program of a new process, which reads images from the pickled sources it is given."""


@dataclass(frozen=True)
class SourceCase:
    """A source class, its settings (as given and validated) and its training split, opened once."""

    name: str
    cls: SourceClass
    settings: Mapping[str, Any]
    config: SourceConfig
    train: ImageSource

    @classmethod
    def of(cls, source: str | type[Any], settings: Mapping[str, Any] | None = None) -> SourceCase:
        """`source`: a registered name or the class itself.

        Raises ContractError for invalid settings, ConfigError for a name that is not registered, and whatever the
        source itself raises when it is opened.
        """
        found = (
            source_class(source) if isinstance(source, str) else cast(SourceClass, checked_class(source, "a source"))
        )
        name = source if isinstance(source, str) else source.__name__
        given = dict(settings or {})
        try:
            config = found.Config.model_validate(given)
        except ValidationError as error:
            raise ContractError(f"{name}: settings: {explain(error, found.Config)}") from None
        return cls(name, found, given, config, found(config, "train"))

    def open(self, split: Split = "train") -> ImageSource:
        """Opens `split` again."""
        return self.cls(self.config, split)

    def sample(self) -> list[int]:
        """Indices of some training images, including the first and the last."""
        return spread(len(self.train), _SAMPLE)


def spread(length: int, count: int) -> list[int]:
    """`count` indices below `length` (or all), evenly spaced from the first to the last."""
    return sorted({round(position * (length - 1) / max(count - 1, 1)) for position in range(min(count, length))})


def source_and_settings_are_documented(case: SourceCase) -> None:
    """The source, its Config and every setting have a docstring."""
    require_documented(case.cls, case.cls.Config, "say what it reads")


def unknown_settings_are_refused(case: SourceCase) -> None:
    """A misspelled setting is an error, and no setting has a name that belongs to all data."""
    config = case.cls.Config
    require(issubclass(config, SourceConfig), f"Config is {config.__name__}", "derive it from SourceConfig")
    taken = sorted({"name", "max_bad_fraction"} & config.model_fields.keys())
    require(
        not taken,
        f"{listed(taken)} is already a setting of all data",
        "choose another name; it would never reach the source",
    )
    try:
        config.model_validate({**case.settings, "no_such_field": 1})
    except ValidationError:
        return
    require(False, "an unknown setting is accepted silently", 'keep extra="forbid" of SourceConfig')


def settings_survive_json(case: SourceCase) -> None:
    """A run writes its settings to a file and reads them back."""
    try:
        text = json.dumps(case.config.model_dump(mode="json"))
    except Exception as error:  # whatever a serializer raises
        require(False, f"the settings cannot be written ({first_line(error)})", "use types that pydantic can write")
    found = case.cls.Config.model_validate(json.loads(text))
    require(found == case.config, f"the settings are read back as {found!r}", "use types that pydantic can write")


def it_is_a_source_of_images(case: SourceCase) -> None:
    """It has all members and is not empty."""
    members = ("classes", "__len__", "read", "labels", "describe")
    missing = [name for name in members if not hasattr(case.train, name)]
    require(not missing, f"it has no {listed(missing)}", "add the missing members; classes may be None")
    length = len(case.train)
    require(length > 0, f"its length is {length}", "raise DataError, saying where no images were found")


def images_are_uint8_rgb(case: SourceCase) -> None:
    """Images are uint8 (3, H, W), gray ones too."""
    for index in case.sample():
        image = case.train.read(index)
        require(isinstance(image, Tensor), f"read gives a {type(image).__name__}", "give a torch.Tensor")
        found = f"image {index} is {image.dtype} {tuple(image.shape)}"
        rgb = image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
        require(rgb, found, "give (3, H, W), channels first; gray images have three equal channels")
        require(image.dtype == torch.uint8, found, "give uint8, 0..255")


def an_image_is_always_the_same(case: SourceCase) -> None:
    """An index always gives the same pixels, and a source that is opened again has the same order."""
    sample, again = case.sample(), case.open()
    first = digests(case.train, sample)
    require(
        first == digests(case.train, sample),
        "an index gives different pixels the second time",
        "use no randomness in read",
    )
    order = "sort what a folder, a glob or a set returns"
    require(len(again) == len(case.train), "opened again, it has a different length", order)
    require(first == digests(again, sample), "opened again, an index gives a different image", order)
    require(described(again) == described(case.train), "opened again, the descriptions differ", order)
    one, other = case.train.labels(), again.labels()
    same = other is None if one is None else other is not None and torch.equal(one, other)
    require(same, "opened again, the labels differ", order)


def labels_number_the_classes(case: SourceCase) -> None:
    """Labels are int64 (N,) below the number of classes, -1 for an unlabeled image; without labels, no classes."""
    for split, source in _splits(case):
        labels, classes = source.labels(), source.classes
        both = (labels is None) == (classes is None)
        require(both, f"{split}: labels are {_kind(labels)}, classes {_kind(classes)}", "give both, or None for both")
        if labels is None or classes is None:
            continue
        require(isinstance(labels, Tensor), f"labels are a {type(labels).__name__}", "give a torch.Tensor")
        found = f"{split}: labels are {labels.dtype} {tuple(labels.shape)}, and there are {len(source)} images"
        require(labels.dtype == torch.int64 and labels.shape == (len(source),), found, "give int64 (N,)")
        low, high = int(labels.min()), int(labels.max())
        inside = low >= -1 and high < len(classes)
        require(
            inside,
            f"{split}: labels go from {low} to {high} for {len(classes)} classes",
            "a label is an index into classes",
        )
        names = [name for name in classes if not isinstance(name, str)]
        require(not names, f"class {names and names[0]!r} is not a string", "give names as str")
        require(len(set(classes)) == len(classes), f"{split}: two classes have the same name", "give each its own")


def descriptions_tell_images_apart(case: SourceCase) -> None:
    """Every image has its own description, which errors and lists of bad images show."""
    found = described(case.train)
    empty = [index for index, text in enumerate(found) if not isinstance(text, str) or not text.strip()]
    require(not empty, f"image {empty and empty[0]} has no description", "give its path, or its row and file")
    twice = sorted({text for text in found if found.count(text) > 1}) if len(set(found)) < len(found) else []
    require(not twice, f"{listed(twice)} stands for several images", "give the path, or the row and file")


def an_index_beyond_the_end_raises(case: SourceCase) -> None:
    """An index past the end raises IndexError, so that it is not counted as a broken image."""
    remedy = "raise IndexError"
    try:
        case.train.read(len(case.train))
    except IndexError:
        return
    except Exception as error:  # anything but IndexError
        require(False, f"an index beyond the end raises {type(error).__name__}", remedy)
    require(False, "an index beyond the end gives an image", remedy)


def splits_are_apart(case: SourceCase) -> None:
    """No training image is in the test split. Without a test split, opening it raises DataError."""
    splits = dict(_splits(case))
    if "test" not in splits:
        return
    train, test = splits["train"], splits["test"]
    require(len(test) > 0, "the test split is empty", "raise DataError, saying how to get one")
    numbers = {text: index for index, text in enumerate(described(train))}
    # two tables may describe their rows alike, so equal descriptions alone prove nothing: compare pixels
    alike = [(numbers[text], index) for index, text in enumerate(described(test)) if text in numbers][:_SAMPLE]
    both = [one for one, other in alike if digests(train, [one]) == digests(test, [other])]
    shown = train.describe(both[0]) if both else ""
    require(not both, f"{shown} is in both the training and the test split", "split with unlabeled.holdout")


def encoded_content_is_the_image(case: SourceCase) -> None:
    """If a source returns the bytes or file of an image, `unlabeled.decode_rgb` decodes them to that image."""
    for index in case.sample():
        content = encoded(case.train, index)
        if content is None:
            return
        fits = isinstance(content, (bytes, Path))
        require(fits, f"encoded gives a {type(content).__name__}", "give bytes, a Path, or None")
        same = torch.equal(decode_rgb(content, case.train.describe(index)), case.train.read(index))
        require(
            same, f"image {index} differs from what encoded returns", "read it as decode_rgb(self.encoded(index), name)"
        )


def what_cannot_be_decoded_is_a_decode_error(case: SourceCase) -> None:
    """`read` raises DecodeError for broken content, which the loader skips, counts and lists."""
    if not hasattr(case.train, "encoded"):
        return  # only a source that reads through `encoded` can be given broken content
    broken: Any = copy.copy(case.train)
    try:
        broken.encoded = lambda index: b"not an image"
        broken.read(0)
    except DecodeError as error:
        name = broken.describe(0)
        require(name in str(error), f"DecodeError does not name the image ({error})", "begin it with describe(index)")
    except Exception as error:  # every other error breaks the rule
        raised = f"an image that cannot be decoded raises {type(error).__name__}"
        require(False, raised, "raise DecodeError, as unlabeled.decode_rgb does")


def masks_fit_the_images(case: SourceCase) -> None:
    """Masks are uint8 (H, W): 0 is background, class c is c + 1, 255 is unknown."""
    source = case.train
    if not isinstance(source, MaskSource):
        return
    for index in case.sample():
        mask, image = source.mask(index), source.read(index)
        found = f"mask {index} is {mask.dtype} {tuple(mask.shape)} for an image {tuple(image.shape)}"
        require(mask.dtype == torch.uint8 and mask.shape == image.shape[1:], found, "give uint8 (H, W)")
        largest = int(torch.where(mask == _UNKNOWN, 0, mask).max())
        count = len(source.classes or ())
        require(largest <= count, f"mask {index} has value {largest} for {count} classes", "class c is c + 1")


def boxes_fit_the_images(case: SourceCase) -> None:
    """Boxes are float32 (N, 4): left, top, right, bottom in pixels; None for an image without annotation."""
    for index in case.sample():
        boxes = annotated_boxes(case.train, index)
        if boxes is None:
            continue
        found = f"boxes of image {index} are {boxes.dtype} {tuple(boxes.shape)}"
        fits = boxes.dtype == torch.float32 and boxes.ndim == 2 and boxes.shape[1] == 4
        require(fits, found, "give float32 (N, 4)")
        height, width = case.train.read(index).shape[1:]
        left, top, right, bottom = boxes.unbind(1)
        inside = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height) & (left <= right) & (top <= bottom)
        require(
            bool(inside.all()), f"a box of image {index} is not within it", "give left, top, right, bottom in pixels"
        )


def another_process_reads_the_same(case: SourceCase) -> None:
    """It pickles, as for loader workers, and a new process reads the same pixels. Takes a few seconds."""
    compare_with_another(case, read_in_another_process([case])[0])


def read_in_another_process(cases: Sequence[SourceCase]) -> list[list[str] | str]:
    """For each case, what a new process finds: the digests of its `sample`, or the error as text."""
    given = [(_pickled(case), case.sample()) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder, "there"), Path(folder, "back")
        there.write_bytes(pickle.dumps((sys.path, given)))
        subprocess.run([sys.executable, "-c", _THERE, str(there), str(back)], check=True)
        found: list[list[str] | str] = pickle.loads(back.read_bytes())
    return found


def compare_with_another(case: SourceCase, found: list[str] | str) -> None:
    """Raises ContractError if another process got an error or different pixels."""
    require(isinstance(found, list), f"another process cannot read it ({found})", _PLAIN)
    require(found == digests(case.train, case.sample()), "another process reads different pixels", _PLAIN)


def _pickled(case: SourceCase) -> bytes:
    try:
        return pickle.dumps(case.train)
    except Exception as error:  # whatever a __reduce__ raises
        raise ContractError(f"it does not pickle ({type(error).__name__}: {error}); {_PLAIN}") from None


SourceCheck = Callable[[SourceCase], None]
"""Raises ContractError when the rule stated by its name is broken."""

SOURCE_CHECKS: tuple[SourceCheck, ...] = (
    source_and_settings_are_documented,
    unknown_settings_are_refused,
    settings_survive_json,
    it_is_a_source_of_images,
    images_are_uint8_rgb,
    an_image_is_always_the_same,
    labels_number_the_classes,
    descriptions_tell_images_apart,
    an_index_beyond_the_end_raises,
    splits_are_apart,
    encoded_content_is_the_image,
    what_cannot_be_decoded_is_a_decode_error,
    masks_fit_the_images,
    boxes_fit_the_images,
)
"""Every rule that needs no other process. Later rules assume that earlier ones hold."""


def check_source(source: str | type[Any] | DataConfig, settings: Mapping[str, Any] | None = None) -> None:
    """Checks `source` against every rule of the contract; takes a few seconds, mostly to start a second process.

    `source`: a registered name, the class itself, or a section of data with its settings. `settings`: fields of its
    Config, such as the path of the images. The images must be readable.

    Raises ContractError, an AssertionError, for the first broken rule.
    """
    if isinstance(source, DataConfig):
        settings = {"limit": source.limit, **(source.model_extra or {}), **(settings or {})}
        source = source.name
    case = SourceCase.of(source, settings)
    for check in (*SOURCE_CHECKS, another_process_reads_the_same):
        run_check(check, case)


def digests(source: ImageSource, indices: Iterable[int]) -> list[str]:
    """SHA-256 of the pixels of each image."""
    return [hashlib.sha256(source.read(index).numpy().tobytes()).hexdigest() for index in indices]


def described(source: ImageSource) -> list[str]:
    """Descriptions of the first `_DESCRIBED` images."""
    return [source.describe(index) for index in range(min(len(source), _DESCRIBED))]


def _splits(case: SourceCase) -> list[tuple[Split, ImageSource]]:
    try:
        return [("train", case.train), ("test", case.open("test"))]
    except DataError:
        return [("train", case.train)]


def _kind(value: object) -> str:
    return "None" if value is None else "there"
