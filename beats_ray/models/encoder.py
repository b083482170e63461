"""The BEATs encoder: filterbank patches in, one feature vector for each patch out.

    encoder = build_encoder("base")
    features_BND, is_pad_BN = encoder.features_from_waveform(wave_BS, num_samples_B)[:2]

Shapes: B clips, S samples, T frames, F mel bins, N patches of the grid, M visible patches, D width, P values in a
patch, E patch-embedding width.
Source: paper section 3.1 and the released checkpoints. The parameters have the released names.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beats_ray.models.attention import AttentionBackend
from beats_ray.models.config import EncoderConfig, encoder_config
from beats_ray.models.fbank import compute_fbank, normalise_fbank
from beats_ray.models.layout import count_real
from beats_ray.models.patches import patchify, put_patches, release_patch_padding, take_patches
from beats_ray.models.transformer import PositionConv, TransformerStack

Positions = Literal["true", "compact"]
Compat = Literal["exact", "release"]


class EncoderOutput(NamedTuple):
    """What an encoder returns: features (zeros at padding), which of them are padding, and each layer's on request."""

    features_BND: Tensor
    is_pad_BN: Tensor
    layers: tuple[Tensor, ...] | None = None
    """Input of the first layer, then the output of each layer that ran; None unless `return_layers`."""


class PatchEmbedding(nn.Module):
    """Linear map of a flattened patch; the weight has the shape of the released 2-D convolution's."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, patch_size, patch_size))
        nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, patches_BNP: Tensor) -> Tensor:
        """Returns (B, N, E)."""
        return F.linear(patches_BNP.to(self.weight.dtype), self.weight.flatten(1))


class PositionedStack(TransformerStack):
    """The stack with its convolutional position embedding; the released module named `encoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.pos_conv = nn.ModuleList([PositionConv(config.width, config.conv_pos_kernel, config.conv_pos_groups)])
        self.layer_norm = nn.LayerNorm(config.width)  # after the position embedding, or at the end if pre-norm


class BeatsEncoder(nn.Module):
    """BEATs encoder whose features of a clip depend on that clip alone, whatever its batch-mates and padding.

    positions: "true" keeps each visible patch at its own place of the grid; "compact" closes the gaps that masked
    patches leave, as the public recipe does. Without masking they are the same.
    """

    def __init__(self, config: EncoderConfig, positions: Positions = "true") -> None:
        super().__init__()
        if positions not in ("true", "compact"):
            raise ValueError(f"positions={positions!r} is unknown; use 'true' or 'compact'")
        if positions == "compact" and config.relative_bias_2d:
            raise ValueError(
                "positions='compact' leaves patches without a row and a column; use relative_bias_2d=False"
            )
        self.config = config
        self.positions: Positions = positions
        self.patch_embedding = PatchEmbedding(config.patch_embed_width, config.patch_size)
        self.layer_norm = nn.LayerNorm(config.patch_embed_width)
        self.post_extract_proj = (
            nn.Linear(config.patch_embed_width, config.width) if config.patch_embed_width != config.width else None
        )
        self.encoder = PositionedStack(config)

    def forward(
        self,
        fbank_BTF: Tensor,
        num_frames_B: Tensor | None = None,
        visible_BM: Tensor | None = None,
        layer: int | None = None,
        return_layers: bool = False,
        num_real: int | None = None,
    ) -> EncoderOutput:
        """Encodes normalised filterbanks.

        num_frames_B: frames of each clip before its padding; all where None.
        visible_BM: int64 grid indices of the patches that the encoder may see, ascending, then -1 as padding; all where
        None. The output has one feature for each of them, and nothing of a hidden patch enters it.
        layer: how many layers to run, 0 to `num_layers`; all where None. A partial run of a pre-norm model skips its
        last norm.
        num_real: how many patches of all clips are seen and no padding, where the host knows it: on a GPU padding is
        left out of the layers only then, and the number is believed. ValueError on a CPU where it is wrong.
        """
        depth = self.config.num_layers if layer is None else layer
        if not 0 <= depth <= self.config.num_layers:
            raise ValueError(f"layer={layer} must be between 0 and num_layers={self.config.num_layers}")
        patches_BNP, is_pad_BN = patchify(fbank_BTF, num_frames_B, self.config.patch_size)
        padded = num_frames_B is not None
        return self._encode(
            patches_BNP,
            is_pad_BN,
            visible_BM,
            depth=depth,
            padded=padded,
            return_layers=return_layers,
            num_real=num_real,
        )

    def _encode(
        self,
        patches_BNP: Tensor,
        is_pad_BN: Tensor,
        visible_BM: Tensor | None = None,
        *,
        depth: int,
        padded: bool = True,
        return_layers: bool = False,
        zero_padding: bool = True,
        num_real: int | None = None,
    ) -> EncoderOutput:
        num_patches = patches_BNP.shape[1]
        if visible_BM is not None:
            patches_BNP = take_patches(patches_BNP, visible_BM)
            is_pad_BN = (visible_BM < 0) | is_pad_BN.gather(1, visible_BM.clamp(min=0))
            padded = True
        if padded:
            num_real = count_real(is_pad_BN, num_real)
            padded = num_real != is_pad_BN.numel()
        hidden = is_pad_BN if padded else None
        x = self.layer_norm(self.patch_embedding(patches_BNP))
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        x = self._zero(x, hidden)
        if visible_BM is None or self.positions == "compact":
            position_BM = None
            x = x + self.encoder.pos_conv[0](x)
            num_patches = x.shape[1]
        else:
            position_BM = visible_BM.clamp(min=0)
            grid = put_patches(x, visible_BM, num_patches)
            x = x + take_patches(self.encoder.pos_conv[0](grid), visible_BM)
        if not self.config.pre_norm:
            x = self.encoder.layer_norm(x)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        bias = self.encoder.relative_bias(num_patches, position_BM)
        layers = self.encoder.run_layers(
            x, bias, hidden, depth, every_layer=return_layers, num_real=num_real, zero_padding=zero_padding
        )
        features = layers[-1]
        if self.config.pre_norm and depth == self.config.num_layers:
            features = self.encoder.layer_norm(features)
        if not zero_padding:
            hidden = None
        returned = tuple(self._zero(one, hidden) for one in layers) if return_layers else None
        return EncoderOutput(self._zero(features, hidden), is_pad_BN, returned)

    @staticmethod
    def _zero(x_BND: Tensor, is_pad_BN: Tensor | None) -> Tensor:
        return x_BND if is_pad_BN is None else x_BND.masked_fill(is_pad_BN.unsqueeze(-1), 0.0)

    def features_from_waveform(
        self, wave_BS: Tensor, num_samples_B: Tensor | None = None, **options: Any
    ) -> EncoderOutput:
        """Encodes 16 kHz waveforms (int16, or float in [-1, 1]); `options` as for `forward`."""
        fbank_BTF, num_frames_B = self.normalised_fbank(wave_BS, num_samples_B)
        whole = num_samples_B is None and fbank_BTF.shape[1] >= self.config.patch_size
        output: EncoderOutput = self(fbank_BTF, None if whole else num_frames_B, **options)
        return output

    def normalised_fbank(self, wave_BS: Tensor, num_samples_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (fbank_BTF, num_frames_B) of waveforms, normalised as this encoder's input; see `compute_fbank`."""
        fbank_BTF, num_frames_B = compute_fbank(wave_BS, num_samples_B, self.config.num_mel_bins)
        return normalise_fbank(fbank_BTF, self.config.fbank_mean, self.config.fbank_std), num_frames_B

    def extract_features(
        self, wave_BS: Tensor, padding_mask_BS: Tensor | None = None, compat: Compat = "exact"
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (features_BND, is_pad_BN), the second None without a padding mask, as the release does.

        wave_BS: 16 kHz in [-1, 1]. padding_mask_BS: True at padding, which must follow the clip.
        compat: "exact" keeps padding out of everything and returns zeros there; "release" treats padding as the
        released code does, which lets it into the patches at a clip's end and returns what comes out at padding.
        Raises ValueError for a wrong rank or dtype, a NaN, padding before audio, and a clip of under 25 ms.
        """
        output = self.encode_checked(wave_BS, padding_mask_BS, compat)
        return output.features_BND, None if padding_mask_BS is None else output.is_pad_BN

    def encode_checked(self, wave_BS: Tensor, padding_mask_BS: Tensor | None, compat: Compat) -> EncoderOutput:
        """Checks a user's waveforms and encodes them; see `extract_features`."""
        num_samples_B = check_waveform(wave_BS, padding_mask_BS)
        if compat not in ("exact", "release"):
            raise ValueError(f"compat={compat!r} is unknown; use 'exact' or 'release'")
        if padding_mask_BS is None or compat == "exact":
            return self.features_from_waveform(wave_BS, num_samples_B)
        fbank_BTF, _ = self.normalised_fbank(wave_BS)
        patches_BNP, _ = patchify(fbank_BTF, None, self.config.patch_size)
        is_pad_BN = release_patch_padding(padding_mask_BS, fbank_BTF.shape[1], patches_BNP.shape[1])
        return self._encode(patches_BNP, is_pad_BN, depth=self.config.num_layers, zero_padding=False)

    def parameter_depths(self) -> dict[str, int]:
        """Depth of every parameter for layer-wise learning rates.

        0: patch embedding and position embedding; k: layer k (the shared relative bias belongs to the first);
        num_layers + 1: what follows the last layer.
        """
        depths = {}
        for name, _ in self.named_parameters():
            if name.startswith("encoder.layers."):
                depths[name] = int(name.split(".")[2]) + 1
            elif name.startswith("encoder.layer_norm.") and self.config.pre_norm:
                depths[name] = self.config.num_layers + 1
            else:
                depths[name] = 0
        return depths

    def use(self, attention_backend: AttentionBackend | None = None, checkpoint_layers: bool | None = None) -> None:
        """Sets how the encoder computes (attention backend, activation checkpointing), not what it computes."""
        self.encoder.use(attention_backend, checkpoint_layers)


def check_waveform(wave_BS: Tensor, padding_mask_BS: Tensor | None) -> Tensor | None:
    """Checks what a user passed in and returns the number of samples of each clip, None where all are whole."""
    if wave_BS.dim() != 2:
        raise ValueError(
            f"wave has shape {tuple(wave_BS.shape)}; it must be (clips, samples): use wave[None] for one clip"
        )
    if wave_BS.is_floating_point() and not torch.isfinite(wave_BS).all():
        clip = int((~torch.isfinite(wave_BS)).any(1).nonzero()[0])
        raise ValueError(f"clip {clip} has a NaN or infinite sample; repair or drop it")
    num_samples_B = None
    shortest = wave_BS.shape[-1]
    if padding_mask_BS is not None:
        if padding_mask_BS.shape != wave_BS.shape or padding_mask_BS.dtype != torch.bool:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask_BS.shape)} and dtype {padding_mask_BS.dtype}; "
                f"it must be bool of the wave's shape {tuple(wave_BS.shape)}, True at padding"
            )
        num_samples_B = (~padding_mask_BS).sum(1)
        if (padding_mask_BS[:, :-1] & ~padding_mask_BS[:, 1:]).any():
            raise ValueError("padding_mask marks samples before a clip's end; padding must follow the audio")
        shortest = int(num_samples_B.min()) if len(num_samples_B) else shortest
    if shortest < 400:
        raise ValueError(f"a clip has {shortest} samples besides padding; it needs at least 400 (25 ms at 16 kHz)")
    return num_samples_B


def build_encoder(preset: str = "base", positions: Positions = "true", **overrides: Any) -> BeatsEncoder:
    """Returns a new encoder of a preset size; weights come from torch's global generator (`torch.manual_seed`)."""
    return BeatsEncoder(encoder_config(preset, **overrides), positions)
