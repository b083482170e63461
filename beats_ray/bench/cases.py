"""What is measured: for each benchmark our part first, then what it is compared with.

A case builds a step, a function without arguments that does one unit of work on `config.num_clips` clips. PyTorch and
the models are imported in the case's own process only.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from beats_ray.config import BenchConfig


@dataclass(frozen=True)
class Observation:
    """What a step that runs processes of its own says of itself."""

    seconds: float
    """Of the work, without the start."""
    start_seconds: float
    clips: int
    """That the work went through."""
    peak_mib: float
    """Of all its processes together."""
    data_wait: float | None = None
    """Share of the work in which the training processes stood still for data; None where none train."""
    parts_s: Mapping[str, float] = field(default_factory=dict)
    """Parts of the start by name, and what else is worth a column, seconds."""
    mfu: float | None = None
    """As the training processes report it; None where they know no peak of their device."""


Step = Callable[[], float | Observation | None]
"""Does one unit of work; returns the seconds until its first result where that is a start and not the work itself."""


PlainEncoder = Callable[[BenchConfig], tuple[Any, Callable[[], Any]]]
"""Gives an encoder that is no part of ours, in training mode, and what gives its features_BND of the run's clips."""


@dataclass(frozen=True)
class Cost:
    """Of a step, by formula."""

    flops: float
    """Matrix products, convolutions and Fourier transforms; a multiplication and an addition are two."""
    bytes: float
    """To and from memory."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark."""

    name: str
    build: Callable[[BenchConfig], Step]
    package: str = ""
    """What must be installed beyond our own dependencies."""
    cost: Callable[[BenchConfig], Cost] | None = None
    """By formula: for the floors of `ceilings`, elsewhere for the MFU."""
    beside: str = ""
    """The case that it is compared with; the first one where empty."""
    in_fp32: bool = False
    """Whether it computes in fp32 whatever the precision of the run."""
    workers: int = 1
    """Training processes, each of which needs a GPU of its own on CUDA."""
    joins_a_cluster: bool = False
    """Whether it runs on the cluster that is there, where `output` is set."""
    as_worker: bool = False
    """Whether its process allocates memory as our workers do, for what they would compute."""
    only_on: str = ""
    """The device on which alone there is something to it; any where empty."""
    only_in: str = ""
    """The precision of the run in which alone it is measured; any where empty."""
    names_allocator: bool = False
    """Whether it is a row of its own for our allocator, and the same as another one with `same_allocator`."""

    @property
    def asked_for(self) -> bool:
        """Whether it is measured only where `cases` names it."""
        return self.workers > MOST_WORKERS

    def available(self) -> bool:
        """Whether the package that the case needs is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def is_for(self, config: BenchConfig) -> bool:
        """Whether a run measures it."""
        fits = self.only_on in ("", config.device) and self.only_in in ("", config.precision)
        return fits and not (self.names_allocator and config.same_allocator)


MOST_WORKERS = 4
"""That end-to-end has unless more are asked for."""

Padding = Literal["none", "left out", "computed"]
"""Whether clips have some, and whether the layers compute it."""


def int16_batch(config: BenchConfig) -> Any:
    """A micro-batch of the run's clips as a stream gives it, in host memory, pinned where a GPU is to read it."""
    import numpy as np

    from beats_ray.data.batches import to_micro_batch

    clips, samples = config.num_clips, round(config.seconds * 16_000)
    audio = (np.random.default_rng(config.seed).normal(size=(clips, samples)) * 3000).astype(np.int16)
    columns = {
        "audio": audio,
        "num_samples": np.full(clips, samples),
        "targets": np.zeros((clips, 0), np.uint8),
        "position": np.arange(clips),
        "clip_id": np.array([f"clip-{index}" for index in range(clips)]),
    }
    return to_micro_batch(columns, pin_memory=config.device == "cuda")


def with_padding(batch: Any) -> Any:
    """The same batch, its first clip a quarter of the length, its last all of it, and in equal steps between."""
    import torch

    shares_B = torch.linspace(0.25, 1.0, len(batch.num_samples_B))
    lengths_B = (batch.num_samples_B * shares_B).long()
    lengths_B = lengths_B.pin_memory() if batch.num_samples_B.is_pinned() else lengths_B
    return replace(batch, num_samples_B=lengths_B, host_num_samples_B=lengths_B)


def training_process(config: BenchConfig) -> Any:
    """The context of the one worker that a case is, with the process group that DeepSpeed asks for."""
    import os

    import torch.distributed as dist

    from beats_ray.train.context import single_process_context

    if config.device == "cuda" and not dist.is_initialized():  # as Ray Train does; a trial's is gloo
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return single_process_context(lambda _step, _metrics: None, use_gpu=config.device == "cuda")


def engine_step(
    config: BenchConfig,
    task: Any,
    train: Any,
    batch: Any,
    *,
    compiled: bool = False,
    padding: Padding = "none",
    ahead: bool = True,
) -> Step:
    """One optimizer step of a worker on this batch, from its copy to the device to AdamW, which is annotated.

    compiled: by PyTorch's compiler (`train.compile`). padding: of a batch `with_padding`; mixup gives a clip the longer
    length of two. ahead: as in the loop, what is copied and prepared before AdamW is the next step's; else it is
    prepared when its step begins.
    """
    import torch

    from beats_ray.bench.kernels import OPTIMIZER
    from beats_ray.models.transformer import pack_below
    from beats_ray.train.engine import Engine

    if padding != "none":
        batch = with_padding(batch)
    if padding == "computed":
        pack_below(task.module, 0.0)
    if compiled:  # as in the loop
        batch = replace(batch, host_num_samples_B=None)
    context = training_process(config)
    engine = Engine(task.module, train.model_copy(update={"compile": compiled}), task.depths())
    generator = torch.Generator(context.device).manual_seed(config.seed)

    def prepare() -> Any:
        return task.prepare(batch.to(context.device), generator, training=True)

    coming = [prepare()] if ahead else []

    def step() -> None:
        prepared = coming.pop() if ahead else prepare()
        loss_sum, _sums = engine(*prepared.inputs)
        engine.backward(loss_sum / prepared.num_targets)
        if ahead:
            prepared = replace(prepared, inputs=())
            coming.append(prepare())
        with torch.profiler.record_function(OPTIMIZER):
            engine.step(0, last_micro_batch=True)

    return step


def random_waves(config: BenchConfig) -> Any:
    """wave_BS, the same for each case of a seed."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    wave_BS = 0.1 * torch.randn(config.num_clips, round(config.seconds * 16_000), generator=generator)
    return wave_BS.to(config.device)


def seeded_encoder(config: BenchConfig) -> Any:
    """The encoder of `config.preset`, with the weights of its seed, in training mode."""
    import torch

    from beats_ray.models import build_encoder

    torch.manual_seed(config.seed)
    return build_encoder(config.preset).to(config.device).train()


def training_step(config: BenchConfig, module: Any, features: Callable[[], Any]) -> Step:
    """Forward and backward of a mean square, with the gradients kept as an optimizer would find them."""
    import torch

    def step() -> None:
        module.zero_grad(set_to_none=False)
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = features().float().square().mean()
        loss.backward()

    return step


def plain_step(config: BenchConfig, encoder: Any, num_classes: int, loss_of: Callable[[Any], Any], train: Any) -> Step:
    """An encoder with a linear head, moved by PyTorch's AdamW as one would write it.

    loss_of: gives the loss, a scalar, of the head; train: settings of our run, whose hyperparameters these are.
    """
    import torch

    from beats_ray.models import encoder_config

    head = torch.nn.Linear(encoder_config(config.preset).width, num_classes).to(config.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=config.device == "cuda" or None,  # on a CPU hardly anybody asks for it
    )

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = loss_of(head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()

    return step


# --- fbank ------------------------------------------------------------------------------------------------------------


def _batched_fbank(config: BenchConfig) -> Step:
    from beats_ray.models import compute_fbank, normalise_fbank

    wave_BS = random_waves(config)
    return lambda: (normalise_fbank(compute_fbank(wave_BS)[0]), None)[1]


def _kaldi_fbank(config: BenchConfig) -> Step:
    from beats_ray.bench.released_formula import per_clip_fbank
    from beats_ray.models import encoder_config

    wave_BS, settings = random_waves(config), encoder_config("tiny")
    return lambda: (per_clip_fbank(wave_BS, settings), None)[1]


# --- one training step of an encoder ----------------------------------------------------------------------------------


def _our_encoder(config: BenchConfig, keeps: bool = False, tap_by_tap: bool = False, flex: bool = False) -> Step:
    encoder, wave_BS = seeded_encoder(config), random_waves(config)
    if flex:
        encoder.use(attention_backend="flex")
    if keeps:
        encoder.encoder.recompute = False
        if config.device == "cpu":
            encoder.use(attention_backend="matmul")
    if tap_by_tap:
        encoder.encoder.pos_conv[0].spectral_clips = config.num_clips + 1
    return training_step(config, encoder, lambda: encoder.features_from_waveform(wave_BS).features_BND)


def _plain_encoder(config: BenchConfig, plain: PlainEncoder) -> Step:
    return training_step(config, *plain(config))


def formula_encoder(config: BenchConfig) -> tuple[Any, Callable[[], Any]]:
    """The published formula's encoder in training mode, and what gives its features_BND of the run's clips."""
    from beats_ray.bench.released_formula import FormulaEncoder
    from beats_ray.models import encoder_config

    formula, wave_BS = FormulaEncoder(encoder_config(config.preset)).to(config.device).train(), random_waves(config)
    return formula, lambda: formula(wave_BS)


def openbeats_encoder(config: BenchConfig) -> tuple[Any, Callable[[], Any]]:
    """ESPnet's encoder in training mode, and what gives its features_BND of the run's clips."""
    import torch
    from openbeats.beats_encoder import BeatsEncoder

    from beats_ray.models import build_encoder
    from beats_ray.models.released import release_settings

    settings = release_settings(build_encoder(config.preset).config)
    theirs: Any = BeatsEncoder(0, beats_config=settings).to(config.device).train()
    wave_BS = random_waves(config)
    length_B = torch.full((config.num_clips,), wave_BS.shape[1], device=config.device)
    return theirs, lambda: theirs(wave_BS, length_B)[0]


# --- one step of masked pre-training ----------------------------------------------------------------------------------


def _masked_step(positions: str) -> Callable[[BenchConfig], Step]:
    def build(config: BenchConfig) -> Step:
        encoder, mask, wave_BS = seeded_encoder(config), sampled_mask(config), random_waves(config)
        encoder.positions = positions
        options = {"visible_BM": mask.visible_BM, "num_real": mask.num_visible}
        return training_step(config, encoder, lambda: encoder.features_from_waveform(wave_BS, **options).features_BND)

    return build


def patches_of_clip(config: BenchConfig) -> int:
    """Of the length of the run's clips."""
    from beats_ray.models import num_patches

    return num_patches(round(config.seconds * 16_000))


def sampled_mask(config: BenchConfig) -> Any:
    """The mask of the run's seed, with the counts of patches that the host of a worker knows."""
    import torch

    from beats_ray.bench.costs import MASKED
    from beats_ray.models import sample_patch_mask

    patches = patches_of_clip(config)
    is_pad_BN = torch.zeros(config.num_clips, patches, dtype=torch.bool, device=config.device)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    return sample_patch_mask(is_pad_BN, MASKED, generator, num_real_B=torch.full((config.num_clips,), patches))


def _lazily(name: str, module: str = "data_cases", **options: Any) -> Callable[[BenchConfig], Step]:
    """A case of another module, imported in the case's own process."""

    def build(config: BenchConfig) -> Step:
        made: Step = getattr(importlib.import_module(f"beats_ray.bench.{module}"), name)(config, **options)
        return made

    return build


def _cost(key: str, **options: Any) -> Callable[[BenchConfig], Cost]:
    """A formula of `costs.py`, which is imported when it is asked."""

    def cost(config: BenchConfig) -> Cost:
        found: Cost = importlib.import_module("beats_ray.bench.costs").COSTS[key](config, **options)
        return found

    return cost


def _with_cost(name: str, key: str, only_in: str = "") -> Case:
    """A case of `ceiling_cases`, which has its cost too."""
    return Case(name, _lazily(key, "ceiling_cases"), cost=_cost(key), as_worker=True, only_in=only_in)


def _workers(workers: int) -> Case:
    """Pre-training on so many of them."""
    build = _lazily("pipeline", "end_to_end_cases", workers=workers)
    return Case(f"{workers} workers", build, workers=workers, joins_a_cluster=True)


def _growing(name: str, build: Callable[..., Callable[[BenchConfig], Step]], **options: Any) -> tuple[Case, ...]:
    """A stage on 1, 10 and 100 times the clips, beside that on them once; options: of its case."""
    return tuple(
        Case(name if times == 1 else f"{name}, {times}x the clips", build(times=times), beside=name, **options)
        for times in (1, 10, 100)
    )


def _sweep(trials: int) -> Case:
    build = _lazily("sweep_stage", "stage_cases", trials=trials)
    return Case(f"sweep of {trials} trials", build, beside="sweep of 4 trials")


def _padded(name: str, module: str, padding: Padding) -> Case:
    """Our whole step on clips of unequal lengths."""
    build = _lazily("our_step", module, padding=padding)
    return Case(f"{name}, padding {padding}", build, beside=f"{name}, padding left out", as_worker=True)


def _pretraining_step(name: str, beside: str, **options: Any) -> Case:
    """Ours, whole; options: of `engine_step`."""
    build = _lazily("our_step", "pretrain_cases", **options)
    return Case(name, build, cost=_cost("pretraining_step"), beside=beside, as_worker=True)


def _finetuning_step(name: str, beside: str, compiled: bool = False) -> Case:
    """Ours, whole."""
    build = _lazily("our_step", "finetune_cases", compiled=compiled)
    return Case(name, build, cost=_FINETUNING, beside=beside, as_worker=True)


_WHOLE_STEP = "whole step of a worker, 75 % masked"
_PRETRAINING = "pre-training step, 75 % masked"
_FINE_TUNING = "fine-tuning step, 527 classes"
_FORMULA_STEP = partial(_plain_encoder, plain=formula_encoder)
_OPENBEATS_STEP = partial(_plain_encoder, plain=openbeats_encoder)
_ENCODER = _cost("encoder_step")
_FINETUNING = _cost("finetuning_step")
_RANDOM_LABELS = _cost("random_labels")
_OUR_ALLOCATOR: dict[str, Any] = {"as_worker": True, "only_on": "cpu", "names_allocator": True}
_DISTILLED_LABELS = _cost("distilled_labels")

ABOUT = {
    "ceilings": "each stage beside what a matrix product and a copy in memory allow",
    "checkpoint": "what resume checkpoints cost, as 50 steps with and without",
    "compiled": "our whole steps, compiled by PyTorch and not",
    "data": "one pass over a data set, beside PyTorch's DataLoader, webdataset and the bare decoder",
    "encoder": "one training step of an encoder, beside the published formula and ESPnet's",
    "end-to-end": "whole runs on a cluster: workers, growing data sets, sweeps, and what a start is made of",
    "fbank": "filterbanks, beside torchaudio clip by clip",
    "finetune": "one whole step of fine-tuning, beside plain PyTorch with the others' encoders",
    "gpu": "all that needs no cluster, on one GPU, and where its time goes; the table comes last",
    "guard": "the ratios of several of these, beside stored ones",
    "padding": "our whole steps on clips of unequal length, padding left out of the layers and computed",
    "pretrain": "one step of masked pre-training, the encoder's and a worker's whole",
    "profile": "the kernels of a whole pre-training step",
    "tokenize": "patch labels, beside what one would write",
}
"""What each benchmark measures."""

BENCHES: dict[str, tuple[Case, ...]] = {
    "ceilings": (
        _with_cost("matrix product", "matrix_product"),
        _with_cost("copy in memory", "memory_copy"),
        _with_cost("filterbank", "filterbank"),
        _with_cost("encoder, forward", "encoder_forward"),
        _with_cost("encoder, forward and backward", "encoder_step"),
        _with_cost("the same, 75 % masked", "masked_encoder_step"),
        _with_cost("labels, random projection", "random_labels", only_in="fp32"),  # as the labels stage computes
        _with_cost("labels, distilled", "distilled_labels", only_in="fp32"),
        _with_cost(_PRETRAINING, "pretraining_step"),
        _with_cost("tokenizer training step", "tokenizer_step"),
        _with_cost(_FINE_TUNING, "finetuning_step"),
    ),
    "fbank": (
        Case("beats_ray, one batch", _batched_fbank, as_worker=True),
        Case("torchaudio, clip by clip", _kaldi_fbank),
        Case("torchaudio, clip by clip, our allocator", _kaldi_fbank, **_OUR_ALLOCATOR),
    ),
    "checkpoint": (
        Case("50 steps, no checkpoint", _lazily("no_checkpoint", "checkpoint_cases"), as_worker=True),
        Case("a checkpoint every 10, beside training", _lazily("beside_training", "checkpoint_cases"), as_worker=True),
        Case(
            "a checkpoint every 10, training waits", _lazily("while_training_waits", "checkpoint_cases"), as_worker=True
        ),
    ),
    "compiled": (
        _pretraining_step(_PRETRAINING, beside=_PRETRAINING),
        _pretraining_step("pre-training step, compiled", beside=_PRETRAINING, compiled=True),
        _finetuning_step(_FINE_TUNING, beside=_FINE_TUNING),
        _finetuning_step("fine-tuning step, compiled", beside=_FINE_TUNING, compiled=True),
    ),
    "data": (
        Case("bare limit: decoder x cores", _lazily("bare_limit")),
        Case("beats_ray stream", _lazily("our_stream")),
        Case("torch DataLoader", _lazily("torch_loader")),
        Case("webdataset", _lazily("webdataset_loader"), package="webdataset"),
    ),
    "encoder": (
        Case("beats_ray", _our_encoder, cost=_ENCODER, as_worker=True),
        Case("beats_ray, attention and GELU kept", partial(_our_encoder, keeps=True), cost=_ENCODER, as_worker=True),
        Case(
            "beats_ray, convolution tap by tap", partial(_our_encoder, tap_by_tap=True), cost=_ENCODER, as_worker=True
        ),
        Case("beats_ray, flex attention", partial(_our_encoder, flex=True), cost=_ENCODER, only_on="cuda"),
        Case("published formula", _FORMULA_STEP, cost=_ENCODER),
        Case("openbeats (ESPnet)", _OPENBEATS_STEP, package="openbeats", cost=_ENCODER),
        Case("published formula, our allocator", _FORMULA_STEP, cost=_ENCODER, **_OUR_ALLOCATOR),
        Case(
            "openbeats (ESPnet), our allocator",
            _OPENBEATS_STEP,
            package="openbeats",
            cost=_ENCODER,
            **_OUR_ALLOCATOR,
        ),
    ),
    "end-to-end": (
        *_growing("1 worker", partial(_lazily, "pipeline", "end_to_end_cases"), joins_a_cluster=True),
        *(_workers(number) for number in (2, 4, 8, 16, 32, 64)),
        *_growing("tokenizer training", partial(_lazily, "pipeline", "end_to_end_cases", kind="distill")),
        *_growing("prepare", partial(_lazily, "prepare_stage", "stage_cases")),
        *_growing("labels", partial(_lazily, "labels_stage", "stage_cases")),
        *_growing("embed", partial(_lazily, "embed_stage", "stage_cases")),
        _sweep(trials=4),
        _sweep(trials=16),
    ),
    "finetune": (
        _finetuning_step("beats_ray", beside=""),
        Case("published formula", _lazily("pooled_step", "finetune_cases", plain=formula_encoder), cost=_FINETUNING),
        Case(
            "openbeats (ESPnet)",
            _lazily("pooled_step", "finetune_cases", plain=openbeats_encoder),
            package="openbeats",
            cost=_FINETUNING,
        ),
    ),
    "padding": (
        _padded("pre-training step", "pretrain_cases", "left out"),
        _padded("pre-training step", "pretrain_cases", "computed"),
        _padded("fine-tuning step", "finetune_cases", "left out"),
        _padded("fine-tuning step", "finetune_cases", "computed"),
    ),
    "pretrain": (
        Case("75 % masked, true positions", _masked_step("true"), cost=_cost("masked_encoder_step"), as_worker=True),
        Case(
            "75 % masked, compact positions",
            _masked_step("compact"),
            cost=_cost("masked_encoder_step", positions="compact"),
            as_worker=True,
        ),
        Case("nothing masked", _our_encoder, cost=_ENCODER, as_worker=True),
        _pretraining_step(_WHOLE_STEP, beside=_WHOLE_STEP),
        _pretraining_step("whole step, nothing prepared ahead", beside=_WHOLE_STEP, ahead=False),
        Case(
            "whole step on every patch, published formula",
            _lazily("every_patch_step", "pretrain_cases", plain=formula_encoder),
            cost=_cost("every_patch_step"),
            beside=_WHOLE_STEP,
        ),
        Case(
            "whole step on every patch, openbeats (ESPnet)",
            _lazily("every_patch_step", "pretrain_cases", plain=openbeats_encoder),
            package="openbeats",
            cost=_cost("every_patch_step"),
            beside=_WHOLE_STEP,
        ),
    ),
    "tokenize": (
        Case(
            "random projection",
            _lazily("random_projection", "tokenize_cases"),
            cost=_RANDOM_LABELS,
            in_fp32=True,
            as_worker=True,
        ),
        Case(
            "random projection, clip by clip",
            _lazily("random_projection_clip_by_clip", "tokenize_cases"),
            cost=_RANDOM_LABELS,
            in_fp32=True,
        ),
        Case(
            "distilled",
            _lazily("distilled", "tokenize_cases"),
            cost=_DISTILLED_LABELS,
            beside="distilled",
            in_fp32=True,
            as_worker=True,
        ),
        Case(
            "distilled, published formula",
            _lazily("distilled_by_formula", "tokenize_cases"),
            cost=_DISTILLED_LABELS,
            beside="distilled",
            in_fp32=True,
        ),
    ),
}
