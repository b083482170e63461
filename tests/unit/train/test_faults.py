"""What a run does about faults: advice, notices, retention, uploads that fail, and what may change between attempts."""

import itertools
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from beats_ray.config import FinetuneConfig, IterateConfig, PretrainConfig, TrainSettings, UserError, validate
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.identity import run_identity
from beats_ray.train import faults
from beats_ray.train.checkpoint import ResumeCheckpoints
from beats_ray.train.committed import sound_steps
from beats_ray.train.context import WorkerContext, single_process_context
from beats_ray.train.faults import LOOK_SECONDS, STOP_REQUEST, Notices, count_recoveries, explained

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CONTEXT = single_process_context(lambda _step, _metrics: None)


class FakeEngine:
    """Something whose state is one number; what the checkpoints need of an engine."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {"value": self.value.clone()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["value"]


def save_steps(folder: Place, scores: dict[int, float | None], keep: int = 2) -> ResumeCheckpoints:
    checkpoints = ResumeCheckpoints(folder, CONTEXT, keep)
    for step, score in scores.items():
        checkpoints.save(FakeEngine(float(step)), step, score)  # type: ignore[arg-type]
    checkpoints.wait()
    return checkpoints


def test_the_newest_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    folder = open_place(str(tmp_path))
    save_steps(folder, {10: 0.5, 20: 0.9, 30: 0.7, 40: None, 50: 0.6})
    assert sound_steps(folder) == [20, 40, 50]


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    folder = open_place(str(tmp_path))
    save_steps(folder, {10: None, 20: None})
    (part,) = (tmp_path / "step-00000020").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    save_steps(folder, {30: None})
    assert sound_steps(folder) == [10, 30]
    engine = FakeEngine(0.0)
    assert ResumeCheckpoints(folder, CONTEXT, 2).restore(engine) == 30  # type: ignore[arg-type]
    assert float(engine.value) == 30.0


class Member(WorkerContext):
    """One of two workers; all of an attempt agree on its token."""

    def gather(self, value: object) -> list[object]:
        return [self.report(0, {}) if isinstance(value, str) else value] * 2  # type: ignore[func-returns-value]


def member(rank: int, attempt: str, folder: Place) -> ResumeCheckpoints:
    return ResumeCheckpoints(folder, Member(rank, 2, torch.device("cpu"), lambda _step, _metrics: attempt), 2)  # type: ignore[arg-type, return-value]


def test_files_of_an_attempt_that_was_cut_off_are_never_mixed_with_a_later_one(tmp_path: Path) -> None:
    folder = open_place(str(tmp_path))
    cut_off = member(1, "first", folder)
    cut_off.save(FakeEngine(-1.0), 10)  # type: ignore[arg-type]  # its rank 0 died before it wrote anything
    cut_off.wait()
    second = [member(rank, "second", folder) for rank in (0, 1)]
    second[0].save(FakeEngine(2.0), 10)  # type: ignore[arg-type]
    time.sleep(1)
    assert sound_steps(folder) == []
    second[1].save(FakeEngine(2.0), 10)  # type: ignore[arg-type]
    for one in second:
        one.wait()
    assert sound_steps(folder) == [10]
    files = (folder / "step-00000010" / "commit.json").read_json()["files"]
    assert sorted(files) == ["rank-00000-second.safetensors", "rank-00001-second.safetensors"]


def test_a_save_does_not_wait_for_storage_and_the_next_one_raises_what_it_failed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow_then_gone(_place: Place, _data: bytes) -> None:
        go_on.wait(30)
        raise StorageError("the bucket is gone")

    monkeypatch.setattr(Place, "write_bytes", slow_then_gone)
    checkpoints = ResumeCheckpoints(open_place(str(tmp_path)), CONTEXT, 2)
    checkpoints.save(FakeEngine(1.0), 1)  # type: ignore[arg-type]
    assert checkpoints.blocked_seconds < 5
    go_on.set()
    with pytest.raises(StorageError, match="bucket is gone"):
        checkpoints.save(FakeEngine(2.0), 2)  # type: ignore[arg-type]


def test_a_stop_request_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(faults, "POLL_SECONDS", 0.1)
    output = open_place(str(tmp_path))
    notices = Notices(output, CONTEXT)
    assert not notices.new()
    (output / STOP_REQUEST).write_json({})
    deadline = time.monotonic() + 20
    while not (noticed := notices.new()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert noticed
    assert not notices.new()
    notices.close()


class Looks(WorkerContext):
    """One of two workers; the other one takes three times as long for a step."""

    def gather(self, value: tuple[bool, float]) -> list[object]:  # type: ignore[override]
        self.report(0, {})
        return [value, (value[0], 3 * value[1])]


def test_workers_look_at_notices_every_few_seconds_whatever_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks = [0.0], []
    monkeypatch.setattr(faults.time, "perf_counter", lambda: now[0])
    context = Looks(1, 2, torch.device("cpu"), lambda _step, _metrics: looks.append(now[0]))
    notices = Notices(open_place(str(tmp_path)), context)
    for seconds, steps in ((10.0, 5), (0.01, 20_000), (0.03, 2_000), (0.5, 200)):
        begun = now[0]
        for _ in range(steps):
            now[0] += seconds
            notices.new()
        seen = [look for look in looks if look > begun + 2 * LOOK_SECONDS]  # by then it knows what a step takes
        gaps = [b - a for a, b in itertools.pairwise(seen)]
        assert len(gaps) >= 2
        assert max(gaps) <= max(LOOK_SECONDS, seconds) + 1e-6, seconds
        if seconds == 0.01:
            assert min(gaps) > LOOK_SECONDS / 4  # and not with every step


def test_a_notice_leads_to_a_checkpoint_long_before_the_next_report(
    tmp_path: Path, pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(faults, "POLL_SECONDS", 0.05)
    (open_place(str(tmp_path)) / STOP_REQUEST).write_json({})
    losses = pretraining.run(tmp_path, steps=60, log_every_steps=1000, checkpoint_every_steps=1000)
    (step,) = sound_steps(open_place(str(tmp_path / "checkpoints")))
    assert 0 < step < 60
    assert len(losses) == 2  # a report with the checkpoint, and the last one


def test_every_new_attempt_is_a_recovery(tmp_path: Path) -> None:
    output = open_place(str(tmp_path))
    assert [count_recoveries(output, CONTEXT, 1.0) for _ in range(3)] == [0, 1, 2]


def test_full_memory_says_what_to_change() -> None:
    settings = TrainSettings(micro_batch_size=8, global_batch_size=16)
    message = r"micro_batch_size=8.*use train.micro_batch_size=4.*checkpointing.*offload_optimizer=true"
    with pytest.raises(UserError, match=message), explained(settings, CONTEXT):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_full_host_memory_of_a_real_process_says_what_to_change(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from beats_ray.train.context import single_process_context
from tests.support.training import Pretraining
single_process_context(lambda *_: None)
Pretraining().run(Path(sys.argv[1]) / "fits", steps=1, warmup_steps=0)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
Pretraining().run(Path(sys.argv[1]) / "large", micro_batch_size=2048, global_batch_size=2048)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: out of memory with train.micro_batch_size=2048, zero_stage=1: use" in last
    assert "train.micro_batch_size=1024 (the global batch stays)" in last


def test_a_collective_operation_that_hangs_says_who_waited_how_long() -> None:
    message = r"worker 0 of 1 .*collective_timeout_seconds=900 .* last checkpoint"
    with pytest.raises(RuntimeError, match=message), explained(TrainSettings(), CONTEXT):
        raise RuntimeError("[gloo/transport/tcp] Timed out waiting 30000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), explained(TrainSettings(), CONTEXT):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig, IterateConfig])
def test_how_a_run_is_executed_is_no_part_of_what_it_is(kind: type) -> None:
    sections = ("train",) if kind is not IterateConfig else ("pretrain", "distill", "finetune")
    execution = {"num_workers": [1, 2], "zero_stage": 3, "max_failures": 9, "loggers": []}

    def identity(data: dict[str, object] | None = None, **train: object) -> dict[str, object]:
        values = {"train": train} if kind is not IterateConfig else {name: {"train": train} for name in sections}
        return run_identity(validate(kind, values | {"output": "runs/x", "data": data or {}}))

    assert identity(**execution, learning_rate=1e-4) == identity(learning_rate=1e-4)
    assert identity(learning_rate=1e-4) != identity(learning_rate=2e-4)
    reading = {"read_tasks": 9, "decode_cpus": 0.5, "buffer_mib": 99, "prefetch_blocks": 9, "retry_seconds": 9}
    assert identity({**reading, "placement": "anywhere"}) == identity()
    assert identity({"length_bucket_seconds": 1.0}) != identity()


def test_an_elastic_run_needs_a_batch_that_every_number_of_workers_can_share() -> None:
    settings = validate(TrainSettings, {"num_workers": [1, 3], "global_batch_size": 12, "micro_batch_size": 2})
    assert [settings.accumulation_steps(workers) for workers in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(UserError, match=r"global_batch_size=16 .* x num_workers \(each of \[1, 3\]\) = 12; use 12"):
        validate(TrainSettings, {"num_workers": [1, 3], "global_batch_size": 16, "micro_batch_size": 2})
    with pytest.raises(UserError, match="fewest is more than most"):
        validate(TrainSettings, {"num_workers": [3, 1], "global_batch_size": 12, "micro_batch_size": 2})


def test_a_checkpoint_whose_size_is_wrong_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_place(str(tmp_path))
    save_steps(folder, {10: None})
    (part,) = (tmp_path / "step-00000010").glob("*.safetensors")
    part.unlink()
    with caplog.at_level(logging.WARNING):
        assert sound_steps(folder) == []
    assert "step-00000010 is damaged" in caplog.text
    assert "is missing" in caplog.text
