"""A table of recordings: `path` and, where there are any, `labels`, `split` and `fold`.

    path,labels,fold
    birds/one.flac,blackbird;rain,1

The table is `layout.table` (an address, or a path below the source), else the source itself where that is a .csv or
.tsv file, else `metadata.csv` in it. Paths are relative to the source, or to the folder that the table lies in where
the source is the table.
"""

from pathlib import PurePosixPath

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.source import (
    MAX_FOLD,
    LabelledClip,
    Quarantined,
    SourceClip,
    SourceListing,
    add_labelled,
    clip_ids,
    is_audio,
    list_files,
    parse_fold,
    read_csv,
    source_root,
)
from beats_ray.data.storage import Place, open_place


def read_csv_table(source: Place, layout: LayoutSettings) -> SourceListing:
    """Every recording that the table names; paths are below `source_root(source)`."""
    root = source_root(source)
    table = find_table(source, layout)
    sizes = list_files(root)
    rows: dict[str, dict[str, str]] = {}
    folds: dict[str, int] = {}
    bad: dict[str, tuple[str, str]] = {}
    for line, row in read_csv(table, ("path",)):
        name, fold = str(PurePosixPath(row["path"])), parse_fold(row.get("fold", ""))
        if name in rows:
            bad.setdefault(name, ("duplicate-row", f"line {line} names it again"))
        elif name not in sizes:
            bad[name] = "missing-file", f"line {line} names it, the source does not hold it"
        elif fold is None:
            bad[name] = "bad-fold", f"line {line}: fold={row['fold']!r} is not a whole number from 0 to {MAX_FOLD}"
        else:
            folds[name] = fold
        rows.setdefault(name, row)
    listing = SourceListing(
        quarantined=[Quarantined(name, *fault, sizes.get(name, 0)) for name, fault in bad.items()],
        skipped=[
            Quarantined(name, "not-in-table", f"{table.name} does not name it", size)
            for name, size in sizes.items()
            if is_audio(name) and name not in rows
        ],
    )
    good = {name: row for name, row in rows.items() if name not in bad}
    ids = clip_ids(good)
    clips: list[LabelledClip] = []
    for name, row in good.items():
        clip = SourceClip(name, ids[name], sizes[name], fold=folds[name], split=row.get("split", ""))
        clips.append((clip, _split_labels(row.get("labels", ""), layout.label_separator)))
    add_labelled(listing, clips, f"{table.uri}: column 'labels'")
    if not listing.num_files:
        raise UserError(f"{table.uri}: names no recordings; add a row for each")
    return listing


def find_table(source: Place, layout: LayoutSettings) -> Place:
    """The table that names the recordings. UserError where there is none."""
    if layout.table:
        places = [open_place(layout.table)]
        if "://" not in layout.table and not layout.table.startswith("/"):
            places.insert(0, source_root(source) / layout.table)
        found = next((table for table in places if table.exists()), None)
        if found is None:
            tried = " or ".join(table.uri for table in places)
            raise UserError(f"layout.table={layout.table}: there is no {tried}; check the path")
        return found
    if not source.exists():
        raise UserError(f"source={source.uri}: does not exist; give a table, or a folder that holds metadata.csv")
    if not source.is_dir():
        if not source.name.lower().endswith((".csv", ".tsv")):
            raise UserError(f"source={source.uri}: is no .csv or .tsv file; give one, or a folder with metadata.csv")
        return source
    if not (source / "metadata.csv").exists():
        raise UserError(f"source={source.uri}: no metadata.csv; give the table itself, or set layout.table")
    return source / "metadata.csv"


def _split_labels(value: str, separator: str) -> tuple[str, ...]:
    labels = value.split(separator) if separator else [value]
    return tuple(label.strip() for label in labels if label.strip())
