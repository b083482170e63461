"""`beats-ray bench guard`: our speed beside that of others, as it is and as it was stored; a loss of over 15 % fails.

    beats-ray bench guard            # or make bench-guard
    beats-ray bench guard --store    # takes today's ratios as those to be held

Only ratios within one run are compared, never times: machines differ, and are busy. A ratio is a case's time, or its
peak memory, over that of what it is set beside, which is ours. Times are the fastest repetition by CPU time on one
thread, which other work on a machine hardly changes. What is measured, with which settings, is in `ratios.yaml` beside
the ratios.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from beats_ray.bench.cases import BENCHES
from beats_ray.bench.measure import Failed, Measured, measure, merge_rounds
from beats_ray.bench.run import reference_of
from beats_ray.config import BenchConfig, ConfigError, load_config
from beats_ray.console import Console

RATIOS_FILE = Path(__file__).with_name("ratios.yaml")
LARGEST_LOSS = 0.15
ATTEMPTS = 3
"""How often a benchmark is measured at most, where a ratio has lost. Each case's fastest repetition and least memory
count."""

WITH_MEMORY = ("encoder", "finetune", "pretrain")
"""Benches whose memory is held too; that of the others is mostly what imports and threads need."""

Ratios = dict[str, dict[str, float]]
"""Bench -> case -> its time over that of its reference; `case, memory` -> its peak memory over the reference's."""


@dataclass(frozen=True)
class Loss:
    """A row that is not as it was stored."""

    row: str
    stored: float | None
    measured: float | None

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.row}: stored {self.stored:.3f}, not measured; is its package installed?"
        if self.stored is None:
            return (
                f"{self.row}: measured {self.measured:.3f}, not stored; store it with `beats-ray bench guard --store`"
            )
        lost = 1.0 - self.measured / self.stored
        return f"{self.row}: stored {self.stored:.3f}, measured {self.measured:.3f}, a loss of {lost:.0%}"


def find_losses(stored: Ratios, measured: Ratios, largest_loss: float = LARGEST_LOSS) -> list[Loss]:
    """Rows that lost more than that, and rows that are only in one of the two."""
    before, now = _rows(stored), _rows(measured)
    losses = []
    for row in [*before, *(row for row in now if row not in before)]:
        old, new = before.get(row), now.get(row)
        if old is None or new is None or new < old * (1.0 - largest_loss):
            losses.append(Loss(row, old, new))
    return losses


def _rows(ratios: Ratios) -> dict[str, float]:
    return {f"{bench}, {case}": ratio for bench, cases in ratios.items() for case, ratio in cases.items()}


def _compared(config: BenchConfig) -> tuple[str, ...]:
    """The cases that are set beside another, and those others."""
    cases = (case for case in BENCHES[config.name] if case.is_for(config))
    pairs = ((case.name, reference_of(config, case.name)) for case in cases)
    return tuple({name for pair in pairs if pair[0] != pair[1] for name in pair})


def ratios_of(config: BenchConfig, measured: list[Measured]) -> dict[str, float]:
    """Each case's time and memory over those of its reference, where both were measured."""
    fastest_ms = {one.case: min(one.cpu_ms) / one.clips_per_step for one in measured}
    peak_mib = {one.case: one.peak_mib for one in measured}
    found = {}
    for case, time_ms in fastest_ms.items():
        reference = reference_of(config, case)
        if case == reference or reference not in fastest_ms:
            continue
        found[case] = time_ms / fastest_ms[reference]
        if config.name in WITH_MEMORY:
            found[f"{case}, memory"] = peak_mib[case] / peak_mib[reference]
    return found


def run_guard(console: Console, store: bool = False, file: Path = RATIOS_FILE) -> int:
    """Measures, compares, and returns 1 where a row lost; with `store` it writes the ratios anew instead."""
    guarded = read_guarded(file)
    measured: Ratios = {}
    failures = []
    for name, settings in guarded.items():
        config = _config(name, settings["settings"])
        config = config.model_copy(update={"cases": _compared(config)})
        console.note(f"bench {name}: {' '.join(f'{key}={value}' for key, value in settings['settings'].items())}")
        measured[name], failed = _measure_again(config, {} if store else settings["ratios"], console)
        failures += [f"{name}, {one.case}: {one.reason.rstrip()}" for one in failed]
    for line in failures:
        console.note(f"failed: {line}")
    if store and not failures:
        write_guarded({name: {**one, "ratios": measured[name]} for name, one in guarded.items()}, file)
        console.written([("ratios", str(file))])
        return 0
    stored: Ratios = {name: one["ratios"] for name, one in guarded.items()}
    before, now = _rows(stored), _rows(measured)
    rows = [[row, before.get(row), now.get(row)] for row in dict.fromkeys([*before, *now])]
    console.table("bench guard: time and memory over those of the reference", ["row", "stored", "measured"], rows)
    losses = find_losses(stored, measured)
    for loss in losses:
        console.note(f"lost: {loss}")
    return 1 if losses or failures else 0


def _measure_again(
    config: BenchConfig, stored: Mapping[str, float], console: Console
) -> tuple[dict[str, float], list[Failed]]:
    """The ratios, and what failed. Where one has lost, all is measured again: noise does not last, a loss does."""
    rounds: dict[str, list[Measured]] = {}
    for _ in range(ATTEMPTS):
        cases, failed = measure(config, lambda text: console.note(f"  {text}"))
        for one in cases:
            rounds.setdefault(one.case, []).append(one)
        found = ratios_of(config, [_at_best(of_case) for of_case in rounds.values()])
        known = {row: ratio for row, ratio in stored.items() if row in found}
        if failed or not find_losses({config.name: known}, {config.name: {row: found[row] for row in known}}):
            break
    return found, failed


def _at_best(rounds: list[Measured]) -> Measured:
    """One case over all attempts, with the least memory that it needed in any."""
    return replace(merge_rounds(rounds), peak_mib=min(one.peak_mib for one in rounds))


def read_guarded(file: Path) -> dict[str, dict[str, Any]]:
    """Bench -> its settings and its stored ratios. ConfigError for a file of another form."""
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); restore it from the repository") from None
    if not isinstance(found, dict) or not all(_is_guarded(name, one) for name, one in found.items()):
        raise ConfigError(
            f"{file}: expected `BENCH: {{settings: {{...}}, ratios: {{case: number}}}}`; restore it from the repository"
        )
    return found


def _is_guarded(name: object, one: object) -> bool:
    if name not in BENCHES or not isinstance(one, dict) or set(one) != {"settings", "ratios"}:
        return False
    ratios = one["ratios"]
    return (
        isinstance(one["settings"], dict)
        and isinstance(ratios, dict)
        and all(isinstance(ratio, float | int) and ratio > 0 for ratio in ratios.values())
    )


def _config(name: str, settings: Mapping[str, Any]) -> BenchConfig:
    return load_config(BenchConfig, None, [f"{key}={value}" for key, value in settings.items()], name=name)


def write_guarded(guarded: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """The file anew, ratios with three decimals."""
    rounded = {
        name: {
            "settings": dict(one["settings"]),
            "ratios": {case: round(float(ratio), 3) for case, ratio in one["ratios"].items()},
        }
        for name, one in guarded.items()
    }
    comment = "# What `beats-ray bench guard` measures and holds; `beats-ray bench guard --store` writes the ratios.\n"
    file.write_text(comment + yaml.safe_dump(rounded, sort_keys=False))
