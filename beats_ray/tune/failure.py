"""Why a trial failed: recorded beside it, said in the leaderboard, and met again without training it again.

A trial that fails does not end the sweep. What it raised is in `failure.json`; a process that was killed could write
none, and Ray's word for it stands in its place. Ray Tune tries a trial again whatever ended it; only where a process or
its node was lost, and so wrote nothing, is that of use.
"""

import traceback
from typing import Any

from beats_ray.config import UserError
from beats_ray.data.storage import Place, StorageError
from beats_ray.errors import find_user_error

FAILURE_FILE = "failure.json"
DIVERGED, SETTINGS = "diverged", "settings"
REASON_LENGTH = 300


def record_failure(place: Place, error: Exception, attempt: str = "") -> None:
    """Writes kind, reason and trace of what ended a trial. attempt: at the sweep, as it was started this time."""
    record = {**describe_failure(error), "attempt": attempt, "trace": "".join(traceback.format_exception(error))}
    (place / FAILURE_FILE).write_json(record)


def describe_failure(error: BaseException) -> dict[str, str]:
    """kind: diverged, out of memory, settings, storage, process lost or exception; reason: one line."""
    from beats_ray.train.faults import TrainingDiverged, is_out_of_memory

    mistake = find_user_error(error)
    lines = [line for line in str(mistake or error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(mistake, TrainingDiverged):
        kind = DIVERGED
    elif any(isinstance(one, Exception) and is_out_of_memory(one) for one in (error, (mistake or error).__cause__)):
        kind = "out of memory"
    elif mistake is not None:
        kind = "storage" if isinstance(mistake, StorageError) else SETTINGS
    elif "ActorDied" in type(error).__name__ or "ActorDied" in str(error):
        kind, lines = "process lost", ["the trial's process ended without a word, killed or out of memory"]
    else:
        kind, lines = "exception", [f"{type(error).__name__}: {lines[0]}"]
    return {"kind": kind, "reason": lines[0].strip()[:REASON_LENGTH]}


def known_failure(place: Place, attempt: str = "") -> None:
    """Raises what the trial failed with before: in this attempt at the sweep, or where another try would end alike.

    Forgets what may have passed since an earlier attempt.
    """
    found = read_failure(place)
    kind, reason = found.get("kind"), str(found.get("reason"))
    if kind == DIVERGED:
        from beats_ray.train.faults import TrainingDiverged

        raise TrainingDiverged(reason)
    if kind == SETTINGS:
        raise UserError(reason)
    if attempt and found.get("attempt") == attempt:
        raise RuntimeError(reason)
    if found:
        (place / FAILURE_FILE).delete()


def read_failure(place: Place) -> dict[str, Any]:
    """What `record_failure` wrote; nothing where the trial wrote none."""
    try:
        found: dict[str, Any] = (place / FAILURE_FILE).read_json()
    except FileNotFoundError:
        return {}
    return found


def failure_of(place: Place, error: BaseException | str | None) -> dict[str, str]:
    """Kind and reason of a failed trial for the leaderboard: its own record, else what Ray knows."""
    found = read_failure(place)
    if found:
        return {"kind": str(found["kind"]), "reason": str(found["reason"])}
    if isinstance(error, BaseException):
        return describe_failure(error)
    return describe_failure(UserError(error) if error is None else RuntimeError(error))
