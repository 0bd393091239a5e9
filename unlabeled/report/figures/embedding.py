"""The map of the test images: their features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from unlabeled.eval.embedding import Embedding
from unlabeled.report.figures.style import KINDS, SOFT, STYLE, WIDTH, drawing, legend, short, svg

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
"""Shapes in addition to colors, for color-blind readers and gray printers."""

_LEGEND = 0.5
"""Height of the legend below the points, in inches."""


def embedding_figure(embedding: Embedding, classes: Sequence[str]) -> Markup:
    """Plots test images as points. The ten most common classes have colors and shapes; others are small and gray."""
    points, labels = embedding.points, embedding.labels
    counts = np.bincount(labels, minlength=len(classes))
    # stable, so that ties go to the first class and the figure is reproducible
    shown = [int(one) for one in np.argsort(-counts, kind="stable")[: len(KINDS)] if counts[one]]
    with mpl.rc_context(STYLE):
        spread = np.ptp(points, axis=0)
        # follow the shape of the map within limits; the width may be 0 if all features are equal
        figure, axes = drawing(WIDTH * float(np.clip(spread[1] / max(spread[0], 1e-12), 0.5, 1)) + _LEGEND)
        others = ~np.isin(labels, shown)
        if others.any():
            axes.plot(*points[others].T, "o", color=SOFT, markersize=2, alpha=0.5, label="other classes")
        size = 5 if len(points) <= 300 else 3.6
        for number, one in enumerate(sorted(shown)):
            axes.plot(
                *points[labels == one].T, _MARKERS[number], color=KINDS[number], markersize=size, alpha=0.8,
                markeredgewidth=0, label=short(classes[one], 18), rasterized=False,
            )  # fmt: skip
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_aspect("equal", "datalim")
        legend(figure, axes, loc="outside lower center", ncols=4, columnspacing=1.2, handletextpad=0.2)
        return svg(figure, f"Map of {len(points)} test images by their features, colored by class")
