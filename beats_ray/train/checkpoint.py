"""Resume checkpoints on storage: written beside training, committed before they count, verified before they are used.

Layout: `FOLDER/step-00001000/` holds one `rank-00000-TOKEN.safetensors` for each worker, its size and SHA-256 in a
`.json` of the same name, and, written last, `commit.json` with those of all. A folder without `commit.json` is an
interrupted save and is never used; one whose files do not match it is damaged, and the checkpoint before it is taken.
Where the content alone is damaged, `commit.json` becomes `commit.damaged.json`.

The state does not depend on the ZeRO stage or the number of workers (see `Engine.snapshot`): any run goes on from it.
Nothing random is saved, since the loop draws everything from (seed, step, place).
"""

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from beats_ray.data.storage import Place, with_retries
from beats_ray.train.committed import look_through, mark_damaged, newest_sound_step
from beats_ray.train.context import WorkerContext
from beats_ray.train.engine import Engine

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 900.0
"""How long the first worker waits for the files of the others; then the save counts as failed."""
POLL_SECONDS = 0.1
THREAD_NAME = "checkpoint upload"

ResultT = TypeVar("ResultT")


class ResumeCheckpoints:
    """Saves and restores the engine below one folder. Every worker of a run has one and calls it alike.

    keep: the newest checkpoints that stay; the one with the best score stays too.
    """

    def __init__(self, folder: Place, context: WorkerContext, keep: int, retry_seconds: float = 0.0) -> None:
        self.folder = folder
        self.blocked_seconds = 0.0
        """How long saves have held training up so far."""
        self._context = context
        self._keep = keep
        self._retry_seconds = retry_seconds
        self._token: str = context.gather(uuid.uuid4().hex[:8])[0]  # tells this attempt's files from an earlier one's
        self._upload: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, engine: Engine, step: int, score: float | None = None) -> None:
        """Copies the state after `step` optimizer steps and writes it in the background. All ranks must call it.

        score: how good the model is, larger is better. Raises what the save before failed with, if it did.
        """
        begun = time.perf_counter()
        self.wait()
        state = engine.snapshot()
        self._upload = threading.Thread(target=self._write, args=(state, step, score), daemon=True, name=THREAD_NAME)
        self._upload.start()
        self.blocked_seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Returns once the last save is on storage (and, on rank 0, committed); raises what it failed with."""
        if self._upload is not None:
            self._upload.join()
            self._upload = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, engine: Engine) -> int:
        """Loads the newest sound checkpoint and returns its step; 0 where there is none. All ranks must call it."""
        context = self._context
        while True:
            newest = self._retried(partial(newest_sound_step, self.folder)) if context.rank == 0 else 0
            step = context.gather(newest)[0]
            if not step:
                return 0
            state, problem = self._read_twice(step)
            problems = [found for found in context.gather(problem) if found]
            if not problems:
                engine.restore(state)
                return int(step)
            if context.rank == 0:  # whoever looks next, a data stream among them, must not count it
                self._retried(partial(mark_damaged, self._at(step)))
                logger.warning("checkpoint step %d is damaged (%s); using the one before", step, problems[0])

    def _read_twice(self, step: int) -> tuple[dict[str, torch.Tensor], str | None]:
        """As `_read`, with a second look before the files are blamed for what one reading of them may have garbled."""
        state, problem = self._retried(partial(_read, self._at(step)))
        return (state, None) if problem is None else self._retried(partial(_read, self._at(step)))

    def _at(self, step: int) -> Place:
        return self.folder / f"step-{step:08d}"

    # --- in the background --------------------------------------------------------------------------------------------

    def _write(self, state: dict[str, torch.Tensor], step: int, score: float | None) -> None:
        from safetensors.torch import save

        try:
            name = f"rank-{self._context.rank:05d}-{self._token}"
            data = save(state)
            state.clear()
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            target = self._at(step)
            self._retried(lambda: (target / f"{name}.safetensors").write_bytes(data))
            self._retried(lambda: (target / f"{name}.json").write_json(entry))
            if self._context.rank == 0:
                self._commit(target, step, score)
        except BaseException as error:  # noqa: BLE001  # the next call of `save` or `wait` raises it
            self._failure = error

    def _retried(self, work: Callable[[], ResultT]) -> ResultT:
        return with_retries(work, self._retry_seconds)

    def _commit(self, target: Place, step: int, score: float | None) -> None:
        """Waits for the files of all ranks, commits them and drops what is not kept."""
        names = [f"rank-{rank:05d}-{self._token}" for rank in range(self._context.world_size)]
        wanted = {f"{name}.json" for name in names}
        deadline = time.monotonic() + COMMIT_SECONDS
        while not wanted <= set(self._retried(target.sizes)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{target.uri}: the other workers' files did not come within {COMMIT_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        files = {f"{name}.safetensors": self._retried((target / f"{name}.json").read_json) for name in names}
        commit = {"step": step, "world_size": len(names), "score": score, "files": files}
        self._retried(lambda: (target / "commit.json").write_json(commit))
        self._retried(self._drop_old)

    def _drop_old(self) -> None:
        """Deletes what the newest sound checkpoints replace, interrupted saves and damaged checkpoints among it.

        A damaged one never takes the place of a sound one.
        """
        found = look_through(self.folder)
        if not found.sound:  # nothing replaces anything where even the newest was damaged at once
            return
        scores = {step: (self._at(step) / "commit.json").read_json().get("score") for step in found.sound}
        best = max((step for step in found.sound if scores[step] is not None), key=lambda step: scores[step], default=0)
        kept = found.sound[-self._keep :]
        outdated = [step for step in found.sound + found.damaged if step < kept[0] and step != best]
        for step in outdated + [step for step in found.interrupted if step < kept[-1]]:
            self._at(step).delete()


def _read(source: Place) -> tuple[dict[str, torch.Tensor], str | None]:
    """The whole state of a committed checkpoint, and what is wrong with it or None."""
    from safetensors.torch import load

    state: dict[str, torch.Tensor] = {}
    for name, expected in (source / "commit.json").read_json()["files"].items():
        try:
            data = (source / name).read_bytes()
        except FileNotFoundError:
            return {}, f"{name} is missing"
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            return {}, f"{name} has {len(data)} bytes and another checksum than the {expected['bytes']} bytes committed"
        state |= load(data)
    return state, None
