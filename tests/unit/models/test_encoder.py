"""Properties of the encoder: padding, masking, parameter names, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from beats_ray.models import (
    BeatsEncoder,
    MaskedPatchPredictor,
    build_encoder,
    compute_fbank,
    encoder_config,
    normalise_fbank,
    sample_patch_mask,
)
from beats_ray.models.transformer import TransformerStack

pytestmark = pytest.mark.unit


def awake(encoder: BeatsEncoder) -> BeatsEncoder:
    """Weights large enough that every part matters to the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "relative_attention_bias" in name:
                parameter.copy_(noise)
            elif parameter.dim() == 1 or "grep" in name or "weight_g" in name:
                parameter.add_(0.3 * noise)
    return encoder.eval()


@pytest.fixture(scope="module")
def tiny() -> BeatsEncoder:
    torch.manual_seed(0)
    return awake(build_encoder("tiny"))


def clip(seed: int, samples: int) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("preset", ["tiny", "pre_norm"])
@pytest.mark.parametrize("samples", [1200, 4000, 16_000, 20_011, 37_777])
def test_a_clips_features_do_not_depend_on_batch_mates_padding_or_place(preset: str, samples: int) -> None:
    torch.manual_seed(0)
    overrides: dict[str, Any] = {"pre_norm": True, "deep_norm": False} if preset == "pre_norm" else {}
    encoder = awake(build_encoder("tiny", **overrides))
    alone = clip(0, samples)
    expected = encoder.features_from_waveform(alone[None]).features_BND[0]
    for place, padded_length in ((0, 40_000), (2, 48_123)):
        wave = torch.stack([clip(10 + i, padded_length) for i in range(3)])
        wave[place, :samples] = alone  # what follows is noise that must not matter
        count = torch.tensor([5000, 40_000, 40_000])
        count[place] = samples
        output = encoder.features_from_waveform(wave, count)
        real = ~output.is_pad_BN[place]
        assert real.sum() == len(expected)
        assert real[: len(expected)].all()
        torch.testing.assert_close(output.features_BND[place, real], expected, atol=1e-4, rtol=0)
        assert (output.features_BND[place, ~real] == 0).all()


def test_a_batch_of_padding_alone_gives_finite_zeros(tiny: BeatsEncoder) -> None:
    fbank = torch.randn(2, 64, 128)
    output = tiny(fbank, torch.tensor([0, 64]))
    assert (output.features_BND[0] == 0).all()
    torch.testing.assert_close(output.features_BND[1], tiny(fbank).features_BND[1])


def test_nothing_hidden_means_the_plain_encoder(tiny: BeatsEncoder) -> None:
    fbank = torch.randn(2, 80, 128)
    everything = torch.arange(40).expand(2, -1)
    torch.testing.assert_close(tiny(fbank, None, everything).features_BND, tiny(fbank).features_BND, atol=1e-5, rtol=0)


def test_the_content_of_a_hidden_patch_changes_nothing(tiny: BeatsEncoder) -> None:
    fbank = torch.randn(1, 80, 128)
    visible = torch.tensor([[0, 3, 4, 17, 39]])
    expected = tiny(fbank, None, visible).features_BND
    changed = fbank.clone()
    keep = torch.zeros(40, dtype=torch.bool)
    keep[visible[0]] = True
    for patch in range(40):
        if not keep[patch]:
            row, column = divmod(patch, 8)
            changed[0, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 100.0
    assert not torch.equal(changed, fbank)
    torch.testing.assert_close(tiny(changed, None, visible).features_BND, expected, atol=0, rtol=0)


def test_true_positions_tell_where_a_patch_stands_and_compact_ones_cannot() -> None:
    config = encoder_config("tiny")
    fbank = torch.randn(1, 80, 128)
    moved = torch.zeros_like(fbank)
    near, far = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 34]])
    # The same three patches: the third stands at grid place 2, then at 34 = row 4, column 2.
    moved[0, :16, :32] = fbank[0, :16, :32]
    moved[0, 64:80, 32:48] = fbank[0, :16, 32:48]
    for positions, same in (("true", False), ("compact", True)):
        torch.manual_seed(0)
        encoder = awake(BeatsEncoder(config, positions))  # type: ignore[arg-type]
        difference = (encoder(fbank, None, near)[0] - encoder(moved, None, far)[0]).abs().max()
        assert difference < 1e-6 if same else difference > 1e-2, positions


@torch.no_grad()
def test_permuting_which_patches_are_visible_moves_features_accordingly() -> None:
    """Two clips that show the same patches at exchanged places have exchanged features, up to those places alone."""
    torch.manual_seed(0)
    encoder = awake(BeatsEncoder(encoder_config("tiny")))
    fbank = torch.randn(1, 160, 128)
    order = torch.randperm(80)[:20]
    ascending = encoder(fbank, None, order.sort().values[None]).features_BND[0]
    shuffled = encoder(fbank, None, order[None]).features_BND[0]
    assert (shuffled - ascending[order.argsort().argsort()]).abs().max() < 1e-4
    assert (shuffled - ascending).abs().max() > 1e-2


def test_training_keeps_nothing_as_large_as_the_attention_weights() -> None:
    """Sizes of what autograd keeps: one position bias is shared by all layers, nothing else is (B, H, N, N)."""
    encoder = build_encoder("tiny").train()
    clips, patches, heads = 2, 320, 4
    fbank = torch.randn(clips, patches * 2, 128)
    kept: list[int] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.numel())
        return value

    backends: Any = (("auto", True, 0), ("matmul", True, 0), ("matmul", False, 4))
    for backend, recompute, layers in backends:
        encoder.use(attention_backend=backend)
        encoder.encoder.recompute = recompute
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            encoder(fbank)
        large = [size for size in kept if size >= clips * heads * patches * patches]
        assert (len(large) >= layers) if layers else not large, (backend, recompute, large)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = build_encoder("tiny").train()
    encoder(torch.randn(2, 64, 128)).features_BND.square().mul(torch.randn(128)).sum().backward()
    idle = [
        name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    # Softmax ignores what is added to all keys alike.
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_attention_backends_and_recomputation_agree_in_output_and_gradient(
    padded: bool, masked: bool, gated: bool
) -> None:
    torch.manual_seed(0)
    encoder = awake(build_encoder("tiny", gated_relative_bias=gated))
    fbank = torch.randn(2, 96, 128)
    count = torch.tensor([96, 50]) if padded else None
    visible = torch.tensor([[0, 5, 9, 20, 47], [1, 2, 8, 23, -1]]) if masked else None
    results = []
    for backend, layers, attention in (
        ("matmul", False, False),
        ("sdpa", False, False),
        ("sdpa", False, True),
        ("matmul", True, False),
        ("clipwise", False, True),
        ("clipwise", True, True),
    ):
        encoder.use(attention_backend=backend, checkpoint_layers=layers)  # type: ignore[arg-type]
        encoder.encoder.recompute = attention
        encoder.zero_grad()
        features = encoder(fbank, count, visible).features_BND
        (features * torch.linspace(-1, 1, 128)).sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        results.append((features.detach(), gradients))
    for features, gradients in results[1:]:
        torch.testing.assert_close(features, results[0][0], atol=2e-5, rtol=1e-4)
        for mine, first in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(mine, first, atol=1e-3 * float(first.abs().max()) + 1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_norm": True, "deep_norm": False},
        {"layer_drop": 0.4},
        {"dropout": 0.3},
        {"activation_dropout": 0.3},
        {"relative_bias_2d": True},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_what_is_computed_again(options: dict[str, Any]) -> None:
    """Of the encoder and of a predictor behind it, whose last layer wants the masked patches alone."""
    torch.manual_seed(0)
    model = MaskedPatchPredictor(awake(build_encoder("tiny", **options))).train()
    stacks = [one for one in model.modules() if isinstance(one, TransformerStack)]
    for norm in (one for one in model.modules() if isinstance(one, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    fbank, is_pad = torch.randn(4, 96, 128), torch.zeros(4, 48, dtype=torch.bool)
    mask = sample_patch_mask(is_pad, 0.5, torch.Generator())
    gradients = []
    for recompute in (False, True):
        for stack in stacks:
            stack.recompute = recompute
            stack.use("clipwise")
        torch.manual_seed(1)
        loss = model(fbank, None, mask).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(stacks) == 2
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_flex_attention_gives_the_features_of_the_plain_formula(padded: bool, masked: bool, gated: bool) -> None:
    """Forward only: PyTorch has no backward of it on the CPU; tests/gpu compares the gradients."""
    torch.manual_seed(0)
    encoder = awake(build_encoder("tiny", gated_relative_bias=gated)).eval()
    fbank = torch.randn(2, 96, 128)
    count = torch.tensor([96, 50]) if padded else None
    visible = torch.tensor([[0, 5, 9, 20, 47], [1, 2, 8, 23, -1]]) if masked else None
    features = {}
    for backend in ("matmul", "flex"):
        encoder.use(attention_backend=backend)  # type: ignore[arg-type]
        features[backend] = encoder(fbank, count, visible).features_BND
    torch.testing.assert_close(features["flex"], features["matmul"], atol=2e-5, rtol=1e-4)
    assert features["flex"].abs().max() > 0.1


@pytest.mark.parametrize("backend", ["flex", "clipwise"])
def test_some_backends_know_no_dropout_inside_attention(backend: Any) -> None:
    encoder = build_encoder("tiny", attention_dropout=0.1).train()
    encoder.use(attention_backend=backend)
    with pytest.raises(ValueError, match=rf"attention_dropout=0\.1 is not possible with backend='{backend}'"):
        encoder(torch.randn(1, 64, 128))


def test_depths_cover_every_parameter_from_the_embedding_upwards(tiny: BeatsEncoder) -> None:
    depths = tiny.parameter_depths()
    assert depths.keys() == dict(tiny.named_parameters()).keys()
    assert depths["patch_embedding.weight"] == 0
    assert depths["encoder.pos_conv.0.weight_g"] == 0
    assert depths["encoder.layers.3.fc1.weight"] == 4


def test_a_partial_run_returns_what_the_full_run_saw_at_that_layer(tiny: BeatsEncoder) -> None:
    fbank = torch.randn(1, 64, 128)
    full = tiny(fbank, return_layers=True)
    assert full.layers is not None
    assert len(full.layers) == 5
    for layer in range(5):
        torch.testing.assert_close(tiny(fbank, layer=layer).features_BND, full.layers[layer])


def test_extract_features_equals_the_steps_it_names(tiny: BeatsEncoder) -> None:
    wave = clip(0, 16_000)[None]
    fbank, _ = compute_fbank(wave)
    features, mask = tiny.extract_features(wave)
    assert mask is None
    torch.testing.assert_close(features, tiny(normalise_fbank(fbank)).features_BND)


def test_the_base_model_has_the_published_size_and_names() -> None:
    with torch.device("meta"):
        encoder = BeatsEncoder(encoder_config("base"))
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 90.3
    names = set(encoder.state_dict())
    assert {
        "patch_embedding.weight", "layer_norm.weight", "post_extract_proj.bias", "encoder.pos_conv.0.weight_g",
        "encoder.pos_conv.0.weight_v", "encoder.pos_conv.0.bias", "encoder.layer_norm.bias",
        "encoder.layers.11.self_attn.relative_attention_bias.weight", "encoder.layers.5.self_attn.grep_a",
        "encoder.layers.5.self_attn.grep_linear.weight", "encoder.layers.0.final_layer_norm.weight",
    } <= names  # fmt: skip
