"""Which resume checkpoints can be trusted, by a listing: for whoever must know it without loading torch."""

import logging

from beats_ray.data.storage import Place

logger = logging.getLogger(__name__)


def sound_steps(folder: Place) -> list[int]:
    """Steps with a committed checkpoint whose files are all there in their size, oldest first: one listing of sizes.

    A warning for each that is damaged. Content is verified by whoever restores it.
    """
    sizes = folder.sizes(recursive=True)
    steps = []
    for name in sizes:
        step, _, file = name.partition("/")
        if file == "commit.json" and step.startswith("step-"):
            problem = _find_missing(folder / step, sizes)
            if problem is None:
                steps.append(int(step.removeprefix("step-")))
            else:
                logger.warning("checkpoint %s is damaged (%s); using the one before", step, problem)
    return sorted(steps)


def newest_sound_step(folder: Place) -> int:
    """The step that a run goes on from; 0 where there is no sound checkpoint."""
    return max(sound_steps(folder), default=0)


def _find_missing(checkpoint: Place, sizes: dict[str, int]) -> str | None:
    try:
        files = (checkpoint / "commit.json").read_json()["files"]
    except (FileNotFoundError, ValueError):
        return "commit.json does not read"
    for name, expected in files.items():
        found = sizes.get(f"{checkpoint.name}/{name}")
        if found != expected["bytes"]:
            return f"{name} has {found} bytes, not the {expected['bytes']} committed" if found else f"{name} is missing"
    return None
