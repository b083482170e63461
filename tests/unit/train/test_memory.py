"""The formulas of activation memory against what real modules keep and reach, counted tensor by tensor on a CPU.

`LiveBytes` sees every tensor that an operation makes and asks which of their storages are alive: after the forward pass
what is kept for the backward pass (recomputed attention's inputs too, which saved-tensor hooks do not see), and after
each operation of both passes, for the peak. Fine print of a CPU run: its kernels save layer norms' statistics in the
input's type, and attention that is trained is spelled out (`matmul`) in fp32. That needs what a GPU's kernels need, for
all clips at once, while the CPU's own backend goes clip by clip (`test_a_cpus_own_backend_needs_less`).
"""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from beats_ray.config import DistillConfig, FinetuneConfig, PretrainConfig, TrainSettings, load_config
from beats_ray.models import (
    BeatsEncoder,
    RandomProjectionTokenizer,
    describe_model,
    encoder_config,
    sample_patch_mask,
)
from beats_ray.models.transformer import PositionConv, TransformerStack
from beats_ray.train.distill import DistillTask
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.memory import step_activations, training_state
from beats_ray.train.pretrain import PretrainTask

pytestmark = pytest.mark.unit

SECONDS, FRAMES, PATCHES, CLIPS = 4.0, 398, 192, 2
KEPT_TOLERANCE = 0.02
PEAK_TOLERANCE = 0.1


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive, and the most there ever were."""

    def __init__(self, module: torch.nn.Module, fbank_BTF: torch.Tensor) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known = set()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)  # gradients are the optimizer's business
            self._known |= {one.untyped_storage()._cdata for one in (parameter, parameter.grad)}
        self._known |= {one.untyped_storage()._cdata for one in module.buffers()}
        self._known.add(fbank_BTF.untyped_storage()._cdata)  # views of it are no memory
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for one in tree_iter(output):
            if torch.is_tensor(one) and one.untyped_storage()._cdata not in self._known:
                storage = one.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return output

    def now(self) -> int:
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        return sum(nbytes for _, nbytes in self._made.values())


def measured(module: torch.nn.Module, *inputs: object, half: bool = False, backend: Any = "matmul") -> tuple[int, int]:
    """(kept after the forward pass, peak of both passes), with the inputs."""
    if half:
        module.to(torch.bfloat16)
    for stack in module.modules():
        if isinstance(stack, TransformerStack) and all(one.requires_grad for one in stack.parameters()):
            stack.use(backend)
    torch.manual_seed(0)
    values = torch.randn(CLIPS, FRAMES, 128)
    with LiveBytes(module, values) as live:
        loss = module(values, torch.full((CLIPS,), FRAMES), *inputs)[0]
        kept = live.now()
        loss.backward()
    given = sum(one.nbytes for one in (values, *inputs) if torch.is_tensor(one) and one.is_floating_point())
    return kept + given, live.peak + given


def settings(*overrides: str) -> list[str]:
    sizes = [f"train.micro_batch_size={CLIPS}", f"train.global_batch_size={CLIPS}"]
    return [f"data.clip_seconds={SECONDS}", *sizes, *overrides]


def pretraining(preset: str, *overrides: str) -> tuple[torch.nn.Module, tuple[object, ...], Any]:
    config = load_config(PretrainConfig, None, settings(f"encoder.preset={preset}", *overrides), output="o")
    tokenizer = RandomProjectionTokenizer()
    mask = sample_patch_mask(
        torch.zeros(CLIPS, PATCHES, dtype=torch.bool), 0.75, torch.Generator(), 1, config.masking.max_targets
    )
    labels_BN = torch.randint(1024, (CLIPS, PATCHES))
    task = PretrainTask(config, 1024, tokenizer)
    return (
        task.module,
        (mask, labels_BN),
        lambda **more: step_activations("pretrain", config, describe_model(tokenizer), **more),
    )


def distilling(preset: str, *overrides: str) -> tuple[torch.nn.Module, tuple[object, ...], Any]:
    config = load_config(DistillConfig, None, settings(f"encoder.preset={preset}", *overrides), output="o")
    teacher = BeatsEncoder(encoder_config("tiny", width=512, num_layers=1))
    task = DistillTask(config, teacher)
    quantizer = task.module.model.tokenizer.quantizer
    quantizer.codebook_VD.normal_()
    quantizer.batches_seen.fill_(config.tokenizer.init_batches)
    features_BND = torch.randn(CLIPS, PATCHES, 512)
    return (
        task.module,
        (features_BND,),
        lambda **more: step_activations("distill", config, describe_model(teacher), **more),
    )


def finetuning(preset: str, *overrides: str) -> tuple[torch.nn.Module, tuple[object, ...], Any]:
    config = load_config(FinetuneConfig, None, settings(*overrides), output="o")
    encoder = BeatsEncoder(encoder_config(preset))
    task = FinetuneTask(config, encoder, _Labels())
    return (
        task.module,
        (torch.eye(7)[:CLIPS],),
        lambda **more: step_activations("finetune", config, describe_model(encoder), 7, **more),
    )


class _Labels:
    label_names = tuple("abcdefg")
    multi_label = False


CASES = [
    (pretraining, ()),
    (pretraining, ("encoder.positions=compact",)),
    (pretraining, ("masking.max_targets=20",)),
    (distilling, ()),
    (distilling, ("tokenizer.restart_below=0.1",)),
    (finetuning, ()),
    (finetuning, ("freeze_encoder=true",)),
]


def _name(value: object) -> str:
    return "-".join(value) if isinstance(value, tuple) else str(getattr(value, "__name__", value))


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("build", "overrides"), CASES, ids=_name)
def test_activations_of_a_step(build: Any, overrides: tuple[str, ...], preset: str, checkpointed: bool) -> None:
    module, inputs, estimate = build(preset, *overrides, f"train.activation_checkpointing={checkpointed}".lower())
    kept, peak = measured(module, *inputs)
    expected = estimate()
    assert expected.kept_bytes == pytest.approx(kept, rel=KEPT_TOLERANCE)
    assert expected.peak_bytes == pytest.approx(peak, rel=PEAK_TOLERANCE)


def test_a_cpus_own_backend_needs_less() -> None:
    """Attention clip by clip at the peak; of what is kept, the output of each norm that a layer starts from."""
    kept, peaks = {}, {}
    for backend in ("matmul", "clipwise"):
        module, inputs, _ = finetuning("tiny", "layer_drop=0")  # whose result is no norm's
        kept[backend], peaks[backend] = measured(module, *inputs, backend=backend)
    assert peaks["clipwise"] < 0.95 * peaks["matmul"]
    config = encoder_config("tiny")
    norms = 2 * config.num_layers - 1  # the first layer's input is kept
    expected = norms * CLIPS * PATCHES * config.width * 4
    assert kept["matmul"] - kept["clipwise"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("build", [pretraining, distilling])
def test_activations_in_half_precision(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PositionConv, "convolve_on_cpu", PositionConv.convolve)  # which goes back to fp32
    module, inputs, estimate = build("mini", "train.precision=bf16")
    kept, _ = measured(module, *inputs, half=True)
    assert estimate().kept_bytes == pytest.approx(kept, rel=KEPT_TOLERANCE)


def test_the_inputs_of_all_micro_batches_of_a_step_are_there_at_once() -> None:
    _, _, one = distilling("tiny")
    _, _, four = distilling("tiny", f"train.global_batch_size={4 * CLIPS}")
    assert four().kept_bytes - one().kept_bytes == 3 * CLIPS * PATCHES * (256 + 512) * 4


def test_activation_checkpointing_can_be_asked_for_beside_the_settings() -> None:
    _, _, estimate = finetuning("tiny")
    _, _, checkpointed = finetuning("tiny", "train.activation_checkpointing=true")
    assert estimate(checkpointed=True) == checkpointed()
    assert checkpointed().kept_bytes < estimate().kept_bytes / 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_zero_stage_divides_more_among_the_workers(precision: str) -> None:
    parameters, frozen = 1_000_000, 400
    bucket = {"zero_optimization": {"reduce_bucket_size": 1000}}

    def state(stage: int, workers: int) -> Any:
        train = TrainSettings(
            precision=precision, num_workers=workers, micro_batch_size=1, global_batch_size=8, deepspeed=bucket
        )
        return training_state(stage, train, parameters, frozen)

    size = 4 if precision == "fp32" else 2
    for stage in range(4):
        assert state(stage, 1).moments == 8 * parameters
        assert state(stage, 8).moments == (8 if stage == 0 else 1) * parameters
        assert state(stage, 8).weights == (size * parameters if stage < 3 else size * parameters * 9 // 8) + frozen
        assert state(stage, 1).masters == (0 if stage == 0 and precision == "fp32" else 4 * parameters)
    assert state(2, 8).gradients == parameters // 2
    assert state(1, 8).gradients == (2 if precision == "fp16" else 4) * parameters
    assert state(2, 8).buckets == 1000 * size
    assert state(1, 8).total_bytes > state(2, 8).total_bytes


@pytest.mark.parametrize("stage", range(4))
def test_the_moving_average_is_one_more_value_for_each_master(stage: int) -> None:
    train = {"num_workers": 8, "micro_batch_size": 1, "global_batch_size": 8}
    without = training_state(stage, TrainSettings(**train), 1_000_000, 0)
    averaged = training_state(stage, TrainSettings(**train, ema_decay=0.999), 1_000_000, 0)
    assert averaged.average == (4_000_000 if stage == 0 else 500_000)
    assert averaged.total_bytes - without.total_bytes == averaged.average


def test_what_is_offloaded_lies_in_the_memory_of_the_host() -> None:
    train = {"num_workers": 8, "micro_batch_size": 1, "global_batch_size": 8, "zero_stage": 3}
    parameters, part = 1_000_000, 125_000
    kept = training_state(3, TrainSettings(**train), parameters, 0)
    moved = training_state(3, TrainSettings(**train, offload_optimizer=True), parameters, 0)
    assert (moved.masters, moved.gradients, moved.moments) == (0, 0, 0)
    assert moved.host == 16 * part == kept.total_bytes - moved.total_bytes
    both = TrainSettings(**train, offload_optimizer=True, offload_parameters=True)
    assert training_state(3, both, parameters, 0).weights == 4 * parameters  # those gathered for their use
    assert training_state(3, both, parameters, 0).host == 20 * part
    assert training_state(0, both, parameters, 0).host == 0
