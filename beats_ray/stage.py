"""A stage: one unit of work with a folder of its own, done once.

`stage.json` says what the stage is (its identity: settings, and keys of what it was made from), whether it is complete,
and how long it took. A complete stage is never redone; one that was interrupted is run again, and its work resumes by
itself. The fingerprint of the identity is the stage's key.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from beats_ray.config import UserError, fingerprint
from beats_ray.data.storage import Place, StorageError, with_retries

RETRY_SECONDS = 300.0
"""How long `stage.json` is tried again while the object store fails: as long as what training itself writes."""

STAGE_FILE = "stage.json"


def read_stage(output: Place) -> dict[str, Any]:
    """What the folder's `stage.json` says; nothing where there is none."""
    try:
        found: dict[str, Any] = with_retries((output / STAGE_FILE).read_json, RETRY_SECONDS)
    except FileNotFoundError:
        return {}
    return found


def is_complete(output: Place) -> bool:
    """True when the stage in this folder has been finished."""
    return bool(read_stage(output).get("status") == "complete")


def reopen(output: Place) -> None:
    """Makes a complete stage one that was interrupted: there is more for it to do."""
    _write(output, read_stage(output) | {"status": "running"})


def run_stage(output: Place, identity: dict[str, Any], work: Callable[[], object]) -> bool:
    """Does `work` unless the folder already holds its result; returns whether it was done now.

    Raises UserError when the folder holds a stage of another identity, naming the first difference.
    """
    found = check_output(output, identity)
    if found.get("status") == "complete":
        return False
    record = {
        "status": "running",
        "fingerprint": fingerprint(identity),
        "config": identity,
        "seconds": found.get("seconds", 0.0),
    }
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


def check_output(output: Place, identity: dict[str, Any]) -> dict[str, Any]:
    """What the folder's `stage.json` says, nothing where there is none. UserError for a stage of another identity."""
    found = read_stage(output)
    if found.get("status") == "moved":
        raise UserError(
            f"{output.uri}: was being moved aside by `beats-ray iterate`; run that again, or choose another output"
        )
    if found and found.get("fingerprint") != fingerprint(identity):
        raise UserError(
            f"{output.uri} belongs to a run of another config: {first_difference(found.get('config', {}), identity)}; "
            "choose another output or remove it"
        )
    return found


def first_difference(old: Any, new: Any) -> str:
    """The first setting in which two identities differ, as `name is old there and new now`."""
    name, there, now = next(iter(differences(old, new)), ("stage.json", old, new))
    return f"{name} is {there!r} there and {now!r} now"


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Every (dotted name, old value, new value) in which two identities differ; inputs come after the settings."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(name, old, new)]
    found = []
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not name and key == "inputs", key)):
        found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return found


def _write(output: Place, record: dict[str, Any], retry_seconds: float = RETRY_SECONDS) -> None:
    with_retries(lambda: (output / STAGE_FILE).write_json(record), retry_seconds)
