"""Labels computed on the fly are those of a labels stage, also where tokenizer and encoder normalise otherwise."""

from typing import Any

import pytest
import torch

from beats_ray.config import PretrainSettings, validate
from beats_ray.models import (
    QuantizerConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    compute_fbank,
    encoder_config,
    normalise_fbank,
)
from beats_ray.tokenize import PatchLabels
from beats_ray.train.pretrain import PretrainTask, Tokenizer, num_codes_of
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
OWN, OTHER = {"fbank_mean": 11.72, "fbank_std": 10.6}, {"fbank_mean": 9.0, "fbank_std": 4.0}


BATCH = next(SyntheticBatches(4, 4).training(0))


def learned() -> SelfDistilledTokenizer:
    """An untrained tokenizer whose codes are fitted to the batch."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        encoder=encoder_config("tiny", **SMALL, **OWN),
        quantizer=QuantizerConfig(num_codes=64, code_dim=8, init_batches=1),
    )
    tokenizer = SelfDistilledTokenizer(config)
    fbank_BTF, num_frames_B = compute_fbank(BATCH.audio_BS, BATCH.num_samples_B)
    tokenizer(normalise_fbank(fbank_BTF, *OWN.values()), num_frames_B)
    tokenizer.quantizer.end_step(moved=True)
    return tokenizer.eval()


@pytest.mark.parametrize("tokenizer", [learned(), RandomProjectionTokenizer()], ids=["learned", "random"])
def test_labels_on_the_fly_are_those_of_a_labels_stage(tokenizer: Tokenizer) -> None:
    settings = validate(PretrainSettings, {"encoder": {"preset": "tiny", "overrides": SMALL | OTHER}})
    task = PretrainTask(settings, num_codes_of(tokenizer), tokenizer)
    labels_BN = task.prepare(BATCH, torch.Generator(), training=True).inputs[3]
    stage = PatchLabels(tokenizer)(BATCH.audio_BS, BATCH.num_samples_B)["patch_labels"]
    on_the_fly = [row[row >= 0].tolist() for row in labels_BN]
    assert on_the_fly == [row.tolist() for row in stage]
    assert len({label for row in on_the_fly for label in row}) > 10
