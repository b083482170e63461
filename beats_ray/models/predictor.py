"""Masked patch prediction: the encoder sees some patches, and a small Transformer predicts the labels of others.

Shapes: B clips, T frames, F mel bins, N patches, M visible patches, K targets, D width, V codes, Q codebooks.
Source: paper section 3.2.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from beats_ray.models.config import ModelConfig
from beats_ray.models.encoder import BeatsEncoder
from beats_ray.models.masking import PatchMask
from beats_ray.models.transformer import TransformerStack


class PredictorConfig(ModelConfig):
    """Settings of the label predictor."""

    num_layers: int = 3
    """Transformer layers. ESPnet's statement of the paper: 3."""
    num_codes: int = 1024
    """Labels to choose from: the tokenizer's codebook size. Paper: 1024."""
    num_codebooks: int = Field(default=1, ge=1)
    """Labels of each patch, one from each codebook, predicted by a linear map each. Paper: 1."""
    mask_vector: Literal["zero", "learned"] = "zero"
    """What stands for a masked patch. Paper: zeros; ESPnet: one learned vector."""


class MaskedPatchPredictor(nn.Module):
    """Encoder and label predictor of pre-training.

    The predictor gets the encoded visible patches and one mask vector for each target, in grid order and with the true
    distances in the relative bias. Masked patches that are not targets carry nothing and are left out.
    """

    def __init__(self, encoder: BeatsEncoder, config: PredictorConfig | None = None) -> None:
        super().__init__()
        config = config or PredictorConfig()
        width = encoder.config.width
        self.config = config
        self.encoder = encoder
        self.input_proj = nn.Linear(width, width)
        nn.init.normal_(self.input_proj.weight, std=0.02)
        nn.init.zeros_(self.input_proj.bias)
        self.mask_vector = nn.Parameter(torch.empty(width)) if config.mask_vector == "learned" else None
        if self.mask_vector is not None:
            nn.init.normal_(self.mask_vector, std=0.02)
        self.predictor = TransformerStack(encoder.config.model_copy(update={"num_layers": config.num_layers}))
        self.layer_norm = nn.LayerNorm(width)
        self.code_proj = nn.Linear(width, config.num_codebooks * config.num_codes)  # the maps side by side
        nn.init.normal_(self.code_proj.weight, std=0.02)
        nn.init.zeros_(self.code_proj.bias)

    def forward(self, fbank_BTF: Tensor, num_frames_B: Tensor | None, patch_mask: PatchMask) -> Tensor:
        """Returns logits_BKQV for the targets of the mask; rows of padded targets (index -1) mean nothing.

        With one codebook, as in the paper, logits_BKV.
        """
        visible_BM, target_BK, num_visible, num_targets = patch_mask
        encoded = self.encoder(fbank_BTF, num_frames_B, visible_BM, num_real=num_visible)
        x_BMD = self.input_proj(encoded.features_BND)
        batch, targets = target_BK.shape
        if self.mask_vector is None:
            masks_BKD = x_BMD.new_zeros(batch, targets, x_BMD.shape[2])
        else:
            masks_BKD = self.mask_vector.to(x_BMD.dtype).expand(batch, targets, -1)
        position_BL = torch.cat((visible_BM, target_BK), dim=1)
        is_pad_BL = torch.cat((encoded.is_pad_BN, target_BK < 0), dim=1)
        num_real = None if num_visible is None or num_targets is None else num_visible + num_targets
        # Order means nothing to attention, whose bias knows the places: visible first, targets last saves a shuffle.
        grid = self._grid_patches(fbank_BTF)
        bias_BHLL = self.predictor.relative_bias(grid, position_BL.clamp(min=0))
        x_BLD = torch.cat((x_BMD, masks_BKD), dim=1)
        (x_BKD,) = self.predictor.run_layers(
            x_BLD, bias_BHLL, is_pad_BL, first_wanted=visible_BM.shape[1], num_real=num_real, num_wanted=num_targets
        )
        logits: Tensor = self.code_proj(self.layer_norm(x_BKD))
        books = self.config.num_codebooks
        return logits if books == 1 else logits.unflatten(-1, (books, self.config.num_codes))

    def _grid_patches(self, fbank_BTF: Tensor) -> int:
        config = self.encoder.config
        return max(fbank_BTF.shape[1] // config.patch_size, 1) * (fbank_BTF.shape[2] // config.patch_size)
