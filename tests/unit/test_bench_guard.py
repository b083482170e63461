"""The guard fails on a loss of over 15 % and says where; a loss below it passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from beats_ray import cli
from beats_ray.bench import guard
from beats_ray.bench.cases import BENCHES
from beats_ray.bench.guard import Ratios, find_losses, ratios_of, read_guarded, run_guard
from beats_ray.bench.measure import Failed, Measured
from beats_ray.bench.run import reference_of
from beats_ray.config import BenchConfig, ConfigError
from beats_ray.console import Console

pytestmark = pytest.mark.unit

STORED: Ratios = {"fbank": {"torchaudio, clip by clip": 2.0}, "encoder": {"published formula": 1.25}}


def measured(of_fbank: float) -> Ratios:
    return STORED | {"fbank": {"torchaudio, clip by clip": of_fbank}}


def test_a_loss_of_14_percent_passes_and_one_of_16_fails() -> None:
    assert not find_losses(STORED, measured(2.0 * 0.86))
    assert not find_losses(STORED, measured(9.0))
    losses = find_losses(STORED, measured(2.0 * 0.84))
    assert [str(loss) for loss in losses] == [
        "fbank, torchaudio, clip by clip: stored 2.000, measured 1.680, a loss of 16%"
    ]


def test_rows_that_only_one_side_has_are_named() -> None:
    gone = find_losses(STORED, {"fbank": STORED["fbank"]})
    assert [str(loss) for loss in gone] == [
        "encoder, published formula: stored 1.250, not measured; is its package installed?"
    ]
    new = find_losses({"fbank": STORED["fbank"]}, STORED)
    assert [loss.row for loss in new] == ["encoder, published formula"]
    assert "--store" in str(new[0])


def one(case: str, *cpu_ms: float, wall_ms: float = 1000.0, peak_mib: float = 0.0) -> Measured:
    return Measured(case, [wall_ms] * len(cpu_ms), [0.0] * len(cpu_ms), list(cpu_ms), peak_mib, clips_per_step=2)


def test_a_ratio_is_that_of_the_fastest_repetitions_by_cpu_time_beside_the_case_s_own_reference() -> None:
    config = BenchConfig(name="tokenize")
    found = ratios_of(
        config,
        [
            one("random projection", 12.0, 10.0, 50.0, wall_ms=1.0),
            one("random projection, clip by clip", 30.0, 25.0),
            one("distilled", 100.0, 120.0),
            one("distilled, published formula", 150.0, 140.0, wall_ms=9e9),
        ],
    )
    assert found == {
        "random projection, clip by clip": pytest.approx(2.5),
        "distilled, published formula": pytest.approx(1.4),
    }


def test_memory_is_held_where_a_model_is_trained() -> None:
    rows = [one("beats_ray", 10.0, peak_mib=500.0), one("published formula", 15.0, peak_mib=800.0)]
    assert ratios_of(BenchConfig(name="encoder"), rows) == {"published formula": 1.5, "published formula, memory": 1.6}
    more = {"encoder": {"published formula": 1.5, "published formula, memory": 1.2}}
    losses = find_losses({"encoder": ratios_of(BenchConfig(name="encoder"), rows)}, more)
    assert [loss.row for loss in losses] == ["encoder, published formula, memory"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    settings = {"clips": 2, "threads": 1}
    path = tmp_path / "ratios.yaml"
    path.write_text(yaml.safe_dump({"fbank": {"settings": settings, "ratios": STORED["fbank"]}}))
    return path


@pytest.fixture
def slow_down(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets our filterbank take so many milliseconds, and the other one 20."""

    def set_ms(ours_ms: float) -> None:
        def measure(config: BenchConfig, _tell: object) -> tuple[list[Measured], list[Failed]]:
            assert (config.name, config.clips, config.threads) == ("fbank", 2, 1)
            assert set(config.cases) == {case.name for case in BENCHES["fbank"]}
            first, second, _ = (case.name for case in BENCHES["fbank"])
            return [one(first, ours_ms), one(second, 20.0)], []

        monkeypatch.setattr(guard, "measure", measure)

    return set_ms


def test_the_lane_fails_when_ours_gets_slower_and_names_row_and_ratios(
    file: Path, slow_down: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    slow_down(10.0 / 0.86)
    assert run_guard(Console(), file=file) == 0
    slow_down(10.0 / 0.84)
    assert run_guard(Console(), file=file) == 1
    assert "lost: fbank, torchaudio, clip by clip: stored 2.000, measured 1.680" in capsys.readouterr().out


def test_noise_passes_when_it_is_measured_again_and_a_loss_does_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours_ms: list[float] = []

    def measure(_config: BenchConfig, _tell: object) -> tuple[list[Measured], list[Failed]]:
        first, second, _ = (case.name for case in BENCHES["fbank"])
        return [one(first, ours_ms.pop(0)), one(second, 20.0)], []

    monkeypatch.setattr(guard, "measure", measure)
    ours_ms += [15.0, 14.0, 10.0, 0.0]
    assert run_guard(Console(), file=file) == 0
    assert ours_ms == [0.0]
    ours_ms[:] = [15.0, 14.0, 13.0, 0.0]
    assert run_guard(Console(), file=file) == 1
    assert ours_ms == [0.0]
    assert "measured 1.538" in capsys.readouterr().out  # of the fastest


@pytest.mark.parametrize(("peaks_mib", "status"), [([900.0, 500.0], 0), ([900.0, 900.0, 900.0], 1)])
def test_memory_is_measured_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peaks_mib: list[float], status: int
) -> None:
    file = tmp_path / "ratios.yaml"
    ratios = {"published formula": 1.5, "published formula, memory": 2.0}
    file.write_text(yaml.safe_dump({"encoder": {"settings": {}, "ratios": ratios}}))
    left = list(peaks_mib)

    def measure(_config: BenchConfig, _tell: object) -> tuple[list[Measured], list[Failed]]:
        ours, theirs = one("beats_ray", 10.0, peak_mib=left.pop(0)), one("published formula", 15.0, peak_mib=1000.0)
        return [ours, theirs], []

    monkeypatch.setattr(guard, "measure", measure)
    assert run_guard(Console(), file=file) == status
    assert not left


def test_stored_anew_it_passes(file: Path, slow_down: Callable[[float], None]) -> None:
    slow_down(16.0)
    assert run_guard(Console(), file=file) == 1
    assert run_guard(Console(), store=True, file=file) == 0
    assert run_guard(Console(), file=file) == 0
    assert read_guarded(file)["fbank"] == {
        "settings": {"clips": 2, "threads": 1},
        "ratios": {"torchaudio, clip by clip": 1.25},
    }


def test_a_case_that_fails_fails_the_lane_and_is_not_stored(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_config: BenchConfig, _tell: object) -> tuple[list[Measured], list[Failed]]:
        return [one("beats_ray, one batch", 1.0)], [Failed("torchaudio, clip by clip", "RuntimeError: gone")]

    monkeypatch.setattr(guard, "measure", measure)
    before = file.read_text()
    assert run_guard(Console(), store=True, file=file) == 1
    assert file.read_text() == before


def test_the_file_of_the_repository_has_every_case_that_is_set_beside_another() -> None:
    guarded = read_guarded(guard.RATIOS_FILE)
    for name, entry in guarded.items():
        config = BenchConfig(name=name, **entry["settings"])  # type: ignore[arg-type]
        cases = {case.name for case in BENCHES[name] if case.is_for(config)}
        compared = {case for case in cases if case != reference_of(config, case)}
        memory = {f"{case}, memory" for case in compared if name in guard.WITH_MEMORY}
        assert set(entry["ratios"]) == compared | memory


@pytest.mark.parametrize("text", ["fbank: 2", "speed: {settings: {}, ratios: {}}", "a: [", "fbank: {ratios: {x: 1}}"])
def test_a_file_of_another_form_is_a_mistake(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"ratios\.yaml"):
        run_guard(Console(), file=file)


def test_settings_of_the_guard_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "guard", "clips=2"]) == 2
    assert "takes nothing but --store" in capsys.readouterr().err
    assert cli.main(["bench", "fbank", "--store"]) == 2
