"""Audio classifier: an encoder, a linear map of every patch, and a mean over the real patches of a clip.

Shapes: B clips, S samples, T frames, F mel bins, N patches, D width, C classes.
Source: released fine-tuned models; paper section 4.1.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from beats_ray.models.config import ModelConfig
from beats_ray.models.encoder import BeatsEncoder, Compat, EncoderOutput


class ClassifierConfig(ModelConfig):
    """Settings of the classification head."""

    num_classes: int = Field(default=527, ge=1)
    """Classes. AudioSet: 527."""
    pooling: Literal["mean", "attention"] = "mean"
    """How patches vote: alike (release), or weighted by a learned score of each patch."""
    multi_label: bool = True
    """Whether a clip may have several classes: then each has a probability of its own (AudioSet, released models)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the features before the linear map; a probability."""


class ClassifierOutput(NamedTuple):
    """Clip logits, and the patch logits they are a mean of."""

    logits_BC: Tensor
    patch_logits_BNC: Tensor
    is_pad_BN: Tensor


class AudioClassifier(nn.Module):
    """Classifies clips; padding has no vote. `predictor` is the released name of the linear map."""

    def __init__(
        self, encoder: BeatsEncoder, config: ClassifierConfig | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.config = config or ClassifierConfig()
        if class_names is not None and len(class_names) != self.config.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names for num_classes={self.config.num_classes}; they must agree"
            )
        self.class_names = list(class_names) if class_names is not None else None
        self.encoder = encoder
        self.predictor = nn.Linear(encoder.config.width, self.config.num_classes)
        nn.init.normal_(self.predictor.weight, std=0.02)
        nn.init.zeros_(self.predictor.bias)
        self.attention_score = nn.Linear(encoder.config.width, 1) if self.config.pooling == "attention" else None
        if self.attention_score is not None:
            nn.init.zeros_(self.attention_score.weight)  # all patches alike at first
            nn.init.zeros_(self.attention_score.bias)

    def forward(self, fbank_BTF: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """Returns logits_BC of normalised filterbanks; 0 for a clip of padding alone."""
        return self.classify(fbank_BTF, num_frames_B).logits_BC

    def classify(
        self, fbank_BTF: Tensor, num_frames_B: Tensor | None = None, num_real: int | None = None
    ) -> ClassifierOutput:
        """Returns clip and patch logits; patch logits are what a supervised teacher offers to a tokenizer.

        Arguments: `BeatsEncoder`'s.
        """
        encoded = self.encoder(fbank_BTF, num_frames_B, num_real=num_real)
        return self.pool(encoded)

    def probabilities(self, logits_BC: Tensor) -> Tensor:
        """Class probabilities in fp32: a sigmoid of each logit where `multi_label`, a softmax over them otherwise."""
        logits_BC = logits_BC.float()
        return logits_BC.sigmoid() if self.config.multi_label else logits_BC.softmax(dim=-1)

    def pool(self, encoded: EncoderOutput) -> ClassifierOutput:
        """Returns clip and patch logits of encoded clips."""
        features_BND, is_pad_BN = encoded.features_BND, encoded.is_pad_BN
        if self.training and self.config.dropout:
            features_BND = F.dropout(features_BND, self.config.dropout)
        patch_logits_BNC = self.predictor(features_BND)
        is_real_BN1 = ~is_pad_BN.unsqueeze(-1)
        if self.attention_score is None:
            weight_BN1 = is_real_BN1 / is_real_BN1.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            score_BN1 = (
                self.attention_score(features_BND).float().masked_fill(~is_real_BN1, torch.finfo(torch.float32).min)
            )
            weight_BN1 = score_BN1.softmax(dim=1) * is_real_BN1
        logits_BC = (patch_logits_BNC * weight_BN1).sum(dim=1)
        return ClassifierOutput(logits_BC, patch_logits_BNC, is_pad_BN)

    def extract_features(
        self, wave_BS: Tensor, padding_mask_BS: Tensor | None = None, compat: Compat = "exact"
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (probabilities_BC, is_pad_BN) as the release's fine-tuned models do.

        The release's models are multi-label; a single-label one returns a softmax. Arguments and errors as for
        `BeatsEncoder.extract_features`.
        """
        encoded = self.encoder.encode_checked(wave_BS, padding_mask_BS, compat)
        logits_BC = self.pool(encoded).logits_BC
        return self.probabilities(logits_BC), None if padding_mask_BS is None else encoded.is_pad_BN

    def parameter_depths(self) -> dict[str, int]:
        """Depth of every parameter for layer-wise learning rates; the head is at num_layers + 1."""
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.parameter_depths().items()}
        head = self.encoder.config.num_layers + 1
        return depths | {name: head for name, _ in self.named_parameters() if name not in depths}
