"""What a run does about faults that it sees coming or can step over: notices, poisoned batches, full memory."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from beats_ray.config import TrainSettings, UserError
from beats_ray.data.storage import Place, StorageError, with_retries
from beats_ray.train.context import WorkerContext
from beats_ray.train.leftovers import ATTEMPTS_FILE

logger = logging.getLogger(__name__)

STOP_REQUEST = "stop-requested.json"
"""Below a run's output: whoever is about to end the run writes it, and the run makes a checkpoint."""
POLL_SECONDS = 2.0
LOOK_SECONDS = 3.0
"""About how long workers train between two looks at what they have noticed."""
THREAD_NAME = "stop request"


class TrainingDiverged(UserError):
    """Loss or gradient are no finite numbers any more; the settings or the clips must change."""


class Notices:
    """Notices that the run or one of its nodes is about to end: Ray's drain of a node, or a stop request on storage.

    Workers must agree on what they have noticed, and for that they wait for one another. So they look every few seconds
    only, and say with a number that a step sums up over them anyway whether it is time: however much slower steps have
    become, a look is two steps late at most.
    """

    def __init__(self, output: Place, context: WorkerContext) -> None:
        self._request = output / STOP_REQUEST
        self._context = context
        self._requested = threading.Event()
        self._closed = threading.Event()
        self._heeded = False
        self._last_look = self._last_step = time.perf_counter()
        if context.rank == 0:
            threading.Thread(target=self._poll, daemon=True, name=THREAD_NAME).start()

    def due(self) -> bool:
        """Whether it is time to look after the step that begins now, in this worker's view; asked before each step."""
        now = time.perf_counter()
        step_seconds, self._last_step = now - self._last_step, now
        return now + step_seconds - self._last_look >= LOOK_SECONDS

    def new(self, due: bool) -> bool:
        """Whether there is a notice that was not there before, the same on every worker; all ask after every step.

        due: whether any worker thinks that it is time to look.
        """
        if not due:
            return False
        noticed = any(self._context.gather(self._context.notice() or self._requested.is_set()))
        self._last_look = time.perf_counter()
        new = noticed and not self._heeded
        self._heeded = noticed
        return new

    def close(self) -> None:
        """Ends the look at storage."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(POLL_SECONDS) and not self._requested.is_set():
            try:
                if self._request.exists():
                    self._requested.set()
            except StorageError as error:  # the next look will tell
                logger.debug("no look at %s: %s", self._request.uri, error)


class SkippedSteps:
    """The steps that were left out because of a loss or gradient that is no finite number."""

    def __init__(self, output: Place, settings: TrainSettings, context: WorkerContext, first_step: int = 0) -> None:
        """Every rank must call it. first_step: where the run goes on; what was written beyond it is dropped."""
        self._file = output / "skipped-steps.json"
        self._most = settings.max_bad_steps
        self._retry_seconds = settings.storage_retry_seconds
        self._context = context
        self._records: list[dict[str, Any]] = context.gather(self._read(first_step) if context.rank == 0 else None)[0]
        self.count = 0
        """How many came in a row up to now."""
        while self.count < len(self._records) and self._records[-1 - self.count]["step"] == first_step - self.count:
            self.count += 1

    @property
    def total(self) -> int:
        """How many there were in the run up to now."""
        return len(self._records)

    def record(self, step: int, clip_ids: list[tuple[str, ...]]) -> None:
        """Writes down a step and its clips; all ranks must call it. TrainingDiverged where there are too many."""
        clips = sorted({clip for rank in self._context.gather(clip_ids) for part in rank for clip in part})
        self.count += 1
        self._records.append({"step": step + 1, "clips": clips})
        if self._context.rank == 0:
            logger.warning("step %d skipped: loss or gradient is no finite number; its clips: %s", step + 1, clips)
            self._write(self._records)
        if self.count >= self._most:
            shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
            raise TrainingDiverged(
                f"train.max_bad_steps={self._most}: loss or gradient was no finite number in {self.count} steps in a "
                f"row, the last one step {step + 1} with clips {shown} (all are in {self._file.uri}); lower "
                "train.learning_rate, or take these clips out"
            )

    def _read(self, first_step: int) -> list[dict[str, Any]]:
        try:
            found = with_retries(self._file.read_json, self._retry_seconds)
        except FileNotFoundError:
            return []
        kept = [record for record in found if record["step"] <= first_step]
        if kept != found:
            self._write(kept)
        return kept

    def _write(self, records: list[dict[str, Any]]) -> None:
        with_retries(lambda: self._file.write_json(records), self._retry_seconds)


def is_bad_step(losses_are_finite: bool, loss_scale_can_fall: bool) -> bool:
    """Whether a step that was left out is the fault of its clips or settings, and counts.

    In fp16 finite losses often have a gradient that is too large at the loss scale of the moment; the next step has a
    lower one. A loss is not scaled before it is computed, so one that is no finite number counts always.
    """
    return not (losses_are_finite and loss_scale_can_fall)


def count_recoveries(output: Place, context: WorkerContext, retry_seconds: float) -> int:
    """How often the run began again before this time, whatever for; every rank must call it, once.

    `attempts.json` counts, and says what this attempt holds of a Ray cluster (`leftovers.py`).
    """
    attempts, holders = 0, context.gather(context.holder)
    if context.rank == 0:
        place = output / ATTEMPTS_FILE
        with suppress(FileNotFoundError):
            attempts = int(with_retries(place.read_json, retry_seconds)["attempts"])
        with_retries(lambda: place.write_json({"attempts": attempts + 1, "workers": holders}), retry_seconds)
    return int(context.gather(attempts)[0])


@contextmanager
def explained(settings: TrainSettings, context: WorkerContext) -> Iterator[None]:
    """Says what to change where the block runs out of memory, and who waited where a collective operation hangs."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(_advice(settings)) from error
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        raise RuntimeError(
            f"worker {context.rank} of {context.world_size} waited longer than train.collective_timeout_seconds="
            f"{settings.collective_timeout_seconds:g} for the others; one of them hangs or is gone, and the run goes "
            "on from its last checkpoint"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Of a device or of the host, whose allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice(settings: TrainSettings) -> str:
    ways = [
        "train.activation_checkpointing=true",
        "a higher train.zero_stage with several workers",
        "train.offload_optimizer=true (with zero_stage=3 train.offload_parameters=true too)",
    ]
    size = settings.micro_batch_size
    if size > 1:
        share = settings.global_batch_size * size // settings.clips_at_once  # a multiple of any size that is allowed
        smaller = max(fewer for fewer in range(1, size // 2 + 1) if share % fewer == 0)
        ways.insert(0, f"train.micro_batch_size={smaller} (the global batch stays)")
    ways[-1] = f"or {ways[-1]}"
    return f"out of memory with train.micro_batch_size={size}, zero_stage={settings.zero_stage}: use {', '.join(ways)}"
