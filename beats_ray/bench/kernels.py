"""What the kernels of a training step are, by their names and by who launched them, and where its time goes.

    shares(spans)        # {"GEMM": 0.61, "attention": 0.18, ..., "gaps": 0.02}

Names tell most kernels. Filterbank, optimizer and position convolution are made of kernels that others use too, so
these count by the annotation that they ran under. Pure functions of names and times.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from beats_ray.models.spectral import POSITION_CONVOLUTION

Kind = Literal["attention", "GEMM", "convolution", "filterbank", "optimizer", "copies", "other"]

FILTERBANK = "beats_ray: filterbank"
OPTIMIZER = "beats_ray: optimizer"
KINDS: tuple[Kind, ...] = ("attention", "GEMM", "convolution", "filterbank", "optimizer", "copies", "other")

ANNOTATED: dict[str, Kind] = {
    FILTERBANK: "filterbank", OPTIMIZER: "optimizer", POSITION_CONVOLUTION: "convolution",
}  # fmt: skip
"""What the product's own code marks, by the mark."""
# The first match counts. CUDA kernels by the names that CUPTI gives, operators of a CPU by PyTorch's.
_NAMES: tuple[tuple[Kind, str], ...] = (
    # FlashAttention, memory-efficient and cuDNN attention; FlexAttention's template, the only one of Inductor's that is
    # used without autotuning. On a CPU it is spelled out, and nothing else of our models has these two operators.
    (
        "attention",
        r"flash|fmha|_sdpa_|scaled_dot_product|flex_attention|triton_tem_|aten::(bmm|baddbmm_?|_softmax(_backward_data)?)$",
    ),
    ("optimizer", r"multi_tensor_apply|FusedAdam"),
    # cuDNN's and cuBLAS's kernels share words (implicit GEMM is a convolution), so this stands before GEMM.
    (
        "convolution",
        r"conv(?!ert)|implicit_gemm|fprop|dgrad|wgrad|winograd|im2col|col2im|nchwToNhwc|nhwcToNchw",
    ),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|xmma|aten::(add|b|badd)?mm$|aten::addmv|splitKreduce|cublas"),
    ("copies", r"^mem(cpy|set)\b|copy_kernel|BatchedCopy|aten::(copy_|cat|clone|contiguous|_to_copy)$|bfloat16_copy"),
)  # fmt: skip
_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = tuple((kind, re.compile(p, re.IGNORECASE)) for kind, p in _NAMES)


@dataclass(frozen=True)
class Span:
    """One kernel, or on a CPU an operator's own time, of a profile."""

    name: str
    start_us: float
    end_us: float
    busy_us: float
    """Of its own, without what it called."""
    under: tuple[str, ...] = ()
    """Annotations that it ran under."""


def kind_of(name: str, under: Iterable[str] = ()) -> Kind:
    """What a kernel does, by the annotations that it ran under, else by its name."""
    for annotation in under:
        if annotation in ANNOTATED:
            return ANNOTATED[annotation]
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def covered_us(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((one.start_us, one.end_us) for one in spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def window_us(spans: list[Span]) -> float:
    """From the start of the first to the end of the last."""
    return max(one.end_us for one in spans) - min(one.start_us for one in spans)


def shares(spans: list[Span]) -> dict[str, float]:
    """The share of each kind in the time from the first kernel to the last, and of the gaps in which none ran.

    They add up to 1: kernels that run at one time share it in proportion.
    """
    window, covered = window_us(spans), covered_us(spans)
    busy = sum(one.busy_us for one in spans)
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for one in spans:
        found[kind_of(one.name, one.under)] += one.busy_us / busy * covered / window
    return found | {"gaps": 1.0 - covered / window}


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel."""

    name: str
    kind: Kind
    calls: int
    share: float
    """Of the time from the first kernel to the last."""


def top_kernels(spans: list[Span], count: int = 10) -> list[Kernel]:
    """Those that take most of the time, the largest first."""
    busy: dict[tuple[str, Kind], list[float]] = {}
    for one in spans:
        busy.setdefault((one.name, kind_of(one.name, one.under)), []).append(one.busy_us)
    window = window_us(spans)
    found = [Kernel(name, kind, len(times), sum(times) / window) for (name, kind), times in busy.items()]
    return sorted(found, key=lambda kernel: -kernel.share)[:count]
