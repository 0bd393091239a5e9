"""The report's figures, grouped by what they show."""

from __future__ import annotations

from unlabeled.report.figures.accuracy import class_figure, comparison_figure, prefix_figure, series_figure
from unlabeled.report.figures.embedding import embedding_figure
from unlabeled.report.figures.evaluators import evaluator_figures
from unlabeled.report.figures.matrices import confusion_figure, heat_figure, spectrum_figure
from unlabeled.report.figures.sizes import size_figure
from unlabeled.report.figures.training import training_curves

__all__ = [
    "class_figure",
    "comparison_figure",
    "confusion_figure",
    "embedding_figure",
    "evaluator_figures",
    "heat_figure",
    "prefix_figure",
    "series_figure",
    "size_figure",
    "spectrum_figure",
    "training_curves",
]
