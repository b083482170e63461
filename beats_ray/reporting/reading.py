"""Files of a run, read without trust: an absent one is None, a damaged one is noted among the problems and is None too.

    problems: list[str] = []
    values = read_part(place / "progress.json", problems)

An object store that cannot be reached is no damage: StorageError goes through.
"""

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from beats_ray.data.storage import Place, StorageError, read_table

LONGEST_PROBLEM = 200
"""Characters of what is told of a damaged file."""


def read_part(place: Place, problems: list[str], parse: Callable[[Place], Any] | None = None) -> Any:
    """A file of the run, by default one JSON object; None where it is absent, or is added to the problems.

    `parse` raises ValueError or OSError for what it cannot use.
    """
    try:
        return (parse or json_object)(place)
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (ValueError, OSError) as error:
        problems.append(f"{place.uri}: {' '.join(str(error).split())[:LONGEST_PROBLEM]}")
        return None


def json_object(place: Place) -> dict[str, Any]:
    """A JSON object; anything else that is JSON counts as an empty one."""
    return as_dict(place.read_json())


def json_list(place: Place) -> list[Any]:
    """A JSON list; anything else that is JSON counts as an empty one."""
    value = place.read_json()
    return value if isinstance(value, list) else []


def json_lines(place: Place) -> list[dict[str, Any]]:
    """One JSON object a line. A last line that is not whole, being written or cut by a kill, is left out."""
    text = place.read_bytes().decode()
    whole, _, last = text.rpartition("\n")
    records = [json.loads(line) for line in whole.splitlines() if line.strip()]
    with contextlib.suppress(ValueError):
        records.append(json.loads(last))
    return dicts_of(records)


def csv_rows(place: Place) -> list[dict[str, str]]:
    """Rows of a CSV file by the names in its first line. ValueError for rows of different lengths."""
    rows = list(csv.DictReader(io.StringIO(place.read_bytes().decode())))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("rows of different lengths")
    return rows


def parquet_rows(place: Place) -> list[dict[str, Any]]:
    """Rows of a small Parquet file."""
    return list(read_table(place).to_pylist())


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def dicts_of(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list; none where it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
