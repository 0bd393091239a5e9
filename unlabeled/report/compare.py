"""Compares runs side by side, from their report.json alone: ``unlabeled report A B C``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from unlabeled.eval.base import Estimate, Measure
from unlabeled.eval.environment import versions
from unlabeled.eval.intervals import less, wilson
from unlabeled.report.compare_figures import accuracy_figure, online_figure
from unlabeled.report.compare_sentences import pair_sentences
from unlabeled.report.document import clean, read_report
from unlabeled.report.page import duration, environment
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.files import write_atomically, writing
from unlabeled.ssl.train.run_folder import current

SCHEMA = 2

_WHERE = ("report/report.json", "report.json")
_BASELINES = ("pixels", "random")
_SAME = {"train_images": "training images", "test_images": "test images", "classes": "classes"}
"""Keys of ``results`` that must be equal for a fair comparison → their names in messages."""


@dataclass(frozen=True)
class Run:
    """The report of one run."""

    label: str
    """Name of the run in tables, unique in a comparison."""
    document: Mapping[str, Any]
    folder: Path = Path()
    """The run folder, or the folder of a report that lies elsewhere."""

    @property
    def results(self) -> Mapping[str, Any]:
        return self.document.get("results") or {}

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted name → value of the resolved settings, except the folders of the run."""
        try:
            values = yaml.safe_load(self.document["run"].get("config") or "") or {}
        except yaml.YAMLError:
            values = {}
        # `current` maps settings of older versions to today's names, so that only real differences are listed
        flat = _flat(current(values)) if isinstance(values, Mapping) else {}
        return {name: value for name, value in flat.items() if name not in ("out", "target")}

    def metrics(self, encoder: str = "backbone") -> Mapping[str, float | None]:
        """Metric → value of one encoder; empty without results."""
        found: Mapping[str, float | None] = self.results.get("encoders", {}).get(encoder, {}).get("metrics", {})
        return found

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of all tables of the report."""
        return [*self.document["comparison"], *_section_rows(self.document)]

    def estimate(self, metric: str, measure: Measure, encoder: str = "backbone") -> Estimate | None:
        """The value and its interval as reported (NaN: no interval); None if it was not measured."""
        for row in self.rows:
            if row["metric"] == metric and encoder in row["values"]:
                found = row["values"][encoder]
                return None if found["value"] is None else Estimate(*(_number(found[end]) for end in _ENDS))
        # not in any table of the report: compute Wilson's interval, as the report would
        value = self.metrics(encoder).get(metric)
        if value is None:
            return None
        known = measure.unit == "accuracy" and 0 <= value <= 1
        return Estimate(value, *(wilson(value, self.results["test_images"]) if known else (math.nan, math.nan)))


_ENDS = ("value", "low", "high")
"""Keys of an estimate in report.json, in the order of `Estimate`'s fields."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads the reports in run folders, report folders or report.json files, and gives each a unique label.

    Raises DataError for a path without a readable report.
    """
    found = []
    for path in paths:
        file = next((path / name for name in _WHERE if (path / name).is_file()), path)
        if not file.is_file():
            raise DataError(f"report: {_missing_reason(path)}")
        found.append((_folder_of(file).name or "run", read_report(file), file))
    counts = Counter(label for label, _, _ in found)
    runs = []
    for position, (label, document, file) in enumerate(found, start=1):
        _check(document, file)
        # folders of the same name are numbered in the order given
        runs.append(Run(clean(label if counts[label] == 1 else f"{position}: {label}"), document, _folder_of(file)))
    return runs


def _missing_reason(path: Path) -> str:
    """Why there is no report at `path`, and what to do about it."""
    if not path.exists():
        return f"{path} does not exist; give the folder of a run or a report.json"
    if inside := len(reported(path)):
        return f"{path} holds no report but {inside} run{'s' * (inside > 1)}; did you mean {path}/*?"
    return f"{path} contains no report.json; write it with `unlabeled evaluate {path}`"


def reported(folder: Path) -> set[Path]:
    """The subfolders of `folder` that contain a report."""
    return {file.parents[len(Path(name).parts) - 1] for name in _WHERE for file in folder.glob(f"*/{name}")}


def _folder_of(file: Path) -> Path:
    """The run folder that a report.json belongs to."""
    folder = file.resolve().parent
    return folder.parent if folder.name == "report" else folder


def _check(document: Mapping[str, Any], file: Path) -> None:
    """Raises DataError for JSON that has the schema number of a report but not its structure."""
    results = document.get("results")
    sections = [document.get("run"), {} if results is None else results]
    if all(isinstance(section, dict) for section in sections) and isinstance(document.get("comparison"), list):
        encoders = {"backbone": {"metrics": {}}} if results is None else results.get("encoders")
        if isinstance(encoders, dict) and isinstance(encoders.get("backbone", {}).get("metrics"), dict):
            return
    raise DataError(f"report: {file} is not the report of a run; write it again with `unlabeled evaluate`")


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the contents of ``compare.json``.

    Fractions are 0..1, times in seconds; differences are relative to the first run.

    ``schema``    2; increases when a key changes its meaning or is removed.
    ``runs``      ``label`` and, from the report, ``task``, ``backbone``, ``data``, ``parameters``, ``epochs``,
                  ``images``, ``seconds``, ``evaluation_seconds``, ``train_images``, ``test_images``, ``summary`` (its
                  first sentence).
    ``fair``      whether all runs were evaluated on the same data; otherwise there are no differences and no best run.
    ``differs``   one sentence for each way in which the data differ.
    ``measures``  one entry per metric, the headline metrics first: ``metric``, ``label``, ``unit``, ``better``,
                  ``headline`` and, for each run in order, ``values``, ``pixels``, ``random``, ``differences``
                  (``value``, ``low``, ``high``, or null; null for plain numbers) and ``best`` (its interval overlaps
                  no other run's).
    ``settings``  ``name`` and ``values`` of the settings that differ between runs.
    ``online``    for each run, [epoch, kNN accuracy] during training.
    """
    differs = _differs(runs)
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "runs": [_facts(run) for run in runs],
        "fair": not differs,
        "differs": differs,
        "measures": [_measured(runs, metric, measure, not differs) for metric, measure in _measures(runs)],
        "settings": _settings(runs),
        "online": [(run.document.get("training") or {}).get("online", []) for run in runs],
    }


def write_comparison(runs: Sequence[Run], folder: Path, title: str | None = None) -> Path:
    """Writes ``compare.{json,md,html}`` into `folder` and returns the path of the HTML file.

    `title` is that of the page; it defaults to the labels of the runs.

    Raises DataError for damaged reports, CheckpointError when the files cannot be written.
    """
    try:
        document = compare_runs(runs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"report: a report.json is damaged ({error!r}); write it again with `unlabeled evaluate`"
        ) from None
    title = title or ", ".join(run.label for run in runs)
    sentences = pair_sentences(document) if len(runs) == 2 else []
    context = {
        **document,
        "title": title,
        "sentences": sentences,
        "facts": _fact_rows(document),
        "figures": _figures(document),
    }
    texts = {
        "json": json.dumps(document, indent=1) + "\n",
        "md": environment(html=False).get_template("compare.md.j2").render(context),
        "html": environment(html=True).get_template("compare.html.j2").render(context),
    }
    with writing(f"out: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            write_atomically(folder / f"compare.{kind}", text)
    return folder / "compare.html"


def _section_rows(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of the evaluators' sections; none in a report of schema 1 without evaluators."""
    return [row for section in document.get("evaluators") or [] for row in section.get("rows", [])]


def _measures(runs: Sequence[Run]) -> list[tuple[str, Measure]]:
    """(metric, its `Measure`) of everything in the runs' tables, the headline metrics first."""
    found: dict[str, Measure] = {}
    for run in runs:
        rows = {row["metric"]: row for row in run.rows}
        for metric in run.metrics():
            if (row := rows.get(metric)) is not None:
                found[metric] = Measure(row["label"], row.get("unit", "accuracy"), row.get("better", "higher"))
    quoted = {metric for run in runs for metric in run.results.get("headline", [])}
    return sorted(found.items(), key=lambda pair: pair[0] not in quoted)


def _measured(runs: Sequence[Run], metric: str, measure: Measure, fair: bool) -> dict[str, Any]:
    values = [run.estimate(metric, measure) for run in runs]
    baselines = {name: [_plain(run.estimate(metric, measure, name)) for run in runs] for name in _BASELINES}
    # plain numbers such as an effective rank have no scale on which a difference means something
    first = values[0] if fair and measure.unit != "number" else None
    return {
        "metric": metric,
        "label": measure.label,
        "unit": measure.unit,
        "better": measure.better,
        "headline": any(metric in run.results.get("headline", []) for run in runs),
        "values": [_plain(value) for value in values],
        **baselines,
        "differences": [
            _plain(less(value, first)) if position > 0 and value is not None and first is not None else None
            for position, value in enumerate(values)
        ],
        "best": _clear_best(values, measure.better) if fair else [False] * len(values),
    }


def _clear_best(values: Sequence[Estimate | None], better: str | None) -> list[bool]:
    """True for the run with an interval entirely on the better side of all others; for none without intervals."""
    known = [value for value in values if value is not None]
    if better is None or len(known) < 2 or any(math.isnan(value.low) for value in known):
        return [False] * len(values)
    # flip the axis where lower is better, so that the best always has the highest interval
    sign = 1 if better == "higher" else -1
    ends = [sorted((sign * value.low, sign * value.high)) for value in known]
    top = max(range(len(ends)), key=lambda position: ends[position][0])
    clear = all(ends[position][1] < ends[top][0] for position in range(len(ends)) if position != top)
    return [clear and value is known[top] for value in values]


def _differs(runs: Sequence[Run]) -> list[str]:
    """One line for each way in which the evaluation data differ."""
    lines = []
    for key, name in _SAME.items():
        values = [run.results.get(key) for run in runs]
        if any(value != values[0] for value in values[1:]):
            shown = [len(value) if isinstance(value, list) else value for value in values]
            lines.append(_line(name, [f"{one:,}" if one is not None else "none" for one in shown], runs))
    data = [_evaluated_on(run) for run in runs]
    if len({name for name in data if name is not None}) > 1:  # reports without settings do not count as different
        lines.append(_line("evaluation data", [name or "unknown" for name in data], runs))
    return lines


def _line(name: str, values: Sequence[str], runs: Sequence[Run]) -> str:
    """``test images: 1,000 (a, b); 500 (c)``."""
    distinct = dict.fromkeys(values)
    if len(distinct) == 1:  # lists of the same length
        return f"{name}: same number, but not the same ones"
    return f"{name}: " + "; ".join(
        f"{one} ({', '.join(run.label for run, value in zip(runs, values, strict=True) if value == one)})"
        for one in distinct
    )


def _evaluated_on(run: Run) -> str | None:
    """The dataset set for evaluation, else the run's own; None if the settings do not name it."""
    settings = run.settings
    section = "evaluate.data" if "evaluate.data.name" in settings else "data"
    values = [settings.get(f"{section}.{name}") for name in ("name", "dataset", "path", "test_path", "limit")]
    return " ".join(str(value) for value in values if value is not None) or None


def _facts(run: Run) -> dict[str, Any]:
    known = {
        name: run.document["run"].get(name)
        for name in ("task", "backbone", "data", "parameters", "epochs", "images", "seconds")
    }
    return {
        "label": run.label,
        **known,
        "evaluation_seconds": run.results.get("seconds"),
        "train_images": run.results.get("train_images"),
        "test_images": run.results.get("test_images"),
        "summary": (run.document.get("summary") or {}).get("text", ""),
    }


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that differ between runs; none for a single run."""
    found = [run.settings for run in runs]
    # keep the order of the first run, but group names of one section that only later runs have
    every = list(dict.fromkeys(name for settings in found for name in settings))
    sections = [name.partition(".")[0] for name in every]
    names = sorted(every, key=lambda name: sections.index(name.partition(".")[0]))
    rows = [{"name": name, "values": [settings.get(name) for settings in found]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
        # through JSON, so that YAML's dates and tuples compare equal and can be written to compare.json
        flat |= inner or {f"{prefix}{name}": json.loads(json.dumps(value, default=str))}
    return flat


def _fact_rows(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, one value per run) for the table of runs; rows without any value are left out."""

    def million(value: Any) -> str:
        return f"{value / 1e6:.2f} million"

    formats: dict[str, tuple[str, Any]] = {
        "Task": ("task", str), "Backbone": ("backbone", str), "Parameters": ("parameters", million),
        "Data": ("data", str), "Epochs": ("epochs", "{:g}".format), "Images seen": ("images", "{:,}".format),
        "Pretraining time": ("seconds", duration), "Evaluation time": ("evaluation_seconds", duration),
        "Training images": ("train_images", "{:,}".format), "Test images": ("test_images", "{:,}".format),
    }  # fmt: skip
    rows = [
        (title, ["–" if run[name] is None else formatted(run[name]) for run in document["runs"]])
        for title, (name, formatted) in formats.items()
    ]
    return [(title, values) for title, values in rows if set(values) != {"–"}]


def _figures(document: Mapping[str, Any]) -> dict[str, Markup]:
    labels = [run["label"] for run in document["runs"]]
    figures = {}
    quoted = [row for row in document["measures"] if row["headline"] and row["unit"] == "accuracy"]
    if quoted:
        figures["accuracy"] = accuracy_figure(labels, quoted)
    if any(len(curve) > 1 for curve in document["online"]):
        figures["online"] = online_figure(labels, document["online"])
    return figures


def _plain(value: Estimate | None) -> dict[str, float | None] | None:
    """An estimate as JSON; NaN limits become null."""
    if value is None:
        return None
    ends = {"value": value.value, "low": value.low, "high": value.high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
