"""The encoder against independent implementations: PyPI's openbeats, and the published formula spelled out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    EncoderConfig,
    compute_fbank,
    normalise_fbank,
)

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::FutureWarning:openbeats", "ignore:.*weight_norm")]

SMALL: dict[str, Any] = {
    "num_layers": 2, "width": 64, "num_heads": 2, "ffn_width": 96, "patch_embed_width": 48, "conv_pos_kernel": 16,
    "conv_pos_groups": 4,
}  # fmt: skip
CONFIGS = {
    "release": EncoderConfig(**SMALL),
    "odd_kernel": EncoderConfig(**SMALL | {"conv_pos_kernel": 31}),
    "no_projection": EncoderConfig(**SMALL | {"patch_embed_width": 64}),
    "few_buckets": EncoderConfig(**SMALL | {"relative_buckets": 32, "relative_max_distance": 20}),
    "ungated": EncoderConfig(**SMALL | {"gated_relative_bias": False}),
    "post_norm": EncoderConfig(**SMALL | {"deep_norm": False}),
    "pre_norm": EncoderConfig(**SMALL | {"deep_norm": False, "pre_norm": True}),
    "head_64": EncoderConfig(**SMALL | {"width": 128, "num_layers": 3}),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> EncoderConfig:
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: torch.nn.Module) -> None:
    """Weights of a size at which every part shows in the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "relative_attention_bias" in name or "grep" in name:
                parameter.copy_(torch.randn(parameter.shape))
            elif name.endswith("bias") or "weight_g" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.2 * torch.randn(parameter.shape))


def openbeats_encoder(config: EncoderConfig, **options: Any) -> torch.nn.Module:
    module = pytest.importorskip("openbeats.beats_encoder")
    settings = {
        "embed_dim": config.patch_embed_width, "encoder_layers": config.num_layers, "encoder_embed_dim": config.width,
        "encoder_ffn_embed_dim": config.ffn_width, "encoder_attention_heads": config.num_heads,
        "layer_norm_first": config.pre_norm, "deep_norm": config.deep_norm, "conv_pos": config.conv_pos_kernel,
        "conv_pos_groups": config.conv_pos_groups, "relative_position_embedding": True,
        "num_buckets": config.relative_buckets, "max_distance": config.relative_max_distance,
        "gru_rel_pos": config.gated_relative_bias,
    }  # fmt: skip
    encoder: torch.nn.Module = module.BeatsEncoder(0, beats_config=settings, **options)
    return encoder.eval()


def released_weights(theirs: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in theirs.state_dict().items() if "_pad." not in name}


def test_names_and_shapes_are_openbeats_and_load_strictly_both_ways(config: EncoderConfig) -> None:
    theirs, ours = openbeats_encoder(config), BeatsEncoder(config)
    expected = {name: value.shape for name, value in released_weights(theirs).items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    ours.load_state_dict(released_weights(theirs), strict=True)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all("_pad." in name for name in missing)


@pytest.mark.parametrize("samples", [3300, 16_000, 41_234])
def test_features_equal_openbeats(config: EncoderConfig, samples: int) -> None:
    theirs, ours = openbeats_encoder(config), BeatsEncoder(config).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    wave = torch.randn(2, samples) * 0.1
    with torch.no_grad():
        expected, _, _ = theirs(wave, torch.tensor([samples, samples]))
        for backend in ("sdpa", "matmul"):
            ours.use(attention_backend=backend)
            features, _ = ours.extract_features(wave)
            assert features.shape == expected.shape
            assert (features - expected).abs().max() < 1e-4, backend


def test_compact_positions_reproduce_the_public_masked_recipe(config: EncoderConfig) -> None:
    theirs = openbeats_encoder(config, is_pretraining=True)
    compact, true = BeatsEncoder(config, "compact").eval(), BeatsEncoder(config, "true").eval()
    randomise(compact)
    for one in (theirs, true):
        one.load_state_dict(compact.state_dict(), strict=False)
    setattr(theirs, "mask_ratio", 0.75)  # noqa: B010  a plain number on a module
    wave = torch.randn(2, 20_000) * 0.1
    with torch.no_grad():
        expected, _, _, kept = theirs(wave, torch.tensor([20_000, 20_000]))
        visible = torch.stack([row.nonzero().flatten() for row in kept])
        ours = compact.features_from_waveform(wave, visible_BM=visible).features_BND
        assert (ours - expected).abs().max() < 1e-4
        gap = (true.features_from_waveform(wave, visible_BM=visible).features_BND - expected).abs().max()
        assert gap > 1e-2


def reference_bucket(offset: int, config: EncoderConfig) -> int:
    half = config.relative_buckets // 2
    near = half // 2
    distance = abs(offset)
    if distance >= near:
        far = math.log(distance / near) / math.log(config.relative_max_distance / near) * (half - near)
        distance = min(near + int(far), half - 1)
    return distance + (half if offset > 0 else 0)


def reference_attention(state: dict[str, Tensor], prefix: str, x_ND: Tensor, config: EncoderConfig) -> Tensor:
    """One clip, one query at a time, as the paper writes it."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{prefix}{name}.weight"].T + state[f"{prefix}{name}.bias"]

    heads, size = config.num_heads, config.width // config.num_heads
    q, k, v = (linear(name, x_ND).reshape(-1, heads, size) for name in ("q_proj", "k_proj", "v_proj"))
    table = state[f"{prefix}relative_attention_bias.weight"]
    out = torch.zeros_like(q)
    for i in range(len(x_ND)):
        buckets = [reference_bucket(j - i, config) for j in range(len(x_ND))]
        for h in range(heads):
            bias = table[buckets, h]
            if config.gated_relative_bias:
                a, b = linear("grep_linear", q[i, h]).reshape(2, 4).sum(1).sigmoid()
                bias = bias * (a * (b * state[f"{prefix}grep_a"][0, h, 0, 0] - 1) + 2)
            out[i, h] = (k[:, h] @ q[i, h] / math.sqrt(size) + bias).softmax(0) @ v[:, h]
    return linear("out_proj", out.reshape(len(x_ND), -1))


def reference_features(encoder: BeatsEncoder, fbank_TF: Tensor) -> Tensor:
    """The published formula for one normalised clip in fp64, from the description alone."""
    config = encoder.config
    state = {name: value.double() for name, value in encoder.state_dict().items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    grid = F.conv2d(fbank_TF.double()[None, None], state["patch_embedding.weight"], stride=16)
    x = norm("layer_norm", grid[0].flatten(1).T)
    if "post_extract_proj.weight" in state:
        x = x @ state["post_extract_proj.weight"].T + state["post_extract_proj.bias"]
    direction = state["encoder.pos_conv.0.weight_v"]
    kernel = direction / direction.pow(2).sum((0, 1), keepdim=True).sqrt() * state["encoder.pos_conv.0.weight_g"]
    taps = config.conv_pos_kernel
    padded = F.pad(x.T, (taps // 2, taps - 1 - taps // 2))
    conv = F.conv1d(padded[None], kernel, state["encoder.pos_conv.0.bias"], groups=config.conv_pos_groups)[0].T
    x = x + 0.5 * conv * (1 + torch.erf(conv / math.sqrt(2)))
    if not config.pre_norm:
        x = norm("encoder.layer_norm", x)
    alpha = (2 * config.num_layers) ** 0.25 if config.deep_norm else 1.0
    for number in range(config.num_layers):
        layer = f"encoder.layers.{number}."

        def feed_forward(value: Tensor, layer: str = layer) -> Tensor:
            hidden = F.gelu(value @ state[f"{layer}fc1.weight"].T + state[f"{layer}fc1.bias"])
            return hidden @ state[f"{layer}fc2.weight"].T + state[f"{layer}fc2.bias"]

        attention = f"{layer}self_attn."
        if config.pre_norm:
            x = x + reference_attention(state, attention, norm(f"{layer}self_attn_layer_norm", x), config)
            x = x + feed_forward(norm(f"{layer}final_layer_norm", x))
        else:
            attended = reference_attention(state, attention, x, config)
            x = norm(f"{layer}self_attn_layer_norm", alpha * x + attended)
            x = norm(f"{layer}final_layer_norm", alpha * x + feed_forward(x))
    return norm("encoder.layer_norm", x) if config.pre_norm else x


def test_features_equal_the_published_formula(config: EncoderConfig) -> None:
    encoder = BeatsEncoder(config).eval()
    randomise(encoder)
    fbank = torch.randn(1, 55, 128)
    expected = reference_features(encoder, fbank[0])
    features = encoder(fbank).features_BND[0]
    assert features.shape == expected.shape == (24, config.width)
    assert (features - expected).abs().max() < 1e-4


def test_offsets_share_buckets_as_published() -> None:
    from beats_ray.models.attention import relative_bucket

    config = EncoderConfig()
    offsets = torch.arange(-1500, 1501)
    expected = torch.tensor([reference_bucket(int(one), config) for one in offsets])
    # fp32 and fp64 logarithms may fall on different sides of a whole number; nothing else may differ.
    differing = (relative_bucket(offsets, 320, 800) != expected).sum()
    assert differing <= 4


def reference_release_mask(padding_mask: Tensor, runs: int) -> Tensor:
    length = padding_mask.shape[1] // runs
    return torch.stack([padding_mask[:, i * length : (i + 1) * length].all(1) for i in range(runs)], dim=1)


def test_release_compatibility_masks_and_pools_as_the_released_code_does() -> None:
    encoder = BeatsEncoder(CONFIGS["release"])
    model = AudioClassifier(encoder, ClassifierConfig(num_classes=5)).eval()
    randomise(model)
    wave = torch.randn(2, 32_000) * 0.1
    padding = torch.zeros(2, 32_000, dtype=torch.bool)
    padding[1, 18_700:] = True
    wave[1, 18_700:] = 0
    features, mask = encoder.extract_features(wave, padding, compat="release")
    frames = compute_fbank(wave)[0].shape[1]
    expected = reference_release_mask(reference_release_mask(padding, frames), features.shape[1])
    assert mask is not None
    assert torch.equal(mask, expected)
    torch.testing.assert_close(features[0], encoder.extract_features(wave[:1])[0][0], atol=1e-5, rtol=1e-5)
    assert features[1, mask[1]].abs().max() > 0  # the release leaves what it computed at padding
    theirs: Any = openbeats_encoder(CONFIGS["release"])  # its Transformer is the release's
    theirs.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        fbank = normalise_fbank(compute_fbank(wave)[0])
        patches = theirs.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)
        embedded = theirs.post_extract_proj(theirs.layer_norm(patches))
        released = theirs.encoder(embedded, padding_mask=mask)[0]
    assert (features - released).abs().max() < 1e-4
    probabilities, _ = model.extract_features(wave, padding, compat="release")
    logits = model.predictor(features)
    by_hand = torch.stack([logits[clip, ~mask[clip]].mean(0) for clip in range(2)]).sigmoid()
    torch.testing.assert_close(probabilities, by_hand)
    exact, exact_mask = encoder.extract_features(wave, padding)
    assert exact_mask is not None
    assert not torch.equal(exact_mask, mask)
    alone, _ = encoder.extract_features(wave[1:, :18_700])
    torch.testing.assert_close(exact[1, ~exact_mask[1]], alone[0], atol=1e-4, rtol=0)


def test_the_mean_pooled_classifier_is_the_released_formula() -> None:
    model = AudioClassifier(BeatsEncoder(CONFIGS["release"]), ClassifierConfig(num_classes=5)).eval()
    randomise(model)
    wave = torch.randn(2, 16_000) * 0.1
    probabilities, mask = model.extract_features(wave)
    assert mask is None
    features, _ = model.encoder.extract_features(wave)
    torch.testing.assert_close(probabilities, model.predictor(features).mean(1).sigmoid())
