"""What a report says about the run itself, apart from its evidence."""

from __future__ import annotations

from dataclasses import dataclass, field

from unlabeled.eval.environment import versions


@dataclass(frozen=True)
class RunSummary:
    """Facts of one run; None where they are not known, for instance of weights trained elsewhere."""

    title: str
    backbone: str
    """timm name, with what was changed of it."""
    data: str
    """In words: source and path or data set."""
    parameters: int
    """Of the backbone."""
    device: str
    seed: int
    config: str = ""
    """The resolved settings, YAML."""
    task: str | None = None
    input_size: tuple[int, int] | None = None
    """(h, w) in pixels."""
    epochs: float | None = None
    steps: int | None = None
    images: int | None = None
    """Pictures seen, repeats counted."""
    seconds: float | None = None
    """Wall clock of the pretraining."""
    date: str | None = None
    """When it ended, as people write it."""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
