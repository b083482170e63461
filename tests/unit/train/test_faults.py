"""What a run does about faults: advice, notices, retention, uploads that fail, and what may change between attempts."""

import itertools
import logging
import re
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
from beats_ray.train import committed, faults
from beats_ray.train.checkpoint import ResumeCheckpoints
from beats_ray.train.committed import sound_steps
from beats_ray.train.context import WorkerContext, single_process_context
from beats_ray.train.engine import can_fall
from beats_ray.train.faults import LOOK_SECONDS, STOP_REQUEST, Notices, count_recoveries, explained, is_bad_step

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


@pytest.mark.parametrize("lasting", [False, True])
def test_a_checkpoint_is_damaged_only_if_a_second_reading_says_so_and_its_checksums_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    folder = open_place(str(tmp_path))
    save_steps(folder, {10: None, 20: None})
    read, garbled = Place.read_bytes, []

    def garbles_the_newest(place: Place) -> bytes:
        data = read(place)
        if place.name.endswith(".safetensors") and "step-00000020" in place.uri and (lasting or not garbled):
            garbled.append(place)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    monkeypatch.setattr(Place, "read_bytes", garbles_the_newest)
    engine = FakeEngine(0.0)
    step = ResumeCheckpoints(folder, CONTEXT, 2).restore(engine)  # type: ignore[arg-type]
    assert (step, float(engine.value)) == ((10, 10.0) if lasting else (20, 20.0))
    assert sound_steps(folder) == ([10] if lasting else [10, 20])
    if lasting:
        (checksum,) = (folder / "step-00000020" / "commit.damaged.json").read_json()["files"].values()
        assert set(checksum) == {"bytes", "sha256"}


def test_what_newer_checkpoints_replace_is_deleted_and_a_sound_one_is_always_left(tmp_path: Path) -> None:
    folder = open_place(str(tmp_path))
    save_steps(folder, {10: None, 20: None, 30: None}, keep=9)
    (tmp_path / "step-00000010" / "commit.json").unlink()  # the run ended while it was saved
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-00000099" / "rank-00000-x.json").write_text("{}")  # beyond the newest: a save may be under way
    committed.mark_damaged(folder / "step-00000030")
    assert sound_steps(folder) == [20]
    save_steps(folder, {40: None}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000020", "step-00000030", "step-00000040", "step-00000099",
    ]  # fmt: skip  # the damaged one may still tell what happened
    save_steps(folder, {50: None}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000099"]


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


def test_whatever_ends_an_upload_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_place: Place, _data: bytes) -> None:
        raise MemoryError("no room for the file")

    monkeypatch.setattr(Place, "write_bytes", fails)
    checkpoints = ResumeCheckpoints(open_place(str(tmp_path)), CONTEXT, 2)
    checkpoints.save(FakeEngine(1.0), 1)  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="no room"):
        checkpoints.wait()
    checkpoints.wait()


def test_a_stop_request_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "POLL_SECONDS", 0.1)
    output = open_place(str(tmp_path))
    notices = Notices(output, CONTEXT)
    assert not notices.new(due=True)
    (output / STOP_REQUEST).write_json({})
    deadline = time.monotonic() + 20
    while not (noticed := notices.new(due=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert noticed
    assert not notices.new(due=True)
    notices.close()


@pytest.mark.parametrize("seconds", [[10.0] * 9, [0.01] * 5000, [0.1] * 100 + [10.0] * 9, [20.0] * 3 + [0.1] * 90])
def test_workers_look_at_notices_every_few_seconds_however_long_steps_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: list[float]
) -> None:
    now, looks = [0.0], [0.0]
    monkeypatch.setattr(faults.time, "perf_counter", lambda: now[0])
    context = WorkerContext(0, 1, torch.device("cpu"), lambda _step, _metrics: None, lambda: bool(looks.append(now[0])))
    notices = Notices(open_place(str(tmp_path)), context)
    for step_seconds in seconds:
        due = notices.due()
        now[0] += step_seconds
        notices.new(due)
        assert now[0] - looks[-1] <= LOOK_SECONDS + step_seconds + 1e-6  # so two steps are lost at most
    notices.close()
    gaps = [b - a for a, b in itertools.pairwise(looks)]
    assert len(gaps) >= 3
    assert len(gaps) <= sum(seconds) / LOOK_SECONDS + 2  # and not with every step of those that are fast


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


@pytest.mark.parametrize(
    ("losses_are_finite", "loss_scale_can_fall", "is_bad"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_a_step_left_out_counts_unless_a_lower_loss_scale_may_mend_it(
    losses_are_finite: bool, loss_scale_can_fall: bool, is_bad: bool
) -> None:
    assert is_bad_step(losses_are_finite, loss_scale_can_fall) is is_bad


def test_deepspeeds_loss_scale_falls_to_its_least_and_then_overflows_count() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scaler = DynamicLossScaler(
        init_scale=4.0, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )  # fmt: skip
    seen = []
    for _ in range(4):
        seen.append((scaler.cur_scale, can_fall(scaler)))
        scaler.update_scale(overflow=True)
    assert seen == [(4.0, True), (2.0, True), (1.0, False), (1.0, False)]
    assert not can_fall(LossScaler(scale=128.0))  # a fixed one


def test_full_memory_says_what_to_change() -> None:
    settings = TrainSettings(micro_batch_size=8, global_batch_size=16)
    message = r"micro_batch_size=8.*use train.micro_batch_size=4.*checkpointing.*offload_optimizer=true"
    with pytest.raises(UserError, match=message), explained(settings, CONTEXT):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("train", "advised"),
    [
        ({"micro_batch_size": 35, "global_batch_size": 560, "num_workers": 16}, 7),
        ({"micro_batch_size": 3, "global_batch_size": 12, "num_workers": 2}, 1),
        ({"micro_batch_size": 8, "global_batch_size": 48, "num_workers": (1, 3)}, 4),
        ({"micro_batch_size": 9, "global_batch_size": 54, "num_workers": (1, 3)}, 3),
        ({"micro_batch_size": 1, "global_batch_size": 4}, None),
    ],
)
def test_the_micro_batch_size_that_is_advised_is_allowed(train: dict[str, object], advised: int | None) -> None:
    settings = validate(TrainSettings, train)
    with pytest.raises(UserError) as caught, explained(settings, CONTEXT):
        raise torch.OutOfMemoryError("CUDA out of memory")
    found = re.search(r"use train\.micro_batch_size=(\d+)", str(caught.value))
    assert (int(found[1]) if found else None) == advised
    if advised:
        validate(TrainSettings, train | {"micro_batch_size": advised})


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
    moving = {"reduce_bucket_size": 7, "overlap_comm": True, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    assert identity(deepspeed={"zero_optimization": moving, "dump_state": True}) == identity()
    assert identity(deepspeed={"zero_optimization": {"zero_quantized_gradients": True}}) != identity()
    assert identity(deepspeed={"data_types": {"grad_accum_dtype": "bf16"}}) != identity()
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
        assert sound_steps(folder) == []
    assert caplog.text.count("step-00000010 is damaged") == 1  # however often it is looked at
    assert "is missing" in caplog.text
