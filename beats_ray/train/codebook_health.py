"""Whether a codebook has collapsed: nearly all patches under a few codes, so that labels tell nothing.

Each report judges the codes that came up since the last one (`tokenizer/collapsed`, `labels/collapsed`: 0 or 1), the
log counts for how many steps it has been so without a break (`.../collapsed_steps`), and whoever shows the run says
once what to do. "Used codes" cannot tell: one code may take almost everything while all others still come up.
"""

from typing import Any

MOST_COLLAPSED_PERPLEXITY = 8.0
"""Below it a codebook of 64 codes and more counts as collapsed; a smaller one below an eighth of its codes. Healthy
runs stand at 20 to 60, with a dip to 11 after the start, collapsed ones at 1 to 3: docs/convergence.md."""
COLLAPSED_SHARE = 0.125
LEAST_PATCHES = 500
"""Fewer patches than that are not judged: a dozen clips may well be of one kind."""
WARN_AFTER_STEPS = 50
"""Steps without a break before it is said: one odd report is none."""

PREFIXES = ("tokenizer", "labels")
REMEDIES = {
    "tokenizer": "lower train.learning_rate or tokenizer.commitment_weight, or set tokenizer.restart_below=0.1, which "
    "moves unused codes onto patches",
    "labels": "predict labels of another tokenizer: random_projection.normalization=l2 or standardize in iteration 1, "
    "a tokenizer trained anew later",
}
"""What helps, by the first part of the metric's name: a codebook in training, and the labels of a finished one."""


def collapse_bound(num_codes: int) -> float:
    """The perplexity below which a codebook of so many codes counts as collapsed."""
    return min(MOST_COLLAPSED_PERPLEXITY, COLLAPSED_SHARE * num_codes)


def is_collapsed(perplexity: float, num_codes: int, num_patches: float) -> bool:
    """Whether so many patches, if they are enough to tell, share too few codes."""
    return num_patches >= LEAST_PATCHES and perplexity < collapse_bound(num_codes)


def count_collapsed_steps(record: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, int]:
    """`.../collapsed_steps` of a report, from its own `.../collapsed` and the report before it."""
    found = {}
    for prefix in PREFIXES:
        collapsed, steps = record.get(f"{prefix}/collapsed"), f"{prefix}/collapsed_steps"
        if collapsed is not None:
            before = previous or {"step": 0}
            found[steps] = before.get(steps, 0) + record["step"] - before["step"] if collapsed else 0
    return found


def describe_collapse(record: dict[str, Any]) -> str | None:
    """A line that names the collapse and its remedies; None for a report of a healthy codebook."""
    for prefix in PREFIXES:
        steps = record.get(f"{prefix}/collapsed_steps", 0)
        if steps >= WARN_AFTER_STEPS:
            return (
                f"{prefix}/perplexity={record[f'{prefix}/perplexity']:.1f} at step {record['step']}: the codebook has "
                f"collapsed, for {steps} steps now; {REMEDIES[prefix]}"
            )
    return None
