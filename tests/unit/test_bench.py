"""The benchmark's yardstick does the same work, and every case runs and is reported."""

import contextlib
import io
import json
import os
import socket
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beats_ray import cli
from beats_ray.bench import (
    ceiling_cases,
    checkpoint_cases,
    end_to_end_cases,
    measure,
    pretrain_cases,
    processes,
    run,
    stage_cases,
    suite,
)
from beats_ray.bench.cases import ABOUT, BENCHES, Case, Cost, Observation, engine_step
from beats_ray.bench.end_to_end_cases import observe
from beats_ray.bench.energy import joules_per_clip
from beats_ray.bench.measure import Failed, Measured, measure_case
from beats_ray.bench.processes import Lost, Send, messages_from
from beats_ray.bench.released_formula import FormulaEncoder, per_clip_fbank
from beats_ray.bench.run import figures, run_bench
from beats_ray.bench.tokenize_cases import fitted_tokenizer, label_by_formula, label_clip_by_clip
from beats_ray.config import BenchConfig, ConfigError, RaySettings
from beats_ray.console import Console
from beats_ray.data.storage import open_place
from beats_ray.launch import allocator_environment
from beats_ray.models import (
    BeatsEncoder,
    RandomProjectionTokenizer,
    compute_fbank,
    encoder_config,
    normalise_fbank,
    num_patches,
)
from beats_ray.train.engine import Engine

pytestmark = pytest.mark.unit


def test_the_published_formula_gives_our_features() -> None:
    torch.manual_seed(0)
    config = encoder_config("tiny", num_layers=2)
    ours, formula = BeatsEncoder(config).eval(), FormulaEncoder(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        formula.take_weights(ours.state_dict())
        wave = 0.1 * torch.randn(2, 20_000)
        assert (ours.features_from_waveform(wave).features_BND - formula(wave)).abs().max() < 1e-4
        assert (normalise_fbank(compute_fbank(wave)[0]) - per_clip_fbank(wave, config)).abs().max() < 1e-3


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cases without a process of their own, each of which would import PyTorch and DeepSpeed again."""

    def in_here(cases: list[Case], config: BenchConfig, _deadline: float | None) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed logs there
            return [measure_case(case, config) for case in cases]

    monkeypatch.setattr(measure, "_in_a_process", in_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "name",
    [  # data and end-to-end start a cluster
        *sorted(set(BENCHES) - {"data", "end-to-end", "compiled"}),
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_every_case_is_measured_and_reported(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_cases, "STEPS", checkpoint_cases.STEPS_A_SAVE)
    monkeypatch.setitem(ceiling_cases.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setattr(ceiling_cases, "COPIED_BYTES", 2**20)
    config = BenchConfig(name=name, preset="tiny", clips=2, seconds=1.0, repetitions=2, rounds=1, threads=1)  # type: ignore[arg-type]
    assert run_bench(config, Console(), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["preset"] == "tiny"
    here = [case for case in BENCHES[name] if case.is_for(config)]
    assert [row["case"] for row in report["cases"]] == [case.name for case in here if case.available()]
    for row in report["cases"]:
        assert len(row["step_ms"]) == 2
        assert row["clips_per_s"] == pytest.approx(2000.0 / row["median_ms"])
    with_mfu = {case.name for case in here if case.cost is not None and name != "ceilings"}
    assert {row["case"] for row in report["cases"] if row["mfu"] is not None} == with_mfu
    assert all(row["mfu"] > 0.0 for row in report["cases"] if row["mfu"] is not None)
    stages = [case.name for case in BENCHES[name]][2:] if name == "ceilings" else []
    assert [floor["case"] for floor in report.get("floors", [])] == stages


def test_the_table_names_all_cases_each_measured_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["bench", "fbank", "clips=2", "seconds=1", "repetitions=1", "rounds=1", f"threads={threads + 1}"]
    assert cli.main(arguments) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "beats_ray, one batch" in out
    assert "torchaudio, clip by clip" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so device=cuda is no mistake here")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="device=cuda: no CUDA device is visible"):
        run_bench(BenchConfig(name="fbank", device="cuda"), Console())


def test_labels_of_the_yardsticks_are_ours() -> None:
    """All but those on the border between two codes, where a filterbank differs by rounding."""
    config = BenchConfig(name="tokenize", preset="tiny")
    wave_BS = 0.1 * torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    projection, distilled = RandomProjectionTokenizer(), fitted_tokenizer(config)
    formula = FormulaEncoder(distilled.config.encoder).eval()
    formula.take_weights(distilled.encoder.state_dict())
    with torch.inference_mode():
        pairs = [
            (projection.label_fbank(*compute_fbank(wave_BS)), label_clip_by_clip(projection, wave_BS)),
            (distilled.label_fbank(*compute_fbank(wave_BS)), label_by_formula(distilled, formula, wave_BS)),
        ]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape == (2, num_patches(32_000))
        assert (ours == theirs).float().mean() > 0.98
        assert len(ours.unique()) > 5


def broken(_config: BenchConfig) -> Any:
    raise RuntimeError("no such kernel")


@pytest.mark.usefixtures("in_this_process")
def test_a_case_that_fails_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_here(cases: list[Case], config: BenchConfig, _deadline: float | None) -> Any:
        sent: list[Any] = []
        measure._measure_all(sent.append, config, tuple(case.name for case in cases))
        return sent

    monkeypatch.setattr(measure, "_in_a_process", in_here)
    monkeypatch.setitem(BENCHES, "fbank", (Case("broken", broken), *BENCHES["fbank"]))
    config = BenchConfig(name="fbank", clips=2, seconds=1.0, repetitions=1, rounds=2, threads=1)
    assert run_bench(config, Console()) == 1
    out = capsys.readouterr().out
    assert "broken failed" in out
    assert "no such kernel" in out
    assert "│ torchaudio, clip by clip" in out


def test_what_is_not_measured_in_time_is_named() -> None:
    config = BenchConfig(name="fbank", clips=2, seconds=1.0, repetitions=1, rounds=1, threads=1)
    measured, failed = measure.measure(config, lambda _text: None, deadline=time.monotonic())
    assert not measured
    assert [one.case for one in failed] == [case.name for case in BENCHES["fbank"]]
    assert all("time was up" in one.reason for one in failed)


def test_energy_is_what_the_counter_moved_over_the_clips_of_at_least_the_time() -> None:
    """A step takes 0.3 s at 500 W; the counter had 1,000 J before."""
    now = [0.0]

    def step() -> None:
        now[0] += 0.3

    found = joules_per_clip(
        step, clips=5, read_joules=lambda: 1000.0 + 500.0 * now[0], seconds=2.0, clock=lambda: now[0]
    )
    assert found == pytest.approx(500.0 * 0.3 / 5)
    assert now[0] == pytest.approx(2.1)


def told(*reports: tuple[float, float, int, float]) -> dict[str, Any]:
    rows = [
        {"at": 1000.0 + seconds, "seconds": seconds, "clips": clips, "data/wait_fraction": wait, "step": at}
        for at, seconds, clips, wait in reports
    ]
    return {"began": 995.0, "reports": rows}


def test_a_run_s_start_ends_with_its_first_step_and_its_rate_with_the_last_that_has_a_next_one() -> None:
    found = observe(
        told((1, 4.0, 16, 0.75), (2, 5.0, 32, 0.2), (3, 8.0, 48, 0.1), (4, 9.0, 64, 0.9)),
        ray_s=6.0, fit_started=980.0, peak_mib=100.0,
    )  # fmt: skip
    assert found.parts_s == {
        "Ray": 6.0, "workers": 15.0, "model, engine": 5.0, "first batch": pytest.approx(3.0),
        "first step": pytest.approx(1.0),
    }  # fmt: skip
    assert found.start_seconds == pytest.approx(30.0)
    assert (found.seconds, found.clips) == (4.0, 32)
    assert found.data_wait == pytest.approx((0.2 * 1.0 + 0.1 * 3.0) / 4.0)
    assert found.mfu is None


def test_a_run_s_mfu_is_what_its_workers_report_after_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    reports = told(*((at, float(at), 16 * at, 0.0) for at in range(1, 6)))
    for one, mfu in zip(reports["reports"], (0.01, 0.4, 0.3, 0.35, 0.9), strict=True):
        one["perf/mfu"] = mfu
    found = observe(reports, ray_s=0.0, fit_started=0.0, peak_mib=0.0)
    assert found.mfu == 0.35
    config, row = BenchConfig(name="end-to-end"), measured("1 worker", 1000.0, 10, told_mfu=found.mfu)
    assert figures(config, [row])["MFU"] == ["35.0%"]
    run._show(config, [row], Console())
    assert "as the workers report it" in capsys.readouterr().out


def measured(case: str, step_ms: float, clips: int, **others: Any) -> Measured:
    return Measured(case, [step_ms], [0.0], [step_ms], 100.0, clips, **others)


def test_the_ratio_of_unequal_numbers_of_clips_is_that_of_a_clip_s_time() -> None:
    config = BenchConfig(name="end-to-end")
    columns = figures(
        config, [measured("1 worker", 1000.0, 10, data_wait=0.02), measured("1 worker, 10x the clips", 9000.0, 100)]
    )
    assert columns["time / 1 worker"] == ["1.00", "0.90"]
    assert columns["data wait"] == ["2.0%", "-"]
    assert "J/clip" not in columns


def test_cases_of_one_precision_have_one_peak_the_fastest_of_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"beats_ray": 100.0, "published formula": 80.0, "openbeats (ESPnet)": 120.0}

    def in_a_process(cases: list[Case], _config: BenchConfig, _deadline: object) -> list[Measured]:
        return [measured(case.name, 1000.0, 1, cost=Cost(60.0, 0.0), peak_flops=peaks[case.name]) for case in cases]

    monkeypatch.setattr(measure, "_in_a_process", in_a_process)
    found, _ = measure.measure(BenchConfig(name="encoder", rounds=1, cases=tuple(peaks)), lambda _text: None)
    assert [one.mfu for one in found] == [0.5, 0.5, 0.5]


def test_what_needs_a_cluster_of_its_own_is_left_out_on_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = BenchConfig(name="end-to-end", output="s3://bucket/bench", device="cuda")  # no GPU of this machine counts
    cases, lacking = measure.cases_of(joined)
    assert [case.name for case in cases] == [
        "1 worker", "1 worker, 10x the clips", "1 worker, 100x the clips", "2 workers", "4 workers"
    ]  # fmt: skip
    assert [len(names) for names in lacking.values()] == [14]
    more, _ = measure.cases_of(joined.model_copy(update={"cases": ("16 workers",)}))
    assert [case.workers for case in more] == [16]
    with pytest.raises(ConfigError, match="output=o: bench fbank writes nothing"):
        run_bench(BenchConfig(name="fbank", output="o"), Console())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="output=s3://bucket/bench: no cluster to join"):
        run_bench(joined, Console())
    with contextlib.closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr("beats_ray.launch.CONNECT_SECONDS", 0.2)
        monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no cluster answers there"):
            run_bench(joined, Console())


def test_what_others_print_in_a_process_that_measures_is_not_in_the_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(messages_from(print_and_send, ())) == ["done"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("from a library") == 2


def test_rows_of_our_allocator_are_not_measured_twice() -> None:
    cases, _ = measure.cases_of(BenchConfig(name="encoder", same_allocator=True))
    assert not [case.name for case in cases if "our allocator" in case.name]


def test_a_table_of_few_steps_says_so_and_a_clip_without_a_patch_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = BenchConfig(name="encoder")
    run._show(config, [measured("beats_ray", 10.0, 1), measured("published formula", 20.0, 1)], Console())
    assert "measured steps of a case: 1; read no ratio" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"seconds=0\.01: shorter than one patch"):
        run_bench(BenchConfig(name="encoder", seconds=0.01), Console())


def test_every_benchmark_is_described() -> None:
    assert set(ABOUT) == {*typing.get_args(BenchConfig.model_fields["name"].annotation), "guard"}
    assert set(ABOUT) >= set(BENCHES)


def test_a_head_without_a_gpu_measures_runs_on_others_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no CUDA here")

    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, broken)
    case = Case("1 worker", lambda _config: lambda: Observation(2.0, 1.0, 16, 100.0, 0.1))
    found = measure_case(case, BenchConfig(name="end-to-end", device="cuda", output="s3://bucket/bench"))
    assert (found.median_ms, found.clips_per_step, found.peak_mib) == (2000.0, 16, 100.0)


@pytest.mark.parametrize(
    "case", [case for case in BENCHES["end-to-end"] if case.joins_a_cluster], ids=lambda one: one.name
)
def test_workers_share_the_clips_of_a_step_alike(case: Case, tmp_path: Path) -> None:
    config = BenchConfig(name="end-to-end", micro_batch_size=64)
    train = end_to_end_cases._run_config(config, "pretrain", case.workers, 3, "-", open_place(str(tmp_path))).train
    assert train.accumulation_steps(case.workers) == max(1, 4 // case.workers)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_prepares_the_next_batch_before_its_adamw_or_its_own_at_its_begin(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    config = BenchConfig(name="pretrain", preset="tiny", clips=2, seconds=1.0)
    task, train, batch = pretrain_cases.our_task(config)
    events: list[str] = []
    prepare, adamw = task.prepare, Engine.step
    monkeypatch.setattr(task, "prepare", lambda *args, **named: (events.append("prepare"), prepare(*args, **named))[1])
    monkeypatch.setattr(Engine, "step", lambda *args, **named: (events.append("step"), adamw(*args, **named))[1])
    step = engine_step(config, task, train, batch, ahead=ahead)
    step()
    step()
    both = ["prepare", "step"]
    assert events == (["prepare", *both, *both] if ahead else [*both, *both])


def test_workers_beyond_the_gpus_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_visible_gpus", lambda: 2)
    cases, lacking = measure.cases_of(BenchConfig(name="end-to-end", device="cuda"))
    assert [case.name for case in cases if "worker" in case.name] == [
        "1 worker",
        "1 worker, 10x the clips",
        "1 worker, 100x the clips",
        "2 workers",
    ]
    assert lacking == {"more GPUs needed than the 2 visible": ["4 workers"]}


def test_what_differs_on_one_device_alone_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_visible_gpus", lambda: 1)
    by_device = {
        device: [case.name for case in measure.cases_of(BenchConfig(name="encoder", device=device))[0]]  # type: ignore[arg-type]
        for device in ("cpu", "cuda")
    }
    assert set(by_device["cpu"]) - set(by_device["cuda"]) == {
        "published formula, our allocator",
        "openbeats (ESPnet), our allocator",
    }
    assert set(by_device["cuda"]) - set(by_device["cpu"]) == {"beats_ray, flex attention"}
    with pytest.raises(ConfigError, match="has no such case"):
        measure.cases_of(BenchConfig(name="encoder", device="cuda", cases=("published formula, our allocator",)))


def test_ours_allocates_as_a_worker_does_and_others_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's own variables are."""
    monkeypatch.setenv("MALLOC_CONF", "narenas:7")
    monkeypatch.setenv("LD_PRELOAD", "")
    seen: dict[str, object] = {}

    def in_a_process(
        _work: object, arguments: Any, _deadline: object, environment: Mapping[str, str | None]
    ) -> Iterator[Measured]:
        ((seen[arguments[1][0]],),) = (list(messages_from(send_variables, (), None, environment)),)
        yield measured(arguments[1][0], 1.0, 1)

    monkeypatch.setattr(measure, "messages_from", in_a_process)
    cases = ("beats_ray", "published formula", "published formula, our allocator")
    measure.measure(BenchConfig(name="encoder", rounds=1, cases=cases), lambda _text: None)
    worker = allocator_environment()
    ours = (worker.get("LD_PRELOAD", ""), worker["MALLOC_CONF"])
    assert seen == {cases[0]: ours, cases[1]: (None, None), cases[2]: ours}
    seen.clear()
    measure.measure(BenchConfig(name="encoder", rounds=1, cases=cases[:2], same_allocator=True), lambda _text: None)
    assert seen == dict.fromkeys(cases[:2], ours)
    assert os.environ["MALLOC_CONF"] == "narenas:7"
    assert measure.allocation(BenchConfig(name="encoder", device="cuda"), as_worker=True) == {}


def send_variables(send: Send) -> None:
    send((os.environ.get("LD_PRELOAD"), os.environ.get("MALLOC_CONF")))


def test_a_stage_is_timed_after_it_has_gone_over_a_few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    open_clusters: list[RaySettings] = []

    @contextlib.contextmanager
    def cluster(settings: RaySettings) -> Iterator[None]:
        open_clusters.append(settings)
        yield
        open_clusters.clear()

    def stage(clips: int, scratch: Path) -> Callable[[], object]:
        assert scratch.is_dir()
        assert not open_clusters, "what the stage reads is made outside the time"

        def run() -> None:
            assert open_clusters
            ran.append(clips)
            time.sleep(0.5 if clips == stage_cases.FIRST_CLIPS else 0.1)

        return run

    monkeypatch.setattr("beats_ray.launch.ray_cluster", cluster)
    observed = stage_cases._measured(stage, 640)()
    assert isinstance(observed, Observation)
    assert ran == [stage_cases.FIRST_CLIPS, 640]
    assert observed.start_seconds >= 0.5 > observed.seconds >= 0.1
    assert (observed.clips, observed.data_wait) == (640, None)


def test_a_case_is_set_beside_one_of_its_own_benchmark() -> None:
    for name, cases in BENCHES.items():
        names = {case.name for case in cases}
        assert len(names) == len(cases), name
        assert {case.beside for case in cases} <= names | {""}, name
        assert len({case.in_fp32 for case in cases}) == 1, name  # they have one peak


def test_the_suite_measures_every_part_and_ends_with_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def fake(config: BenchConfig, _tell: object, _deadline: float) -> tuple[list[Measured], list[Failed]]:
        seen[config.name] = config.num_clips
        names = [case.name for case in BENCHES[config.name]]
        theirs = "openbeats (ESPnet)"
        lost = [Failed(names.pop(names.index(theirs)), "OutOfMemoryError")] if config.name == "encoder" else []
        if config.name == "ceilings":
            return [], lost
        return [measured(name, 10.0, config.num_clips, joules_per_clip=0.25) for name in names], lost

    monkeypatch.setattr(suite, "measure", fake)
    monkeypatch.setattr(suite, "profile_apart", lambda _config, _deadline: "no profiler")
    assert suite.run_suite(BenchConfig(name="gpu", device="cpu"), Console()) == 1
    assert seen == {name: clips for name, clips in suite.PARTS.items() if name != "profile"}
    out = capsys.readouterr().out
    assert "encoder: openbeats (ESPnet) failed: OutOfMemoryError" in out
    assert "profile failed: no profiler" in out
    table = out[out.index("bench gpu: cpu, base encoder, bf16, 10 s") :]
    rows = [line for line in table.splitlines() if line.startswith("│") and line.split("│")[1].strip()]  # or wrapped
    assert len(rows) == sum(len(BENCHES[name]) for name in suite.PARTS if name in BENCHES and name != "ceilings") - 1
    assert all("0.25" in row for row in rows)


def test_defaults_follow_the_benchmark_and_give_way_to_what_is_set() -> None:
    assert (BenchConfig(name="gpu").device, BenchConfig(name="gpu").precision) == ("cuda", "bf16")
    assert BenchConfig(name="gpu", device="cpu").device == "cpu"
    assert (BenchConfig(name="end-to-end").preset, BenchConfig(name="end-to-end", preset="base").preset) == (
        "tiny",
        "base",
    )
    assert BenchConfig(name="encoder").preset == "base"


def test_a_case_that_a_benchmark_has_not_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"cases=\['torchaudo'\].* choose among: beats_ray, one batch; torchaudio"):
        run_bench(BenchConfig(name="fbank", cases=("torchaudo", "beats_ray, one batch")), Console())


def print_and_send(send: Send) -> None:
    print("from a library", flush=True)
    os.system("echo from a library")  # noqa: S605
    send("done")


def send_and_die(send: Send, status: int) -> None:
    send("first")
    os._exit(status)


def wait_forever(send: Send, path: str) -> None:
    try:
        send("ready")
        time.sleep(600.0)
    finally:
        Path(path).write_text("cleaned up")


def test_what_a_process_sent_before_it_died_is_there() -> None:
    got = messages_from(send_and_die, (3,))
    assert next(got) == "first"
    with pytest.raises(Lost, match="status 3"):
        next(got)
    assert list(messages_from(send_and_die, (0,))) == ["first"]


def test_a_process_is_ended_at_its_deadline_and_cleans_up_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    got = messages_from(wait_forever, (str(tmp_path / "end"),), deadline=300.0)
    assert next(got) == "ready"
    now[0] = 300.0
    with pytest.raises(Lost, match="the time was up"):
        next(got)
    assert (tmp_path / "end").read_text() == "cleaned up"
