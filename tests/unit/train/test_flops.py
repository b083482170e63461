"""The FLOP formulas against PyTorch's counter on the real modules, and the table of GPUs.

`FlopCounterMode` counts matrix products, convolutions and fused attention, as the formulas do. Attention is spelled out
(`matmul`) and kept for the backward pass, because a recomputed product would be counted again. Two things differ:

- a position convolution with an even kernel computes one place more than the grid has, which is thrown away;
- the counter forgets the groups of a convolution in its weights' gradient, so the test counts that product itself.
"""

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beats_ray.config import DistillConfig, FinetuneConfig, PretrainConfig, load_config
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    EncoderConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    describe_model,
    encoder_config,
    num_patches,
    sample_patch_mask,
)
from beats_ray.models.transformer import TransformerStack, pack_below
from beats_ray.train.distill import DistillTask
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.flops import (
    encoder_flops,
    inference_flops,
    masked_counts,
    patches_of,
    peak_flops,
    step_flops_per_clip,
    tokenizer_flops,
)
from beats_ray.train.pretrain import PretrainTask

pytestmark = pytest.mark.unit

ConfigT = TypeVar("ConfigT", PretrainConfig, DistillConfig)
SECONDS = 2.0
FRAMES, PATCHES = 198, 96
CLIPS = 2


def conv_backward(
    grad: Sequence[int], x: Sequence[int], w: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """Gradients of input and weights: each as many products as the forward pass, whose weights have the groups."""
    per_place = w[0] * w[1] * w[2]
    return 2 * 2 * grad[0] * grad[2] * per_place


def counted(module: torch.nn.Module, *inputs: object) -> int:
    """FLOPs of one forward pass and, where it returns a loss, of the backward pass."""
    for stack in module.modules():
        if isinstance(stack, TransformerStack):
            stack.use("matmul")
            stack.recompute = False
    mapping = {torch.ops.aten.convolution_backward: conv_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        output = module(*inputs)
        if isinstance(output, tuple) and torch.is_tensor(output[0]) and output[0].requires_grad and not output[0].dim():
            output[0].backward()
    return counter.get_total_flops()


def fbank() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(CLIPS, FRAMES, 128), torch.full((CLIPS,), FRAMES)


def config_of(kind: type[ConfigT], preset: str, *overrides: str) -> ConfigT:
    return load_config(kind, None, [f"data.clip_seconds={SECONDS}", f"encoder.preset={preset}", *overrides], output="o")


def one_place(config: EncoderConfig) -> int:
    """What the position convolution computes for the place that is thrown away."""
    return 2 * config.width * (config.width // config.conv_pos_groups) * config.conv_pos_kernel


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize("layers", [None, 0, 2])
def test_a_forward_pass_of_the_encoder(preset: str, layers: int | None) -> None:
    config = encoder_config(preset)
    encoder = BeatsEncoder(config).eval()
    with torch.no_grad():
        flops = counted(_Partial(encoder, layers), *fbank())
    expected = CLIPS * encoder_flops(config, PATCHES, layers=layers)
    assert flops == expected + CLIPS * one_place(config)


class _Partial(torch.nn.Module):
    def __init__(self, encoder: BeatsEncoder, layers: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = layers

    def forward(self, fbank_BTF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        return self.encoder(fbank_BTF, num_frames_B, layer=self.layers).features_BND


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("encoder.positions=compact",),
        ("masking.max_targets=10",),
        ("masking.ratio=0.5", "predictor.num_layers=1"),
        ("encoder.overrides.gated_relative_bias=false", "encoder.overrides.patch_embed_width=128"),
    ],
)
def test_a_step_of_masked_pre_training(preset: str, overrides: tuple[str, ...]) -> None:
    config = config_of(PretrainConfig, preset, "labels=elsewhere", *overrides)
    tokenizer = RandomProjectionTokenizer()
    task = PretrainTask(config, 1024, tokenizer)
    values, frames_B = fbank()
    padding = torch.zeros(CLIPS, PATCHES, dtype=torch.bool)
    chosen = config.masking
    mask = sample_patch_mask(padding, chosen.ratio, torch.Generator(), chosen.block_size, chosen.max_targets)
    labels_BN = torch.randint(1024, (CLIPS, PATCHES))
    flops = counted(task.module, values, frames_B, mask, labels_BN)
    expected = step_flops_per_clip("pretrain", config, describe_model(tokenizer))
    assert flops == CLIPS * (expected + 3 * one_place(config.encoder.resolve()))
    assert 3 * one_place(config.encoder.resolve()) < 0.01 * expected


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize("teacher_layer", [None, 2])
def test_a_step_of_tokenizer_training(preset: str, teacher_layer: int | None) -> None:
    overrides = [] if teacher_layer is None else [f"tokenizer.teacher_layer={teacher_layer}"]
    config = config_of(DistillConfig, preset, *overrides)
    teacher = BeatsEncoder(encoder_config("tiny", width=64, num_layers=3))
    task = DistillTask(config, teacher)
    quantizer = task.module.model.tokenizer.quantizer
    quantizer.codebook_VD.normal_()
    quantizer.batches_seen.fill_(config.tokenizer.init_batches)  # past k-means
    values, frames_B = fbank()
    features_BND = torch.randn(CLIPS, PATCHES, 64)
    flops = counted(task.module, values, frames_B, features_BND)
    with torch.no_grad():
        flops += counted(_Partial(teacher, teacher_layer), values, frames_B)
    expected = step_flops_per_clip("distill", config, describe_model(teacher))
    extra = 3 * one_place(config.encoder.resolve()) + one_place(teacher.config)
    assert flops == CLIPS * (expected + extra)
    assert extra < 0.01 * expected


def test_a_step_of_tokenizer_training_with_a_fine_tuned_teacher() -> None:
    config = config_of(DistillConfig, "tiny", "tokenizer.num_codes=64")
    teacher = AudioClassifier(BeatsEncoder(encoder_config("tiny", width=64, num_layers=3)), ClassifierConfig()).eval()
    task = DistillTask(config, teacher)
    quantizer = task.module.model.tokenizer.quantizer
    quantizer.codebook_VD.normal_()
    quantizer.batches_seen.fill_(config.tokenizer.init_batches)  # past k-means
    flops = counted(task.module, *fbank(), torch.randn(CLIPS, PATCHES, 527))
    with torch.no_grad():
        judged = counted(teacher, *fbank())
    place = one_place(teacher.encoder.config)
    assert judged == CLIPS * (inference_flops(describe_model(teacher), SECONDS) + place)
    expected = step_flops_per_clip("distill", config, describe_model(teacher))
    assert flops + judged == CLIPS * (expected + 3 * one_place(config.encoder.resolve()) + place)


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize(("overrides", "passes"), [((), 3), (("pooling=attention",), 3), (("freeze_encoder=true",), 1)])
def test_a_step_of_fine_tuning(preset: str, overrides: tuple[str, ...], passes: int) -> None:
    config = load_config(FinetuneConfig, None, [f"data.clip_seconds={SECONDS}", *overrides], output="o")
    encoder = BeatsEncoder(encoder_config(preset))
    task = FinetuneTask(config, encoder, _Labels())
    values, frames_B = fbank()
    flops = counted(task.module, values, frames_B, torch.eye(7)[:CLIPS])
    expected = step_flops_per_clip("finetune", config, describe_model(encoder), num_classes=7)
    assert flops == CLIPS * (expected + passes * one_place(encoder.config))
    assert passes * one_place(encoder.config) < 0.01 * expected


def test_the_flops_of_an_encoder_that_is_frozen_at_first_are_the_mean_over_the_run() -> None:
    published = describe_model(BeatsEncoder(encoder_config("tiny")))

    def flops(*overrides: str) -> int:
        config = load_config(FinetuneConfig, None, ["data.clip_seconds=2", "train.steps=1000", *overrides], output="o")
        return step_flops_per_clip("finetune", config, published, num_classes=7)

    tuned, frozen = flops(), flops("freeze_encoder=true")
    assert frozen < 0.36 * tuned
    assert flops("freeze_encoder_steps=250") == pytest.approx(0.25 * frozen + 0.75 * tuned, rel=1e-6)


class _Labels:
    label_names = tuple("abcdefg")
    multi_label = False


def test_recomputed_attention_is_not_counted() -> None:
    config = load_config(FinetuneConfig, None, [f"data.clip_seconds={SECONDS}"], output="o")
    encoder = BeatsEncoder(encoder_config("tiny"))
    task = FinetuneTask(config, encoder, _Labels())
    for stack in task.module.modules():
        if isinstance(stack, TransformerStack):
            stack.use("matmul")
    values, frames_B = fbank()
    with FlopCounterMode(display=False) as counter:
        task.module(values, frames_B, torch.eye(7)[:CLIPS])[0].backward()
    by_module = counter.get_flop_counts()["Global"]
    attention = CLIPS * encoder.config.num_layers * 2 * 2 * PATCHES * PATCHES * encoder.config.width
    products = by_module[torch.ops.aten.bmm] + by_module[torch.ops.aten.baddbmm]
    # Three are the formula's; checkpointing computes the scores again and stops when it has what was missing.
    assert products == 3.5 * attention


@pytest.mark.parametrize("seconds", [1.0, 10.0, 25.0])
def test_a_tokenizer_s_forward_pass(seconds: float) -> None:
    config = encoder_config("tiny", num_layers=1)
    patches = patches_of(seconds, config)
    values = torch.randn(1, 16 * patches // 8, 128)
    for tokenizer in (RandomProjectionTokenizer(), SelfDistilledTokenizer(TokenizerConfig(encoder=config))):
        extra = 0
        if isinstance(tokenizer, SelfDistilledTokenizer):
            tokenizer.quantizer.batches_seen.fill_(4)
            extra = -(-patches // 496) * one_place(config)
        pack_below(tokenizer, 0.0)  # the formula counts the padding of the last window
        tokenizer.eval()
        flops = counted(_Labelling(tokenizer), values)
        expected = tokenizer_flops(describe_model(tokenizer), patches)
        assert flops == expected + extra


class _Labelling(torch.nn.Module):
    def __init__(self, tokenizer: torch.nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, fbank_BTF: torch.Tensor) -> torch.Tensor:
        labels: torch.Tensor = self.tokenizer.label_patches(fbank_BTF)
        return labels


def test_labels_computed_on_the_fly_cost_the_tokenizer_s_forward_pass() -> None:
    published = describe_model(RandomProjectionTokenizer())
    written = step_flops_per_clip("pretrain", config_of(PretrainConfig, "tiny", "labels=elsewhere"), published)
    computed = step_flops_per_clip("pretrain", config_of(PretrainConfig, "tiny"), published)
    assert computed - written == tokenizer_flops(published, PATCHES) > 0


@pytest.mark.parametrize("seconds", [0.03, 0.2, 1.0, 5.0, 9.99, 10.0, 30.0])
def test_patches_and_masks_are_those_of_training(seconds: float) -> None:
    config = encoder_config("base")
    patches = patches_of(seconds, config)
    assert patches == num_patches(round(seconds * 16_000))
    for ratio, most in [(0.75, None), (0.0, None), (0.8, 20), (0.99, 1)]:
        masking = load_config(
            PretrainConfig, None, [f"masking.ratio={ratio}", f"masking.max_targets={most or 'null'}"], output="o"
        ).masking
        mask = sample_patch_mask(torch.zeros(1, patches, dtype=torch.bool), ratio, torch.Generator(), max_targets=most)
        assert masked_counts(patches, masking) == (mask.visible_BM.shape[1], mask.target_BK.shape[1])


def test_the_base_encoder_costs_what_is_known_of_it() -> None:
    """About 0.28 TFLOP for a fine-tuning step and 0.15 for a masked one, by rough sums made before there was code."""
    encoder = {"kind": "encoder", "config": {"encoder": encoder_config("base").model_dump()}}
    finetune = load_config(FinetuneConfig, None, [], output="o")
    assert step_flops_per_clip("finetune", finetune, encoder, 527) == pytest.approx(0.28e12, rel=0.1)
    published = describe_model(RandomProjectionTokenizer())
    pretrain = load_config(PretrainConfig, None, [], output="o")
    assert step_flops_per_clip("pretrain", pretrain, published) == pytest.approx(0.15e12, rel=0.15)


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 756.5, 51),
        ("NVIDIA H100 NVL", 835.5, 835.5, 60),
        ("NVIDIA H200", 989.5, 989.5, 67),
        ("NVIDIA L4", 121, 121, 30.3),
        ("NVIDIA L40S", 362.05, 362.05, 91.6),
        ("NVIDIA A10G", 70, 70, 35),
        ("Tesla T4", None, 65, 8.1),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, 14),
        ("NVIDIA B200", 2250, 2250, 75),
        ("NVIDIA GeForce RTX 3090", None, None, None),
        ("NVIDIA A10", None, None, None),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA GH200 480GB", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
    ],
)
def test_the_peak_of_known_gpus(name: str, bf16: float | None, fp16: float | None, fp32: float | None) -> None:
    found = [peak_flops(name, "bf16"), peak_flops(name, "fp16"), peak_flops(name, "fp32")]
    assert found == [None if tera is None else pytest.approx(tera * 1e12) for tera in (bf16, fp16, fp32)]
