"""A BEATs encoder as the published formula reads, without any care for speed: the yardstick of `beats-ray bench`.

Filterbanks clip by clip, a position bias for each clip and head kept by every layer, scores, softmax and weighted sum
as separate tensors. Written from the paper and the description of the released model; it takes our weights.
Shapes: B clips, S samples, N patches, D width, H heads, K features a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.compliance.kaldi import fbank as kaldi_fbank  # type: ignore[import-untyped]

from beats_ray.models.attention import relative_bucket
from beats_ray.models.config import EncoderConfig


def per_clip_fbank(wave_BS: Tensor, config: EncoderConfig) -> Tensor:
    """Normalised filterbanks (B, T, F) of waveforms in [-1, 1], one clip after the other through torchaudio."""
    fbanks = [
        kaldi_fbank(wave[None] * 2**15, num_mel_bins=128, sample_frequency=16_000, frame_length=25, frame_shift=10)
        for wave in wave_BS
    ]
    return (torch.stack(fbanks) - config.fbank_mean) / (2 * config.fbank_std)


class FormulaLayer(nn.Module):
    """One post-norm layer; `table` is the relative bias that all layers share."""

    def __init__(self, config: EncoderConfig, table: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.alpha = (2.0 * config.num_layers) ** 0.25 if config.deep_norm else 1.0
        width = config.width
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")}
            | {"grep_linear": nn.Linear(config.head_width, 8), "relative_attention_bias": table}
        )
        self.self_attn.register_parameter("grep_a", nn.Parameter(torch.ones(1, config.num_heads, 1, 1)))
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x_BND: Tensor, bias_BHNN: Tensor) -> Tensor:
        """Returns (B, N, D)."""
        x_BND = self.self_attn_layer_norm(self.alpha * x_BND + self._attend(x_BND, bias_BHNN))
        return self.final_layer_norm(self.alpha * x_BND + self.fc2(F.gelu(self.fc1(x_BND))))

    def _attend(self, x_BND: Tensor, bias_BHNN: Tensor) -> Tensor:
        heads, parts = self.config.num_heads, self.self_attn
        q_BHNK, k_BHNK, v_BHNK = (
            parts[f"{name}_proj"](x_BND).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v")
        )
        gates = parts["grep_linear"](q_BHNK).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        grep_a = self.self_attn.get_parameter("grep_a")
        gate_BHN1 = gates[..., :1] * (gates[..., 1:] * grep_a - 1.0) + 2.0
        gated_BHNN = gate_BHN1 * bias_BHNN
        scores = (q_BHNK / 32.0) @ k_BHNK.transpose(2, 3) / math.sqrt(self.config.head_width)
        scores = (scores - scores.max(dim=-1, keepdim=True).values.detach()) * 32.0
        weights = (scores + gated_BHNN).softmax(dim=-1)
        out: Tensor = parts["out_proj"]((weights @ v_BHNK).transpose(1, 2).flatten(2))
        return out


class FormulaStack(nn.Module):
    """Position convolution and layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        conv = nn.Conv1d(
            config.width, config.width, config.conv_pos_kernel,
            padding=config.conv_pos_kernel // 2, groups=config.conv_pos_groups,
        )  # fmt: skip
        self.pos_conv = nn.ModuleList([nn.utils.parametrizations.weight_norm(conv, dim=2)])
        self.layer_norm = nn.LayerNorm(config.width)
        table = nn.Embedding(config.relative_buckets, config.num_heads)
        self.layers = nn.ModuleList([FormulaLayer(config, table) for _ in range(config.num_layers)])
        self.table = table
        self.config = config

    def forward(self, x_BND: Tensor) -> Tensor:
        """Returns (B, N, D)."""
        patches = x_BND.shape[1]
        conv = self.pos_conv[0](x_BND.transpose(1, 2))[..., :patches]
        x_BND = self.layer_norm(x_BND + F.gelu(conv).transpose(1, 2))
        position_N = torch.arange(patches, device=x_BND.device)
        offset_NN = position_N[None, :] - position_N[:, None]
        bucket_NN = relative_bucket(offset_NN, self.config.relative_buckets, self.config.relative_max_distance)
        bias_BHNN = self.table(bucket_NN).permute(2, 0, 1).unsqueeze(0).repeat(len(x_BND), 1, 1, 1)
        for layer in self.layers:
            x_BND = layer(x_BND, bias_BHNN)
        return x_BND


class FormulaEncoder(nn.Module):
    """The whole encoder: waveforms in [-1, 1] to features (B, N, D). Post-norm and gated, as all released models."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_embed_width, size, stride=size, bias=False)
        self.layer_norm = nn.LayerNorm(config.patch_embed_width)
        self.post_extract_proj = nn.Linear(config.patch_embed_width, config.width)
        self.encoder = FormulaStack(config)

    def forward(self, wave_BS: Tensor) -> Tensor:
        """Returns features_BND."""
        fbank_BTF = per_clip_fbank(wave_BS, self.config)
        patches_BND = self.patch_embedding(fbank_BTF.unsqueeze(1)).flatten(2).transpose(1, 2)
        features: Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches_BND)))
        return features

    def take_weights(self, weights: dict[str, Tensor]) -> None:
        """Loads the weights of a `BeatsEncoder` of the same settings. KeyError where one has no place here."""
        new_names = {
            "pos_conv.0.weight_g": "pos_conv.0.parametrizations.weight.original0",
            "pos_conv.0.weight_v": "pos_conv.0.parametrizations.weight.original1",
        }
        renamed = {"encoder.table.weight": weights["encoder.layers.0.self_attn.relative_attention_bias.weight"]}
        for name, value in weights.items():
            ours = next((old for old in new_names if name.endswith(old)), "")
            renamed[name.removesuffix(ours) + new_names.get(ours, "")] = value
        self.load_state_dict(renamed)
