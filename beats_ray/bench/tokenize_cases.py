"""Patch labels as the labels stage computes them, from int16 samples in host memory to int16 labels there.

Beside them stands what one would write, from waveforms on the device: a filterbank for each clip by torchaudio, and the
published formula. All run in fp32, as the labels stage does.

Shapes: B clips, S samples, N patches, P values of a patch, D width, V codes.
"""

from collections.abc import Callable
from typing import Any

from beats_ray.bench.cases import Step, int16_batch, random_waves
from beats_ray.config import BenchConfig


def random_projection(config: BenchConfig) -> Step:
    from beats_ray.models import RandomProjectionTokenizer

    return _labels_stage(config, RandomProjectionTokenizer())


def distilled(config: BenchConfig) -> Step:
    return _labels_stage(config, fitted_tokenizer(config))


def random_projection_clip_by_clip(config: BenchConfig) -> Step:
    from beats_ray.models import RandomProjectionTokenizer

    tokenizer = RandomProjectionTokenizer().to(config.device)
    return _copied_back(config, lambda wave_BS: label_clip_by_clip(tokenizer, wave_BS))


def distilled_by_formula(config: BenchConfig) -> Step:
    from beats_ray.bench.released_formula import FormulaEncoder

    tokenizer = fitted_tokenizer(config).to(config.device)
    formula = FormulaEncoder(tokenizer.config.encoder)
    formula.take_weights(tokenizer.encoder.state_dict())
    formula = formula.to(config.device).eval()
    return _copied_back(config, lambda wave_BS: label_by_formula(tokenizer, formula, wave_BS))


def fitted_tokenizer(config: BenchConfig) -> Any:
    """A distilled tokenizer with random weights and codes, as it would be past the k-means of its first batches."""
    import torch

    from beats_ray.models import SelfDistilledTokenizer, TokenizerConfig, encoder_config

    torch.manual_seed(config.seed)
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=encoder_config(config.preset))).eval()
    quantizer = tokenizer.quantizer
    quantizer.codebook_VD.copy_(torch.nn.functional.normalize(torch.randn_like(quantizer.codebook_VD), dim=-1))
    quantizer.batches_seen.fill_(tokenizer.config.quantizer.init_batches)
    return tokenizer


def label_clip_by_clip(tokenizer: Any, wave_BS: Any) -> Any:
    """labels_BN of waveforms in [-1, 1] by a random projection, one clip after the other."""
    import torch
    import torch.nn.functional as F

    from beats_ray.bench.released_formula import per_clip_fbank
    from beats_ray.models.config import EncoderConfig

    settings, size = EncoderConfig(), tokenizer.config.patch_size
    labels = []
    for wave_S in wave_BS:
        fbank_BTF = per_clip_fbank(wave_S[None], settings)
        patches_NP = F.unfold(fbank_BTF[None], size, stride=size)[0].t()
        code_ND = F.normalize(patches_NP @ tokenizer.projection_PD, dim=-1)
        labels.append(torch.cdist(code_ND, tokenizer.codebook_VD).argmin(dim=-1))
    return torch.stack(labels)


def label_by_formula(tokenizer: Any, formula: Any, wave_BS: Any) -> Any:
    """labels_BN of waveforms in [-1, 1] by a distilled tokenizer whose encoder is the published formula."""
    import torch.nn.functional as F

    code_BND = F.normalize(tokenizer.to_code(formula(wave_BS)), dim=-1)
    codebook_VD = tokenizer.quantizer.codebook_VD
    distance_BNV = (
        code_BND.square().sum(-1, keepdim=True) + codebook_VD.square().sum(-1) - 2 * code_BND @ codebook_VD.t()
    )
    return distance_BNV.argmin(dim=-1)


def _labels_stage(config: BenchConfig, tokenizer: Any) -> Step:
    import torch

    from beats_ray.tokenize import PatchLabels

    worker, batch = PatchLabels(tokenizer.to(config.device).eval()), int16_batch(config)

    def step() -> None:
        with torch.inference_mode():
            worker(batch.audio_BS.to(config.device), batch.num_samples_B.to(config.device))

    return step


def _copied_back(config: BenchConfig, label: Callable[[Any], Any]) -> Step:
    import numpy as np
    import torch

    wave_BS = random_waves(config).cpu()

    def step() -> None:
        with torch.inference_mode():
            label(wave_BS.to(config.device)).cpu().numpy().astype(np.int16)

    return step
