"""Figures: that they draw what they are given, whatever its size, and what their colors are."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

from unlabeled.eval.embedding import Embedding
from unlabeled.report.figures import class_figure, embedding_figure, heat_figure, spectrum_figure

CSS = (files("unlabeled.report") / "templates" / "report.css").read_text()

SEEN_AS = {
    "everyone": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Severe color vision deficiencies on linear RGB: Machado, Oliveira and Fernandes 2009."""


def linear(color: str) -> np.ndarray:
    value = np.array([int(color[position : position + 2], 16) / 255 for position in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB → Oklab (Ottosson 2020)."""
    cones = np.cbrt(
        np.array(
            [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
             [0.0883024619, 0.2817188376, 0.6299787005]]
        ) @ np.clip(rgb, 0, 1)
    )  # fmt: skip
    return np.array(
        [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.808675766]]
    ) @ cones  # fmt: skip


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("eyes", SEEN_AS)
def test_colors_of_classes_are_distinguishable_in_light_and_dark(theme: int, eyes: str) -> None:
    palette = [re.findall(rf"--kind{number}: (#[0-9a-f]{{6}});", CSS)[theme] for number in range(10)]
    card = re.findall(r"--card: (#[0-9a-f]{6});", CSS)[theme]
    seen = [oklab(np.array(SEEN_AS[eyes]) @ linear(color)) for color in (*palette, card)]
    apart = min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2))
    assert apart > 0.1, "0.02 is a just noticeable difference"


def points(labels: list[int]) -> Embedding:
    values = np.random.default_rng(0).normal(size=(len(labels), 2)).astype(np.float32)
    return Embedding(values, np.array(labels), "PCA", "Mind.")


def test_the_ten_most_common_classes_have_colors_and_the_rest_is_gray() -> None:
    labels = [label for label in range(12) for _ in range(12 - label)]
    svg = embedding_figure(points(labels), [f"class {label}" for label in range(12)])
    for number in range(10):
        assert f">class {number}<" in svg
        assert f"var(--kind{number})" in svg
    assert ">class 10<" not in svg
    assert ">other classes<" in svg
    few = embedding_figure(points([0, 2]), ["a", "b", "c"])
    assert ">other classes<" not in few
    assert ">b<" not in few, "no image of it"


def test_a_map_of_a_thousand_points_is_light() -> None:
    assert len(embedding_figure(points(list(np.arange(1000) % 7)), [str(label) for label in range(7)])) < 250_000


def test_spectra_are_relative_and_without_rounding() -> None:
    svg = spectrum_figure({"backbone": np.array([8.0, 4, 2, 1e-9, 0, np.nan]), "pixels": np.zeros(3)}, "label")
    assert svg is not None
    assert ">this backbone<" in svg
    assert "raw pixels" not in svg
    assert spectrum_figure({"backbone": np.zeros(4)}, "label") is None


@pytest.mark.parametrize("shape", [(2, 5), (30, 30), (1, 1)])
def test_heat_maps_of_any_shape(shape: tuple[int, int]) -> None:
    names = [f"block {number}" for number in range(30)]
    svg = heat_figure(np.full(shape, 0.4), names[: shape[0]], names[: shape[1]], ("layer", "layer"), "CKA")
    assert (">40<" in svg) == (max(shape) <= 12)
    assert (">block 0<" in svg) == (max(shape) <= 24)
    assert ">40<" not in heat_figure(np.full((2, 2), np.nan), names[:2], names[:2], ("a", "b"), "empty")


@pytest.mark.parametrize("count", [1, 24, 300])
def test_a_score_of_each_class(count: int) -> None:
    shares = {"backbone": np.linspace(0, 1, count), "random": np.full(count, np.nan)}
    svg = class_figure(shares, [f"class {number}" for number in range(count)], "label")
    assert (">class 0<" in svg) == (count <= 24)
    assert ("best first" in svg) == (count > 24)
