"""Pieces that the report's sections are made of: sections, tables, code blocks, and figures as text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from beats_ray.reporting.run_folder import Run, Stage, number

TITLES = {
    "tokenizer": "tokenizer",
    "labels": "labels",
    "pretrain": "pre-training",
    "probe": "frozen probe",
    "sweep": "fine-tuning sweep",
}


@dataclass
class Grid:
    """A table. `text` names the columns that are not numbers."""

    columns: list[str]
    rows: list[dict[str, Any]]
    """{"cells": [...], "kind": CSS class or ""}"""
    text: tuple[str, ...] = ()
    title: str = ""


@dataclass
class Section:
    """A part of the report, in the order: notes, charts, tables, code, what is absent."""

    title: str
    notes: list[str] = field(default_factory=list)
    charts: list[Markup] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    code: list[dict[str, Any]] = field(default_factory=list)
    absent: str = ""


def stage_title(index: int, name: str) -> str:
    """A stage as readers know it: `2 pre-training`, `untrained probe`."""
    if index == 0:
        return {"pretrain": "untrained encoder", "probe": "untrained probe"}.get(name, name)
    return f"{index} {TITLES[name]}"


def stages_of(run: Run, name: str, complete: bool = False) -> Iterator[tuple[int, Stage]]:
    """That stage of every iteration; only complete ones if asked."""
    for index, stages in sorted(run.iterations.items()):
        if not complete or stages[name].status == "complete":
            yield index, stages[name]


def best_trial(stage: Stage) -> dict[str, Any]:
    """The best trial of a sweep; empty where there is none yet."""
    best = stage.result.get("best")
    return best if isinstance(best, dict) else {}


def present(*charts: Markup) -> list[Markup]:
    """The charts that have something to show."""
    return [chart for chart in charts if chart]


def spread(value: float | None, error: float | None = None, signed: bool = False) -> str:
    """`0.797 ± 0.020`, or `-` where the value is absent."""
    if value is None:
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


def figure(value: Any, decimals: int = 3) -> str:
    """A number with so many decimals, or `-` for anything else."""
    finite = number(value)
    return "-" if finite is None else f"{finite:,.{decimals}f}"


def duration(seconds: float) -> str:
    """`8.4 s`, `2:51` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return (
        f"{whole // 60}:{whole % 60:02}" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    )
