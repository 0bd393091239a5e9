"""Each rule for sources: one that keeps them all passes, and each way to break one is told as such."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.testing import (
    SOURCE_CHECKS,
    ContractError,
    SourceCase,
    another_process_reads_the_same,
    check_source,
    run_check,
)

sys.path.insert(0, str(Path(__file__).parent))  # for `broken_sources`, in another process too

import broken_sources as sources

RULES = {check.__name__: check for check in (*SOURCE_CHECKS, another_process_reads_the_same)}

BROKEN = [
    ("source_and_settings_are_documented", sources.NoDocstring, "NoDocstring has no docstring; say what it reads"),
    ("source_and_settings_are_documented", sources.BareSetting, "no docstring under strength; say what it is"),
    ("unknown_settings_are_refused", sources.LooseSettings, "an unknown setting is accepted silently"),
    ("unknown_settings_are_refused", sources.TakenSetting, "name is already a setting of all data; choose another"),
    ("settings_survive_json", sources.UnwrittenSettings, r"the settings cannot be written \(.*; use types that pydant"),
    ("it_is_a_source_of_images", sources.Empty, "its length is 0; raise DataError, saying where"),
    ("images_are_uint8_rgb", sources.Floats, r"image 0 is torch.float32 \(3, 8, 10\); give uint8, 0..255"),
    ("images_are_uint8_rgb", sources.ChannelsLast, r"image 0 is torch.uint8 \(8, 10, 3\); give \(3, H, W\), channels"),
    (
        "an_image_is_always_the_same",
        sources.Random,
        "an index gives different pixels the second time; use no randomness in",
    ),
    ("an_image_is_always_the_same", sources.OtherOrder, "opened again, an index gives a different image; sort what"),
    (
        "labels_number_the_classes",
        sources.FloatLabels,
        r"train: labels are torch.float32 \(10,\), .* give int64 \(N,\)",
    ),
    (
        "labels_number_the_classes",
        sources.TooManyLabels,
        "train: labels go from 0 to 9 for 2 classes; a label is an index",
    ),
    ("labels_number_the_classes", sources.NoClasses, "train: labels are there, classes None; give both, or None for"),
    (
        "descriptions_tell_images_apart",
        sources.OneDescription,
        "noise stands for several images; give the path, or the",
    ),
    ("an_index_beyond_the_end_raises", sources.Endless, "an index beyond the end gives an image; raise IndexError"),
    ("an_index_beyond_the_end_raises", sources.KeyErrors, "an index beyond the end raises KeyError; raise IndexError"),
    ("splits_are_apart", sources.Overlapping, "noise 0 is in both the training and the test split; split with"),
    (
        "encoded_content_is_the_image",
        sources.OtherThanEncoded,
        "image 0 differs from what encoded returns; read it as decode",
    ),
    (
        "what_cannot_be_decoded_is_a_decode_error",
        sources.PillowsError,
        "cannot be decoded raises UnidentifiedImageError; raise DecodeError",
    ),
    (
        "masks_fit_the_images",
        sources.SmallMask,
        r"mask 0 is torch.uint8 \(4, 4\) for an image \(3, 8, 10\); give uint8",
    ),
    ("masks_fit_the_images", sources.MaskBeyondClasses, r"mask 0 has value 3 for 2 classes; class c is c \+ 1"),
    (
        "boxes_fit_the_images",
        sources.BoxBeyondImage,
        "a box of image 0 is not within it; give left, top, right, bottom",
    ),
    (
        "another_process_reads_the_same",
        sources.OpenFile,
        r"it does not pickle \(.*\); keep paths and tables, open file",
    ),
]


@pytest.mark.parametrize("source", [sources.Good, sources.NoTestSplit, sources.Encoded])
def test_a_source_that_keeps_every_rule_passes(source: type) -> None:
    for check in SOURCE_CHECKS:
        run_check(check, SourceCase.of(source))


@pytest.mark.parametrize(("rule", "source", "message"), BROKEN, ids=[source.__name__ for _, source, _ in BROKEN])
def test_a_broken_rule_is_named_with_what_was_seen_and_the_remedy(rule: str, source: type, message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        run_check(RULES[rule], SourceCase.of(source))
    assert str(caught.value).startswith(f"{source.__name__} breaks '{rule.replace('_', ' ')}': ")


def test_every_rule_has_a_source_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_a_class_a_name_or_a_section_of_data_is_checked() -> None:
    check_source(sources.Good, {"count": 6})
    with pytest.raises(ContractError, match=r"^digits: settings: count: there is no such setting"):
        check_source("digits", {"count": 6})
    with pytest.raises(ContractError, match=r"^digits: settings: count: there is no such setting"):
        check_source(DataConfig(name="digits", count=6))
    with pytest.raises(ConfigError, match=r"^data: 'digist' is not a data source; did you mean 'digits'\?"):
        check_source("digist")
