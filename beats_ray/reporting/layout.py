"""What the report is made of, before it is HTML, Markdown or JSON: sections, tables, clips, figures as text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from beats_ray.reporting.charts import Chart
from beats_ray.reporting.reading import number
from beats_ray.reporting.run_folder import Run, Stage

TITLES = {
    "tokenizer": "tokenizer",
    "labels": "labels",
    "pretrain": "pre-training",
    "probe": "frozen probe",
    "sweep": "fine-tuning sweep",
    "finetune": "fine-tuning",
    "cross-validate": "cross-validation",
}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    cells: Sequence[str]
    kind: str = ""
    """How it stands out: `best`, `baseline`, `bad`, or not at all."""
    shades: Sequence[float] = ()
    """0 to 1 for each cell where the table is a matrix: how strongly it is shaded."""


@dataclass
class Grid:
    """A table. `text` names the columns that are not numbers."""

    columns: list[str]
    rows: list[Row]
    title: str
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class AudioClip:
    """An excerpt that can be played within the page."""

    caption: str
    clip_id: str
    data: bytes
    """MP3."""


@dataclass(frozen=True)
class Code:
    """Text to copy, or settings to look up, which are folded away."""

    title: str
    text: str
    folded: bool = False


@dataclass
class Section:
    """A part of the report, in the order: notes, charts, tables, clips, code, what is absent."""

    title: str
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    clips: list[AudioClip] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)
    absent: str = ""

    @property
    def anchor(self) -> str:
        """Its name in an address: `learning-curves`."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def iteration_title(run: Run, index: int) -> str:
    """An iteration as readers know it: `untrained`, `iteration 2`; of a stage's own folder the folder's name."""
    if run.is_single_stage:
        return run.name
    return f"iteration {index}" if index else "untrained"


def stage_title(run: Run, index: int, stage: Stage) -> str:
    """A stage as readers know it: `2 pre-training`, `2 esc50: cross-validation`, `untrained probe`."""
    title = TITLES.get(stage.kind, stage.kind)
    title = f"{stage.task}: {title}" if stage.task else title
    if run.is_single_stage:
        return title
    if index == 0:
        return {"pretrain": "untrained encoder", "probe": "untrained probe"}.get(stage.name, f"untrained {title}")
    return f"{index} {title}"


def stages_of(run: Run, kind: str, complete: bool = False) -> Iterator[tuple[int, Stage]]:
    """The stages of that kind of every iteration, those of tasks too; only complete ones if asked."""
    for index, stages in sorted(run.iterations.items()):
        for stage in stages.values():
            if stage.kind == kind and (not complete or stage.status == "complete"):
                yield index, stage


def best_trial(stage: Stage) -> dict[str, Any]:
    """The best trial of a sweep; empty where there is none yet."""
    best = stage.result.get("best")
    return best if isinstance(best, dict) else {}


def spread(value: float | None, error: float | None = None, signed: bool = False) -> str:
    """`0.797 ± 0.020`, or `-` where the value is absent."""
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


def interval_text(low: float | None, high: float | None) -> str:
    """`-0.010 to +0.260`, or `-` where an end is absent."""
    return "-" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"


def figure(value: Any, decimals: int = 3) -> str:
    """A number with so many decimals, or `-` for anything else."""
    finite = number(value)
    return "-" if finite is None else f"{finite:,.{decimals}f}"


def percent(value: Any, decimals: int = 1) -> str:
    """A fraction as per cent, or `-` for anything else."""
    finite = number(value)
    return "-" if finite is None else f"{finite:.{decimals}%}"


def duration(seconds: float) -> str:
    """`8.4 s`, `2:51` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return (
        f"{whole // 60}:{whole % 60:02}" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    )


def as_yaml(value: Any) -> str:
    """Settings as they stand in a config file."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
