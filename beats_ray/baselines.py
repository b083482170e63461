"""What simple methods reach: the figures to print beside every result.

Two kinds. `clip_band_baseline` judges masked prediction: how well do the visible codes of the same clip and frequency
band predict the hidden ones, without any model? `run_baselines` judges classification: a random forest on MFCC
statistics and a linear model on mean log-mel energies, over the same clips and folds as the frozen probe.

Shapes: B clips, N patches (time-major: index = time x 8 + band), M visible patches, K targets, V codes.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beats_ray.console import Console
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import Place

BANDS = 8  # patches along frequency
MIXTURE_UPDATES = 20  # steps of expectation maximisation; the weights move little after ten
FOREST_TREES = 500
MFCC_COEFFICIENTS = 20
MFCC_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
BASELINE_SEED = 0


class ClipBandScore(NamedTuple):
    """Sums over all targets, as scalars on the labels' device; divide by `num_targets`."""

    loss_sum: Tensor
    """Cross-entropy of the baseline, nats."""
    num_correct: Tensor
    num_targets: Tensor


def clip_band_baseline(
    labels_BN: Tensor, visible_BM: Tensor, target_BK: Tensor, num_codes: int, band_counts_FV: Tensor | None = None
) -> ClipBandScore:
    """Scores the prediction of target codes from the visible codes of the same clip and band.

    labels_BN: codes, -1 at padding. visible_BM, target_BK: patch indices, negative where unused. band_counts_FV: how
    often each code occurs in each band of the data set; counted over this batch's visible patches where None.

    Accuracy: the guess is the most frequent visible code of the clip and band; ties go to the code that the clip, then
    the data set, has more often. Loss: the code's relative frequency in clip and band, in the clip, in the band, in
    everything, and 1/V, mixed with the weights under which the *visible* codes are most likely when each is left out
    of its own counts (deleted interpolation). So nothing is tuned, and no tokenizer is favoured by fixed smoothing.
    """
    labels_BN = labels_BN.long()
    clip, band, code, is_known = _patches(labels_BN, visible_BM)
    counts_BFV = labels_BN.new_zeros((len(labels_BN), BANDS, num_codes), dtype=torch.float32)
    counts_BFV.index_put_((clip, band, code), is_known.float(), accumulate=True)
    clip_BV = counts_BFV.sum(1)
    band_FV = counts_BFV.sum(0) if band_counts_FV is None else band_counts_FV.to(counts_BFV)
    tables = (counts_BFV, clip_BV, band_FV, band_FV.sum(0))
    weights = _mixture_weights(_frequencies(tables, clip, band, code, leave_out=1.0), is_known)
    # Fewer than 1000 patches a clip, so these additions break ties and never overturn a majority.
    ranked_BFV = counts_BFV + 1e-3 * clip_BV.unsqueeze(1) + 1e-1 * band_FV / (1.0 + band_FV.sum())
    guess_BF = ranked_BFV.argmax(-1)
    clip, band, code, is_known = _patches(labels_BN, target_BK)
    likelihood = (_frequencies(tables, clip, band, code, leave_out=0.0) * weights).sum(-1)
    num_correct = ((guess_BF[clip, band] == code) & is_known).sum()
    return ClipBandScore(-likelihood.log().masked_fill(~is_known, 0.0).sum(), num_correct, is_known.sum())


def _patches(labels_BN: Tensor, index_BM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clip, band and code of each place of the indices, and whether it names a patch that is no padding.

    Selecting those would have the host wait for the device, which must say how many there are.
    """
    place_BM = index_BM.clamp(min=0)
    code_BM = labels_BN.gather(1, place_BM)
    is_known_BM = (index_BM >= 0) & (code_BM >= 0)
    clip_BM = torch.arange(len(labels_BN), device=labels_BN.device).unsqueeze(1).expand_as(index_BM)
    return clip_BM.flatten(), (place_BM % BANDS).flatten(), code_BM.clamp(min=0).flatten(), is_known_BM.flatten()


def _frequencies(
    tables: tuple[Tensor, Tensor, Tensor, Tensor], clip: Tensor, band: Tensor, code: Tensor, leave_out: float
) -> Tensor:
    """Relative frequency of each patch's code in its clip and band, clip, band, everything, and one in V."""
    counts_BFV, clip_BV, band_FV, all_V = tables
    pairs = (
        (counts_BFV[clip, band, code], counts_BFV.sum(-1)[clip, band]),
        (clip_BV[clip, code], clip_BV.sum(-1)[clip]),
        (band_FV[band, code], band_FV.sum(-1)[band]),
        (all_V[code], all_V.sum().expand(len(code))),
    )
    columns = [(count - leave_out).clamp(min=0) / (total - leave_out).clamp(min=1) for count, total in pairs]
    return torch.stack([*columns, torch.full_like(columns[0], 1.0 / len(all_V))], dim=-1)


def _mixture_weights(frequencies: Tensor, is_known: Tensor) -> Tensor:
    parts = frequencies.shape[-1]
    weights = frequencies.new_full((parts,), 1.0 / parts)
    for _ in range(MIXTURE_UPDATES):
        shares = frequencies * weights
        shares = (shares / shares.sum(-1, keepdim=True)).masked_fill(~is_known.unsqueeze(-1), 0.0)
        # One imagined count per part: a code that was never visible still gets a likelihood above zero.
        weights = (shares.sum(0) + 1.0) / (is_known.sum() + parts)
    return weights


# --- classification ---------------------------------------------------------------------------------------------------


class AcousticStatistics:
    """A `ClipWorker` without a model: MFCC statistics and mean log-mel energies of each clip."""

    def __init__(self, model: None) -> None:
        from torchaudio.functional import create_dct  # type: ignore[import-untyped]

        del model
        self._dct_FC = create_dct(MFCC_COEFFICIENTS, 128, "ortho")

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        from beats_ray.models import compute_fbank

        fbank_BTF, num_frames_B = compute_fbank(wave_BS, num_samples_B)
        mfcc_BTC = fbank_BTF @ self._dct_FC.to(fbank_BTF.device)
        mfcc, log_mel = [], []
        for index, frames in enumerate(num_frames_B.tolist()):
            mfcc.append(mfcc_statistics(mfcc_BTC[index, :frames]).cpu().numpy())
            log_mel.append(fbank_BTF[index, :frames].mean(0).cpu().numpy())
        return {"mfcc": np.stack(mfcc), "log_mel": np.stack(log_mel)}


def mfcc_statistics(mfcc_TC: Tensor) -> Tensor:
    """Mean, deviation, quantiles and extremes over time of the coefficients, and the deviation of their differences."""
    delta_TC = mfcc_TC.diff(dim=0) if len(mfcc_TC) > 1 else torch.zeros_like(mfcc_TC)
    ranks_QC = mfcc_TC.quantile(mfcc_TC.new_tensor(MFCC_QUANTILES), dim=0)
    return torch.cat([mfcc_TC.mean(0), mfcc_TC.std(0, correction=0), *ranks_QC, delta_TC.std(0, correction=0)])


def run_baselines(
    dataset: Place, num_workers: int = 2, folds: tuple[int, ...] = (), console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """k-fold accuracies of the two classical methods over the data set's folds.

    Returns {"random_forest_mfcc": ..., "mean_log_mel": ...}, each a description and the fields of a `ProbeResult`.
    """
    from beats_ray.clip_table import collect_clips
    from beats_ray.probe import cross_validate, probe_accuracy

    clips = collect_clips(
        dataset,
        read_manifest(dataset),
        AcousticStatistics,
        ("mfcc", "log_mel"),
        folds=folds,
        num_workers=num_workers,
        console=console,
    )
    return {
        "random_forest_mfcc": {
            "description": f"random forest, {FOREST_TREES} trees, on statistics of {MFCC_COEFFICIENTS} MFCCs",
            **asdict(cross_validate(clips.labelled("mfcc"), _forest)),
        },
        "mean_log_mel": {
            "description": "logistic regression on mean log-mel energies",
            **asdict(probe_accuracy(clips.labelled("log_mel"))),
        },
    }


def _forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(FOREST_TREES, n_jobs=-1, random_state=BASELINE_SEED)
