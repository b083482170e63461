"""The learned codebook fares alike in fp32 and bf16, and on one worker and two."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.distilling import distil_in_group

pytestmark = pytest.mark.slow

STEPS = 200
MOST_APART = 0.25
"""Perplexities differ by so much at most: the codes that a step moves depend on the last bits of its sums."""


def test_perplexity_is_alike_in_fp32_and_bf16_and_on_one_and_two_workers(tmp_path: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for precision in ("fp32", "bf16"):
        for workers in (1, 2):
            name = f"{precision}-{workers}"
            found[name] = distil_in_group(tmp_path / name, workers, precision=precision, steps=STEPS)[-1]
            figures = {key: round(value, 3) for key, value in found[name].items() if key.startswith("tokenizer/")}
            print(f"{precision}, {workers} workers, step {found[name]['step']}: {figures}")
    perplexities = [record["tokenizer/perplexity"] for record in found.values()]
    assert min(perplexities) > 20, "healthy"
    assert max(perplexities) / min(perplexities) < 1 + MOST_APART
    assert not any(record["tokenizer/collapsed"] for record in found.values())
