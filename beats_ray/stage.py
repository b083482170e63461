"""A stage: one unit of work with a folder of its own, done once.

`stage.json` says what the stage is (the settings it was run with), whether it is complete, and how long it took. A
complete stage is never redone; one that was interrupted is run again, and its work resumes by itself.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from beats_ray.config import UserError, fingerprint
from beats_ray.data.storage import Place, StorageError, with_retries

RETRY_SECONDS = 300.0
"""How long `stage.json` is tried again while the object store fails: as long as what training itself writes."""


def is_complete(output: Place) -> bool:
    """True when the stage in this folder has been finished."""
    return bool(_read(output).get("status") == "complete")


def run_stage(output: Place, settings: dict[str, Any], work: Callable[[], None]) -> bool:
    """Does `work` unless the folder already holds its result; returns whether it was done now.

    Raises UserError when the folder holds a stage of other settings, naming the first that differs.
    """
    mark = fingerprint(settings)
    found = check_output(output, settings)
    if found.get("status") == "complete":
        return False
    record = {"status": "running", "fingerprint": mark, "config": settings, "seconds": found.get("seconds", 0.0)}
    _write(output, record)
    started = time.monotonic()
    try:
        work()
    except BaseException:
        record["seconds"] += time.monotonic() - started
        with suppress(StorageError):  # why the work ended is what must be heard of, and soon
            _write(output, record, retry_seconds=0.0)
        raise
    seconds = record["seconds"] + time.monotonic() - started
    _write(output, record | {"status": "complete", "seconds": seconds})
    return True


def check_output(output: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder's `stage.json` says, nothing where there is none. UserError for a stage of other settings."""
    found = _read(output)
    if found and found.get("fingerprint") != fingerprint(settings):
        raise UserError(
            f"{output.uri} belongs to a run of another config: {first_difference(found.get('config', {}), settings)}; "
            "choose another output or remove it"
        )
    return found


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """The first setting in which two resolved configs differ, as `name: old value there, new value now`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"{name} is {old!r} there and {new!r} now"


def _read(output: Place) -> dict[str, Any]:
    try:
        found: dict[str, Any] = with_retries((output / "stage.json").read_json, RETRY_SECONDS)
    except FileNotFoundError:
        return {}
    return found


def _write(output: Place, record: dict[str, Any], retry_seconds: float = RETRY_SECONDS) -> None:
    with_retries(lambda: (output / "stage.json").write_json(record), retry_seconds)
