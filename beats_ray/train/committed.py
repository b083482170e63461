"""Which resume checkpoints can be trusted, by a listing: for whoever must know it without loading torch."""

import logging
from dataclasses import dataclass
from functools import cache

from beats_ray.data.storage import Place

logger = logging.getLogger(__name__)

COMMIT = "commit.json"
DAMAGED = "commit.damaged.json"
"""What `commit.json` is called where the files have their sizes but not their checksums."""


@dataclass(frozen=True)
class CheckpointSteps:
    """The steps of all checkpoints below a folder, each list oldest first."""

    sound: list[int]
    """Committed, and its files are all there in their size. Content is verified by whoever restores it."""
    damaged: list[int]
    """Committed once, and not what was committed any more."""
    interrupted: list[int]
    """Not committed: the save goes on, or its run ended."""


def look_through(folder: Place) -> CheckpointSteps:
    """The checkpoints below `folder`: one listing of sizes. A warning, once, for each whose files are not all there."""
    sizes = folder.sizes(recursive=True)
    found = CheckpointSteps([], [], [])
    for name in sorted({path.partition("/")[0] for path in sizes if path.startswith("step-")}):
        step = int(name.removeprefix("step-"))
        if f"{name}/{COMMIT}" not in sizes:
            (found.damaged if f"{name}/{DAMAGED}" in sizes else found.interrupted).append(step)
            continue
        problem = _find_missing(folder / name, sizes)
        (found.damaged if problem else found.sound).append(step)
        if problem:
            _warn_once(f"checkpoint {(folder / name).uri} is damaged ({problem}); using the one before")
    return found


def sound_steps(folder: Place) -> list[int]:
    """Steps with a committed checkpoint whose files are all there in their size, oldest first."""
    return look_through(folder).sound


def newest_sound_step(folder: Place) -> int:
    """The step that a run goes on from; 0 where there is no sound checkpoint."""
    return max(sound_steps(folder), default=0)


def mark_damaged(checkpoint: Place) -> None:
    """Takes the commit back and keeps what it said, for whoever wants to know what has become of the files."""
    try:
        commit = (checkpoint / COMMIT).read_json()
    except FileNotFoundError:  # an earlier try had come as far as this
        return
    (checkpoint / DAMAGED).write_json(commit)
    (checkpoint / COMMIT).delete()


@cache  # the same folder is looked through at every save
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _find_missing(checkpoint: Place, sizes: dict[str, int]) -> str | None:
    try:
        files = (checkpoint / COMMIT).read_json()["files"]
    except (FileNotFoundError, ValueError):
        return f"{COMMIT} does not read"
    for name, expected in files.items():
        found = sizes.get(f"{checkpoint.name}/{name}")
        if found != expected["bytes"]:
            return f"{name} has {found} bytes, not the {expected['bytes']} committed" if found else f"{name} is missing"
    return None
