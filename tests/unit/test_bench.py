"""The benchmark's yardstick does the same work, and every case runs and is reported."""

import contextlib
import io
import json
import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from beats_ray import cli
from beats_ray.bench import ceiling_cases, checkpoint_cases, run
from beats_ray.bench.cases import BENCHES, Case
from beats_ray.bench.released_formula import FormulaEncoder, per_clip_fbank
from beats_ray.bench.run import run_bench
from beats_ray.config import BenchConfig, ConfigError
from beats_ray.console import Console
from beats_ray.models import BeatsEncoder, compute_fbank, encoder_config, normalise_fbank

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

    def measure(case: Case, config: BenchConfig) -> Any:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed logs there
            run._measure(sender, config, case.name)
        return receiver.recv()

    monkeypatch.setattr(run, "_in_a_process", measure)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", [name for name in BENCHES if name != "data"])  # that one starts a cluster
def test_every_case_is_measured_and_reported(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_cases, "STEPS", checkpoint_cases.STEPS_A_SAVE)
    monkeypatch.setitem(ceiling_cases.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setattr(ceiling_cases, "COPIED_BYTES", 2**20)
    config = BenchConfig(name=name, preset="tiny", clips=2, seconds=1.0, repetitions=2, rounds=1, threads=1)  # type: ignore[arg-type]
    run_bench(config, Console(), as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["preset"] == "tiny"
    assert [row["case"] for row in report["cases"]] == [case.name for case in BENCHES[name] if case.available()]
    for row in report["cases"]:
        assert len(row["step_ms"]) == 2
        assert row["clips_per_s"] == pytest.approx(2000.0 / row["median_ms"])
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
