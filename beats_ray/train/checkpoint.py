"""Resume checkpoints on storage: committed before they count, verified before they are used.

Layout: `FOLDER/step-00001000/` holds every rank's files and, written last, `commit.json` with the size and SHA-256 of
each. A folder without `commit.json` is an interrupted save and is never used; one whose files do not match it is
damaged, and the checkpoint before it is taken instead.
"""

import hashlib
import logging
import tempfile
from pathlib import Path

from beats_ray.data.storage import Place
from beats_ray.train.context import WorkerContext
from beats_ray.train.engine import Engine

logger = logging.getLogger(__name__)


def committed_steps(folder: Place) -> list[int]:
    """Steps with a committed checkpoint, oldest first."""
    return sorted(
        int(place.name.removeprefix("step-"))
        for place in folder.list()
        if place.name.startswith("step-") and (place / "commit.json").exists()
    )


class ResumeCheckpoints:
    """Saves and restores the engine and a small state of the loop's below one folder."""

    def __init__(self, folder: Place, context: WorkerContext, keep: int) -> None:
        self.folder = folder
        self._context = context
        self._keep = keep

    def save(self, engine: Engine, step: int) -> None:
        """Writes and commits the state after `step` optimizer steps, then drops the oldest. All ranks must call it."""
        target = self.folder / f"step-{step:08d}"
        with tempfile.TemporaryDirectory(prefix="beats-ray-save-") as scratch:
            engine.save(Path(scratch), {"step": step})
            files = {}
            for source in sorted(Path(scratch).rglob("*")):
                if source.is_file():
                    data = source.read_bytes()
                    name = source.relative_to(scratch).as_posix()
                    (target / name).write_bytes(data)
                    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        every_rank = self._context.gather(files)  # all files are up before the commit
        if self._context.rank == 0:
            commit = {
                "step": step,
                "world_size": self._context.world_size,
                "files": dict(sorted(_union(every_rank).items())),
            }
            (target / "commit.json").write_json(commit)
            for old in committed_steps(self.folder)[: -self._keep]:
                (self.folder / f"step-{old:08d}").delete()

    def restore(self, engine: Engine) -> int:
        """Loads the newest sound checkpoint and returns its step; 0 where there is none. All ranks must call it."""
        with tempfile.TemporaryDirectory(prefix="beats-ray-restore-") as scratch:
            for step in reversed(committed_steps(self.folder)):
                local = Path(scratch) / str(step)
                problem = fetch_verified(self.folder / f"step-{step:08d}", local)
                problems = [found for found in self._context.gather(problem) if found]
                if problems:
                    if self._context.rank == 0:  # whoever looks next, a data stream among them, must not count it
                        damaged = self.folder / f"step-{step:08d}" / "commit.json"
                        damaged.delete()
                    logger.warning("checkpoint step %d is damaged (%s); using the one before", step, problems[0])
                    continue
                return int(engine.load(local)["step"])
        return 0


def fetch_verified(source: Place, target: Path) -> str | None:
    """Downloads a committed checkpoint; returns what is wrong with it, or None when every checksum holds."""
    for name, expected in (source / "commit.json").read_json()["files"].items():
        try:
            data = (source / name).read_bytes()
        except FileNotFoundError:
            return f"{name} is missing"
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            return f"{name} has {len(data)} bytes and another checksum than the {expected['bytes']} bytes committed"
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return None


def _union(parts: list[dict[str, dict[str, object]]]) -> dict[str, dict[str, object]]:
    merged: dict[str, dict[str, object]] = {}
    for part in parts:
        merged |= part
    return merged
