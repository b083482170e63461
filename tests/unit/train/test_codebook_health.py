"""A tokenizer whose codebook really collapses is found out in time, with what to do; a healthy one is left alone."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as RichConsole

from beats_ray.console import Console
from beats_ray.data.storage import open_place
from beats_ray.train.codebook_health import count_collapsed_steps, describe_collapse, is_collapsed
from beats_ray.train.jobs import watch
from tests.support.distilling import distil

pytestmark = pytest.mark.unit

MOST_STEPS = 200
"""Within so many a collapse has to be named."""


def first_warning(records: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The step of the first report that has a warning, and its words."""
    found = ((record["step"], describe_collapse(record)) for record in records)
    return next(((step, line) for step, line in found if line), None)


def test_a_collapse_is_named_in_time_with_its_remedies_and_its_first_remedy_helps(tmp_path: Path) -> None:
    collapsed = distil(tmp_path / "collapsed", learning_rate=0.1)
    assert collapsed[-1]["tokenizer/perplexity"] < 4
    warned = first_warning(collapsed)
    assert warned is not None
    step, line = warned
    assert step <= MOST_STEPS
    assert "tokenizer/perplexity=" in line
    for remedy in ("train.learning_rate", "tokenizer.commitment_weight", "tokenizer.restart_below"):
        assert remedy in line
    healthy = distil(tmp_path / "healthy", learning_rate=5e-4)
    assert healthy[-1]["tokenizer/perplexity"] > 15
    assert first_warning(healthy) is None


@pytest.mark.parametrize(
    ("perplexity", "num_codes", "patches", "verdict"),
    [
        (7.0, 1024, 10_000, True),
        (11.0, 1024, 10_000, False),  # a healthy start may go down to that
        (7.0, 16, 10_000, False),  # of sixteen codes seven are many
        (1.5, 16, 10_000, True),
        (1.0, 1024, 499, False),  # a few patches may well be alike
    ],
)
def test_the_bound_follows_the_size_of_the_codebook(
    perplexity: float, num_codes: int, patches: int, verdict: bool
) -> None:
    assert is_collapsed(perplexity, num_codes, patches) is verdict


def test_collapsed_steps_count_over_reports_of_any_distance_and_start_again_after_a_healthy_one() -> None:
    previous, seen = None, []
    for step, collapsed in ((10, 1.0), (40, 1.0), (50, 0.0), (60, 1.0)):
        record = {"step": step, "labels/collapsed": collapsed}
        previous = record | count_collapsed_steps(record, previous)
        seen.append(previous["labels/collapsed_steps"])
    assert seen == [10, 40, 0, 10]
    assert count_collapsed_steps({"step": 5, "train/loss": 1.0}, None) == {}


def test_the_console_says_it_once(tmp_path: Path) -> None:
    written = io.StringIO()
    console = Console(RichConsole(file=written, width=400))
    run: Any = SimpleNamespace(output=open_place(str(tmp_path)), train=SimpleNamespace(steps=100, global_batch_size=4))
    shown = watch(run, console)
    for step in (60, 70):
        record = {"step": step, "clips": 4 * step, "labels/perplexity": 1.2, "labels/collapsed_steps": step}
        shown._warn(record, first=True)
    assert written.getvalue().count("warning: labels/perplexity=1.2 at step 60") == 1
    assert written.getvalue().count("warning") == 1
    assert "random_projection.normalization" in written.getvalue()
