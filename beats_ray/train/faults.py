"""What a run does about faults that it sees coming or can step over: notices, poisoned batches, full memory."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from beats_ray.config import TrainSettings, UserError
from beats_ray.data.storage import Place, StorageError, with_retries
from beats_ray.train.context import WorkerContext

logger = logging.getLogger(__name__)

STOP_REQUEST = "stop-requested.json"
"""Below a run's output: whoever is about to end the run writes it, and the run makes a checkpoint."""
POLL_SECONDS = 2.0


class TrainingDiverged(UserError):
    """Loss or gradient are no finite numbers any more; the settings or the clips must change."""


class Notices:
    """Notices that the run or one of its nodes is about to end: Ray's drain of a node, or a stop request on storage."""

    def __init__(self, output: Place, context: WorkerContext) -> None:
        self._request = output / STOP_REQUEST
        self._context = context
        self._requested = threading.Event()
        self._heeded = False
        if context.rank == 0:
            threading.Thread(target=self._poll, daemon=True).start()

    def new(self) -> bool:
        """Whether there is a notice that was not there before, the same on every worker; all must ask."""
        noticed = any(self._context.gather(self._context.notice() or self._requested.is_set()))
        new = noticed and not self._heeded
        self._heeded = noticed
        return new

    def _poll(self) -> None:
        while not self._requested.wait(POLL_SECONDS):
            try:
                if self._request.exists():
                    self._requested.set()
            except StorageError as error:  # the next look will tell
                logger.debug("no look at %s: %s", self._request.uri, error)


class SkippedSteps:
    """The steps that were left out because of a loss or gradient that is no finite number."""

    def __init__(self, output: Place, most_in_a_row: int, context: WorkerContext) -> None:
        self._file = output / "skipped-steps.json"
        self._most = most_in_a_row
        self._context = context
        self._records: list[dict[str, object]] = []
        self.count = 0
        """How many came in a row up to now."""

    @property
    def total(self) -> int:
        """How many there were since this process began."""
        return len(self._records)

    def record(self, step: int, clip_ids: list[tuple[str, ...]]) -> None:
        """Writes down a step and its clips; all ranks must call it. TrainingDiverged where there are too many."""
        clips = sorted({clip for rank in self._context.gather(clip_ids) for part in rank for clip in part})
        self.count += 1
        self._records.append({"step": step + 1, "clips": clips})
        if self._context.rank == 0:
            logger.warning("step %d skipped: loss or gradient is no finite number; its clips: %s", step + 1, clips)
            self._file.write_json(self._records)
        if self.count >= self._most:
            shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
            raise TrainingDiverged(
                f"train.max_bad_steps={self._most}: loss or gradient was no finite number in {self.count} steps in a "
                f"row, the last one step {step + 1} with clips {shown} (all are in {self._file.uri}); lower "
                "train.learning_rate, or take these clips out"
            )


def count_recoveries(output: Place, context: WorkerContext, retry_seconds: float) -> int:
    """How often the run began again before this time, whatever for; every rank must call it, once."""
    attempts = 0
    if context.rank == 0:
        place = output / "attempts.json"
        with suppress(FileNotFoundError):
            attempts = int(with_retries(place.read_json, retry_seconds)["attempts"])
        with_retries(lambda: place.write_json({"attempts": attempts + 1}), retry_seconds)
    return int(context.gather(attempts)[0])


@contextmanager
def explained(settings: TrainSettings, context: WorkerContext) -> Iterator[None]:
    """Says what to change where the block runs out of memory, and who waited where a collective operation hangs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = max(1, settings.micro_batch_size // 2)
        raise UserError(
            f"out of memory with train.micro_batch_size={settings.micro_batch_size}, "
            f"zero_stage={settings.zero_stage}: use train.micro_batch_size={half} (the global batch stays), "
            "train.activation_checkpointing=true, a higher train.zero_stage with several workers, or "
            "train.offload_optimizer=true (and train.offload_parameters=true with zero_stage=3)"
        ) from error
    except RuntimeError as error:
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        raise RuntimeError(
            f"worker {context.rank} of {context.world_size} waited longer than train.collective_timeout_seconds="
            f"{settings.collective_timeout_seconds:g} for the others; one of them hangs or is gone, and the run goes "
            "on from its last checkpoint"
        ) from error
