"""Half precision, absurd inputs, training-only randomness, and errors for bad input."""

import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from beats_ray.models import AudioClassifier, ClassifierConfig, build_encoder, compute_fbank, normalise_fbank
from beats_ray.models.transformer import TransformerLayer

pytestmark = pytest.mark.unit


def wave(kind: str) -> Tensor:
    noise = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    return {
        "quiet": noise * 1e-6,
        "loud": noise.sign(),
        "silent": torch.zeros(2, 8000),
        "huge": noise * 1e30,
        "infinite": torch.full((2, 8000), torch.inf) * noise.sign(),
    }[kind]


@pytest.mark.parametrize("kind", ["quiet", "loud", "silent", "huge", "infinite"])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "float32", "autocast"])
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "clipwise"])
def test_outputs_and_gradients_are_finite_for_any_loudness_in_any_precision(kind: str, mode: str, backend: Any) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    encoder = build_encoder("tiny", num_layers=2).to(dtype).train()
    encoder.use(attention_backend=backend)
    sound = torch.cat((wave(kind), wave(kind)[:1]))
    fbank, frames = compute_fbank(sound, torch.tensor([8000, 5000, 0]))  # the last clip is padding alone
    assert torch.isfinite(fbank).all()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        features = encoder(normalise_fbank(fbank), frames).features_BND
    assert mode == "autocast" or features.dtype == dtype
    features.float().square().mean().backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(one.grad).all() for one in encoder.parameters() if one.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "clipwise"])
def test_attention_scores_beyond_the_range_of_fp16_stay_finite(dtype: torch.dtype, backend: Any) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("tiny", num_layers=2)
    with torch.no_grad():
        for name, one in encoder.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                one.mul_(400.0)
    layer = encoder.encoder.layers[0]
    assert isinstance(layer, TransformerLayer)
    attention = layer.self_attn
    x = torch.nn.functional.layer_norm(torch.randn(32, 128), (128,))
    assert (attention.q_proj(x) @ attention.k_proj(x).t()).abs().max() / 32**0.5 > 100_000
    encoder = encoder.to(dtype).train()
    encoder.use(attention_backend=backend)
    features = encoder(torch.randn(1, 64, 128)).features_BND
    features.float().square().mean().backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(one.grad).all() for one in encoder.parameters() if one.grad is not None)


def test_bf16_features_are_near_fp32_features() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("tiny").eval()
    fbank = torch.randn(1, 160, 128)
    exact = encoder(fbank).features_BND
    half = encoder.to(torch.bfloat16)(fbank).features_BND.float()
    assert torch.nn.functional.cosine_similarity(exact, half, dim=-1).min() > 0.999


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "activation_dropout", "layer_drop"])
def test_randomness_belongs_to_training_alone(field: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {field: 0.5}
    encoder = build_encoder("tiny", **settings)
    fbank = torch.randn(2, 64, 128)
    for backend in ("sdpa", "matmul"):
        encoder.use(attention_backend=backend)
        encoder.train()
        assert not torch.equal(encoder(fbank).features_BND, encoder(fbank).features_BND)
        encoder.eval()
        assert torch.equal(encoder(fbank).features_BND, encoder(fbank).features_BND)


def test_layer_drop_skips_whole_layers_of_single_clips_and_keeps_every_gradient() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("tiny", layer_drop=0.5).train()
    fbank = torch.randn(1, 64, 128).expand(16, -1, -1)
    layers = encoder(fbank, return_layers=True).layers
    assert layers is not None
    for before, after in pairwise(layers):
        skipped = (before == after).flatten(1).all(dim=1)
        assert 0 < skipped.sum() < 16
    layers[-1].sum().backward()
    assert all(one.grad is not None for one in encoder.parameters())


def test_checkpointed_layers_repeat_their_dropout_in_backward() -> None:
    fbank = torch.randn(2, 64, 128)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder("tiny", dropout=0.3, attention_dropout=0.3).train()
        encoder.use(checkpoint_layers=checkpointed)
        torch.manual_seed(1)
        encoder(fbank).features_BND.square().sum().backward()
        gradients.append([one.grad for one in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_one_seed_gives_one_model() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_encoder("tiny").state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert not torch.equal(models[0]["patch_embedding.weight"], models[2]["patch_embedding.weight"])


PADDING = torch.zeros(1, 8000, dtype=torch.bool)


@pytest.mark.parametrize(
    ("sound", "mask", "words"),
    [
        (torch.zeros(8000), None, ["shape (8000,)", "wave[None]"]),
        (torch.zeros(1, 8000, dtype=torch.int64), None, ["int64", "int16, or float"]),
        (torch.full((1, 8000), torch.nan), None, ["clip 0", "NaN"]),
        (torch.zeros(1, 399), None, ["399 samples", "at least 400"]),
        (torch.zeros(1, 8000), ~PADDING, ["0 samples", "at least 400"]),
        (torch.zeros(1, 8000), PADDING[:, :100], ["padding_mask has shape (1, 100)"]),
        (torch.zeros(1, 8000), PADDING.float(), ["float32", "must be bool"]),
        (torch.zeros(1, 8000), torch.arange(8000)[None] < 10, ["before a clip's end"]),
    ],
)
def test_bad_input_is_refused_by_name(sound: Tensor, mask: Tensor | None, words: list[str]) -> None:
    encoder = build_encoder("tiny")
    for module in (encoder, AudioClassifier(encoder, ClassifierConfig(num_classes=2))):
        with pytest.raises(ValueError, match=".*".join(re.escape(word) for word in words)):
            module.extract_features(sound, mask)


def test_importing_the_models_imports_neither_ray_nor_deepspeed() -> None:
    code = (
        "import sys, beats_ray, beats_ray.models as models\n"
        "for name in models.__all__: getattr(models, name)  # the names are imported on first use\n"
        "assert 'beats_ray.models.export' in sys.modules and 'beats_ray.models.released' in sys.modules\n"
        "sys.exit(any(one.split('.')[0] in ('ray', 'deepspeed') for one in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
