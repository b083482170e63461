"""`beats-ray bench profile`: where the time of the pre-training step goes, by PyTorch's profiler.

    beats-ray bench profile device=cuda precision=bf16 clips=64
    beats-ray bench profile preset=tiny clips=2 seconds=2

The step is that of a worker under the engine: the copy of int16 samples, filterbank, masks, forward, backward, clipping
and AdamW; labels come with the batch, as from iteration 2 on. On CUDA these are the kernels on the device and the gaps
between them, on a CPU operators by their own time, and what Python takes between them is a gap.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from beats_ray.bench.kernels import ANNOTATED, FILTERBANK, Kernel, Span, shares, top_kernels, window_us
from beats_ray.bench.measure import allocation
from beats_ray.bench.pretrain_cases import our_step
from beats_ray.bench.processes import Lost, Send, messages_from
from beats_ray.config import BenchConfig
from beats_ray.console import Console

NAME_LENGTH = 90


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes."""

    step_ms: float
    """From the first kernel to the last, profiler included."""
    shares: dict[str, float]
    """By kind; with the gaps they add up to 1."""
    kernels: list[Kernel]


def run_profile(config: BenchConfig, console: Console, as_json: bool = False) -> int:
    """Profiles the step and prints two tables, or one JSON object; returns the exit status."""
    from beats_ray.bench.run import describe, say_nothing

    tell = say_nothing if as_json else console.note
    tell(f"bench profile: {describe(config)}, one step of pre-training")
    profile = profile_apart(config)
    if isinstance(profile, str):
        console.note(f"bench profile failed: {profile.rstrip()}")
        return 1
    if as_json:
        print(json.dumps({"config": config.model_dump(mode="json"), "profile": asdict(profile)}))
    else:
        show_profile(profile, console)
    return 0


def show_profile(profile: Profile, console: Console) -> None:
    """Prints the top kernels, then the shares."""
    rows = [
        [one.name if len(one.name) <= NAME_LENGTH else f"{one.name[: NAME_LENGTH - 3]}...", one.kind, one.calls,
         f"{one.share:.1%}"]
        for one in profile.kernels
    ]  # fmt: skip
    console.table(f"top {len(rows)} kernels of a step", ["kernel", "kind", "calls", "of the time"], rows)
    columns = ["ms/step, profiled", *profile.shares]
    values = [f"{profile.step_ms:.1f}", *(f"{share:.1%}" for share in profile.shares.values())]
    console.table("share of the time", columns, [values])


def profile_apart(config: BenchConfig, deadline: float | None = None) -> Profile | str:
    """The profile, made in a process of its own; or why there is none.

    deadline: on the clock of `time.monotonic`.
    """
    try:
        environment = allocation(config, as_worker=True)
        found: list[Profile | str] = list(messages_from(_send_profile, (config,), deadline, environment))
    except Lost as lost:
        return str(lost)
    return found[0]


def _send_profile(send: Send, config: BenchConfig) -> None:
    try:
        send(profile_step(config))
    except Exception:  # noqa: BLE001  # the parent reports it
        send(traceback.format_exc())


def profile_step(config: BenchConfig) -> Profile:
    """Profiles `config.repetitions` steps in this process, after the warm-up."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(config.threads)
    is_cuda = config.device == "cuda"
    with _annotated_filterbank():
        step = our_step(config)
        for _ in range(max(1, config.warmup)):
            step()
        if is_cuda:
            torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        with profile(activities=activities) as recorded:
            for _ in range(config.repetitions):
                step()
            if is_cuda:
                torch.cuda.synchronize()
    spans = device_spans(recorded.events()) if is_cuda else host_spans(recorded.events())
    kernels = [replace(one, calls=round(one.calls / config.repetitions)) for one in top_kernels(spans)]
    return Profile(window_us(spans) / 1000.0 / config.repetitions, shares(spans), kernels)


@contextmanager
def _annotated_filterbank() -> Iterator[None]:
    """While the block runs the task computes filterbanks under an annotation, which the models themselves have not."""
    import torch

    from beats_ray.train import pretrain

    plain: Callable[..., Any] = pretrain.compute_fbank

    def annotated(*arguments: Any) -> Any:
        with torch.profiler.record_function(FILTERBANK):
            return plain(*arguments)

    pretrain.compute_fbank = annotated  # type: ignore[assignment]
    try:
        yield
    finally:
        pretrain.compute_fbank = plain


# --- from the profiler's events ---------------------------------------------------------------------------------------


def device_spans(events: Any) -> list[Span]:
    """The kernels and copies on the device, under the annotations that the profiler drew on its time line.

    An annotation there goes from the first kernel launched in it to the last; on one stream no other runs in between.
    """
    from torch.autograd import DeviceType

    on_device = [one for one in events if one.device_type == DeviceType.CUDA]
    drawn = [one for one in on_device if _is_annotation(one)]
    spans = []
    for one in on_device:
        if _is_annotation(one):
            continue
        start, end = one.time_range.start, one.time_range.end
        under = tuple(other.name for other in drawn if other.time_range.start <= start and end <= other.time_range.end)
        spans.append(Span(one.name, start, end, end - start, under))
    return spans


def host_spans(events: Any) -> list[Span]:
    """The operators of a CPU, each with its own time and under the annotations that it was called in."""
    spans = []
    for one in events:
        if _is_annotation(one):
            continue
        under, above = [], one.cpu_parent
        while above is not None:
            if _is_annotation(above):
                under.append(above.name)
            above = above.cpu_parent
        spans.append(Span(one.name, one.time_range.start, one.time_range.end, one.self_cpu_time_total, tuple(under)))
    return spans


def _is_annotation(event: Any) -> bool:
    # Those of PyTorch itself (`Optimizer.step#AdamW.step`, `ProfilerStep#1`) too.
    return bool(event.is_user_annotation) or event.name in ANNOTATED
