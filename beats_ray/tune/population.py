"""Weights that go from a good member of a population to a bad one (Jaderberg et al. 2017), as our own checkpoints.

Ray's scheduler hands the bad member what the good one last reported as its checkpoint. That is a file of a few bytes
that names the good member's run and a step; the weights stay where the run has committed them (`train/checkpoint.py`),
and `follow` copies them from there, checked by their committed sizes. Moments and averages come along, so training goes
on as the good member's would, with the changed settings.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beats_ray.data.storage import Place, open_place
from beats_ray.train.committed import COMMIT, sound_steps

POINTER_FILE = "checkpoint.json"
FOLLOWED_FILE = "followed.json"
KEPT_CHECKPOINTS = 4
"""Of each member: the one that is copied may be some validations old by the time it is asked for."""
COMMIT_SECONDS = 120.0
POLL_SECONDS = 0.05


@contextmanager
def pointer(run: Place, step: int) -> Iterator[Any]:
    """A checkpoint for Tune that names the run's own one of `step`, once that is committed."""
    from ray import tune

    wait_for(run, step)
    with tempfile.TemporaryDirectory(prefix="beats-ray-pointer-") as folder:
        (Path(folder) / POINTER_FILE).write_text(json.dumps({"run": run.uri, "step": step}))
        yield tune.Checkpoint.from_directory(folder)


def read_pointer(checkpoint: Any) -> dict[str, Any]:
    """{"run": uri, "step": step} of a checkpoint that `pointer` made."""
    with checkpoint.as_directory() as folder:
        found: dict[str, Any] = json.loads((Path(folder) / POINTER_FILE).read_text())
    return found


def follow(found: dict[str, Any], run: Place) -> int | None:
    """Puts the checkpoint that is pointed at in place of this run's; returns its step, None where nothing is to do.

    Nothing is where the pointer is this run's own, and where it has been followed before: the run was interrupted
    afterwards, and its own checkpoints are newer. Where the good member has dropped the one that is pointed at, its
    next newer one serves.
    """
    source = open_place(found["run"])
    if source.uri == run.uri:
        return None
    try:
        if (run / FOLLOWED_FILE).read_json() == found:
            return None
    except FileNotFoundError:
        pass
    step = next((step for step in sound_steps(source / "checkpoints") if step >= found["step"]), None)
    if step is None:
        raise RuntimeError(f"{source.uri} has no checkpoint of step {found['step']} or later any more")
    (run / "checkpoints").delete()
    name = f"step-{step:08d}"
    target = run / "checkpoints" / name
    for file in sorted((source / "checkpoints" / name).sizes(), key=lambda file: file == COMMIT):  # what counts: last
        (source / "checkpoints" / name / file).copy_to(target / file)
    (run / FOLLOWED_FILE).write_json(found)
    return step


def wait_for(run: Place, step: int) -> None:
    """Returns once the run's checkpoint of `step` is committed, which it is in the background."""
    deadline = time.monotonic() + COMMIT_SECONDS
    while step not in sound_steps(run / "checkpoints"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.uri}: the checkpoint of step {step} was not written in {COMMIT_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
