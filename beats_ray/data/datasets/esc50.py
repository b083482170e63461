"""ESC-50's layout: `audio/FOLD-SOURCE-TAKE-TARGET.wav` (or another format) and `meta/esc50.csv`.

Columns used: filename, fold, target, category. Subsets keep their targets (ESC-10 has 0, 1, 10, 11, ...): the
vocabulary is the categories present in the order of their targets, a label id the place in it.
"""

import re
from collections import Counter, defaultdict
from pathlib import PurePosixPath

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.source import MAX_FOLD, Quarantined, SourceClip, SourceListing, list_audio, read_csv, require_folder
from beats_ray.data.storage import Place

COLUMNS = ("filename", "fold", "target", "category")
NAME_PATTERN = re.compile(r"(\d+)-[^-]+-[^-]+-(\d+)\.\w+")  # fold and target as the file's own name has them


def check_layout(source: Place) -> None:
    """UserError, one line, unless `source` is a folder with `meta/esc50.csv` and audio files."""
    require_folder(source)
    if not (source / "meta/esc50.csv").exists():
        raise UserError(f"source={source.uri}: no meta/esc50.csv; give a folder in ESC-50's layout")
    if not (source / "audio").list():
        raise UserError(f"source={source.uri}: audio/ holds no files; give a folder in ESC-50's layout")


def read_esc50(source: Place, _layout: LayoutSettings) -> SourceListing:
    """All clips of the folder; rows and files that do not fit are quarantined, a malformed table is a UserError."""
    check_layout(source)
    sizes = list_audio(source / "audio")
    rows: dict[str, dict[str, str]] = {}
    bad: dict[str, tuple[str, str]] = {}
    for line, row in read_csv(source / "meta/esc50.csv", COLUMNS):
        name = row["filename"]
        fault = ("duplicate-row", f"line {line} names it again") if name in rows else _fault(line, row, name in sizes)
        rows.setdefault(name, row)
        if fault:
            bad.setdefault(name, fault)
    bad |= {name: ("unlabelled", "not in meta/esc50.csv") for name in sizes if name not in rows}
    category_of = _usual_categories([row for name, row in rows.items() if name not in bad])
    seen: set[str] = set()
    for name, row in rows.items():
        if name in bad:
            continue
        if category_of.get(int(row["target"])) != row["category"]:
            bad[name] = ("mislabelled", f"target {row['target']} does not go with category {row['category']!r}")
        elif PurePosixPath(name).stem in seen:
            bad[name] = ("duplicate-id", f"another file is called {PurePosixPath(name).stem} too")
        seen.add(PurePosixPath(name).stem)
    good = {name: row for name, row in rows.items() if name not in bad}
    targets = sorted({int(row["target"]) for row in good.values()})
    clips = [
        SourceClip(
            path=f"audio/{name}",
            clip_id=PurePosixPath(name).stem,
            bytes=sizes[name],
            labels=(targets.index(int(row["target"])),),
            fold=int(row["fold"]),
        )
        for name, row in good.items()
    ]
    quarantined = [Quarantined(f"audio/{name}", *fault, bytes=sizes.get(name, 0)) for name, fault in bad.items()]
    return SourceListing(tuple(category_of[target] for target in targets), False, clips, quarantined)


def _fault(line: int, row: dict[str, str], is_there: bool) -> tuple[str, str] | None:
    if not is_there:
        return "missing-file", f"line {line} names it, audio/ does not hold it"
    if not (row["fold"].isdecimal() and 1 <= int(row["fold"]) <= MAX_FOLD):
        return "bad-fold", f"line {line}: fold={row['fold']!r} is not a whole number from 1 to {MAX_FOLD}"
    if not row["target"].isdecimal():
        return "bad-target", f"line {line}: target={row['target']!r} is not a whole number from 0"
    if not row["category"]:
        return "bad-category", f"line {line}: category is empty"
    own = NAME_PATTERN.fullmatch(row["filename"])
    for column, value in zip(("fold", "target"), own.groups() if own else (), strict=False):
        if int(value) != int(row[column]):
            return "mislabelled", f"line {line}: {column}={row[column]}, but the file's name says {value}"
    return None


def _usual_categories(rows: list[dict[str, str]]) -> dict[int, str]:
    """The category that most rows give for each target; a category belongs to one target only."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[int(row["target"])][row["category"]] += 1
    usual: dict[int, str] = {}
    pairs = [(target, name) for target, names in counts.items() for name in names]
    for target, name in sorted(pairs, key=lambda pair: (-counts[pair[0]][pair[1]], pair)):
        if target not in usual and name not in usual.values():
            usual[target] = name
    return usual
