"""What `evaluate`, `cross-validate` and the probes of a run have judged: found below the run's folder and read.

RUN/iteration-K/probe/            the frozen probe of each iteration, each clip judged by the folds it is not in
RUN/evaluations/NAME/...          `beats-ray evaluate ... output=RUN/evaluations/NAME`, or any folder one or two below
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from beats_ray.data.storage import Place
from beats_ray.reporting.reading import csv_rows, read_part

RESULT_FILE, SUMMARY_FILE = "evaluation.json", "cross_validation.json"
DEPTH = 2
SKIPPED = re.compile(r"iteration-\d+.*|fold-\d+|model|data|checkpoints|trials|tune|ray-train|tensorboard|.*\.\w+")
MAX_DETAILED = 6
"""Judgements of which classes and confusions are read."""
MAX_PREDICTIONS_BYTES = 32 * 2**20
"""Of predictions.csv, which has a line for every clip: a larger one is left alone."""


@dataclass(frozen=True)
class Judgement:
    """The files of one judgement; empty where a file is absent."""

    name: str
    result: dict[str, Any]
    """evaluation.json; empty of a cross-validation's summary."""
    summary: dict[str, Any] = field(default_factory=dict)
    """cross_validation.json."""
    per_class: list[dict[str, str]] = field(default_factory=list)
    confusion: list[dict[str, str]] = field(default_factory=list)
    """A row for each true class: its name in the first column, then clips by the class they were taken for."""
    mistakes: list[dict[str, str]] = field(default_factory=list)
    """Rows of predictions.csv whose first class is wrong, the surest first."""
    is_probe: bool = False


def read_judgements(run: Place, stages: Iterable[Sequence[tuple[str, Place]]], problems: list[str]) -> list[Judgement]:
    """The newest judgement of each stage, then what lies below the folder; details of the first MAX_DETAILED.

    stages: names and folders of each judging stage, the newest iteration first.
    """
    found: list[Judgement] = []
    folders: list[tuple[str, Place]] = []
    for newest_first in stages:
        for name, place in newest_first:
            if (place / "confusion.csv").exists():
                result = read_part(place / RESULT_FILE, problems) or {}
                found.append(_detailed(name, place, result, problems, is_probe=True))
                break
            if (place / SUMMARY_FILE).exists():
                folders += _folders(place, name, DEPTH, name)
                break
    for name, place in [*folders, *_folders(run, run.name, DEPTH)]:
        summary = read_part(place / SUMMARY_FILE, problems)
        if summary:
            found.append(Judgement(name, {}, summary))
        result = read_part(place / RESULT_FILE, problems)
        if result and "kind" in result:  # that of several data sets only sums up what lies below
            is_detailed = sum(bool(one.per_class) for one in found) < MAX_DETAILED
            found.append(_detailed(name, place, result, problems) if is_detailed else Judgement(name, result))
    return found


def _detailed(
    name: str, place: Place, result: dict[str, Any], problems: list[str], is_probe: bool = False
) -> Judgement:
    per_class, confusion = (
        read_part(place / f"{file}.csv", problems, csv_rows) or [] for file in ("per_class", "confusion")
    )
    return Judgement(name, result, {}, per_class, confusion, _mistakes(place, problems), is_probe)


def _mistakes(place: Place, problems: list[str]) -> list[dict[str, str]]:
    def parse(file: Place) -> list[dict[str, str]]:
        if file.size_bytes() > MAX_PREDICTIONS_BYTES:
            return []
        return [row for row in csv_rows(file) if row.get("first_is_right") == "0" and row.get("labels")]

    return read_part(place / "predictions.csv", problems, parse) or []


def _folders(place: Place, name: str, depth: int, within: str = "") -> Iterator[tuple[str, Place]]:
    """The folder itself and what may hold judgements below it; names below are relative to it, after `within`."""
    yield name, place
    if depth:
        for entry in place.list():
            if not SKIPPED.fullmatch(entry.name):
                inner = f"{within}/{entry.name}" if within else entry.name
                yield from _folders(entry, inner, depth - 1, inner)
