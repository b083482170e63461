"""Recordings inside Parquet files: one, or all below a folder, such as other tools' data sets are published as.

`layout.audio_column` holds the bytes of an audio file each, plain or as the struct {bytes, path}; `layout.label_column`
a number, a text or a list of either; `clip_id` or `id`, `split` and `fold` are used where they are. Listing reads those
small columns only, never the audio.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.archives import parquet_errors
from beats_ray.data.decode import BadAudio
from beats_ray.data.source import (
    MAX_FOLD,
    LabelledClip,
    Quarantined,
    SourceClip,
    SourceListing,
    add_labelled,
    list_containers,
    parse_fold,
    source_root,
)
from beats_ray.data.storage import Place

FILES_AT_ONCE = 16
Row = LabelledClip | Quarantined


def read_parquet(source: Place, layout: LayoutSettings) -> SourceListing:
    """Every row as a clip, with its label where there is a label column. UserError where the columns do not fit."""
    root = source_root(source)
    names = list_containers(source, ".parquet")
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        rows: list[Row] = list(
            chain.from_iterable(threads.map(lambda name: list(_read_rows(root, name, layout)), names))
        )
    listing = SourceListing(quarantined=[row for row in rows if isinstance(row, Quarantined)])
    clips = [row for row in rows if not isinstance(row, Quarantined)]
    add_labelled(listing, clips, f"layout.label_column={layout.label_column}")
    if not rows:
        raise UserError(f"source={source.uri}: its Parquet files have no rows; give files that hold recordings")
    return listing


def _read_rows(root: Place, name: str, layout: LayoutSettings) -> Iterator[Row]:
    place, column = root / name, layout.audio_column
    try:
        with parquet_errors(place), pq.ParquetFile(place.path, filesystem=place.filesystem) as file:
            schema, metadata = file.schema_arrow, file.metadata
            _check_columns(place, schema, layout)
            wanted = {layout.label_column, "clip_id", "id", "fold", "split"} & set(schema.names) - {column}
            rows = file.read(columns=sorted(wanted)).to_pylist() if wanted else [{}] * metadata.num_rows
    except BadAudio as error:
        raise UserError(f"{place.uri}: damaged, or no Parquet file ({error.detail}); fetch it again") from None
    number = 0
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        for place_in_group in range(metadata.row_group(group).num_rows):
            row = rows[number]
            path = f"{name}!/{group}/{place_in_group}/{column}"
            mean_size = size // metadata.row_group(group).num_rows
            clip_id = row.get("clip_id", row.get("id"))
            fold = parse_fold("" if row.get("fold") is None else str(row["fold"]))
            if fold is None:
                detail = f"fold={row['fold']!r} is not a whole number from 0 to {MAX_FOLD}"
                yield Quarantined(path, "bad-fold", detail, mean_size)
            else:
                own_id = f"{name.removesuffix('.parquet')}/{number:06d}" if clip_id in (None, "") else str(clip_id)
                clip = SourceClip(path, own_id, mean_size, fold=fold, split=str(row.get("split") or ""))
                yield clip, _as_labels(row.get(layout.label_column))
            number += 1


def _check_columns(place: Place, schema: pa.Schema, layout: LayoutSettings) -> None:
    found = ", ".join(schema.names)
    if layout.audio_column not in schema.names:
        raise UserError(f"layout.audio_column={layout.audio_column}: {place.uri} has no such column; found: {found}")
    kind = schema.field(layout.audio_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        raise UserError(
            f"layout.audio_column={layout.audio_column}: holds {kind} in {place.uri}, not files' bytes; found: {found}"
        )
    if layout.label_column not in schema.names:
        return
    kind = label = schema.field(layout.label_column).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        label = kind.value_type
    if pa.types.is_dictionary(label):
        label = label.value_type
    if not any(is_kind(label) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        raise UserError(
            f"layout.label_column={layout.label_column}: holds {kind} in {place.uri}, neither whole numbers nor text; "
            "choose another column"
        )


def _as_labels(value: int | str | list[int | str] | None) -> tuple[int | str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(label for label in values if label is not None and label != "")
