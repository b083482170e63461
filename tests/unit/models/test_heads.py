"""The classifier: who votes, what is learned, and what a user gets back."""

from typing import Any

import pytest
import torch

from beats_ray.models import AudioClassifier, ClassifierConfig, build_encoder

pytestmark = pytest.mark.unit


def classifier(pooling: Any = "mean", dropout: float = 0.0) -> AudioClassifier:
    torch.manual_seed(0)
    config = ClassifierConfig(num_classes=3, pooling=pooling, dropout=dropout)
    model = AudioClassifier(build_encoder("tiny"), config, ["dog", "rain", "clock"]).eval()
    if model.attention_score is not None:
        torch.nn.init.normal_(model.attention_score.weight)
    return model


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_logits_do_not_depend_on_batch_mates_or_padding(pooling: str) -> None:
    model = classifier(pooling)
    fbank = torch.randn(3, 120, 128)
    logits = model(fbank, torch.tensor([120, 50, 0]))
    torch.testing.assert_close(logits[0], model(fbank[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1], model(fbank[1:2, :50])[0], atol=1e-5, rtol=1e-4)
    assert (logits[2] == 0).all()


def test_mean_pooling_gives_every_real_patch_one_vote_and_attention_weighs_them() -> None:
    fbank, frames = torch.randn(1, 120, 128), torch.tensor([64])
    for pooling, alike in (("mean", True), ("attention", False)):
        output = classifier(pooling).classify(fbank, frames)
        mean = output.patch_logits_BNC[0, ~output.is_pad_BN[0]].mean(0)
        assert torch.allclose(output.logits_BC[0], mean, atol=1e-6) == alike


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_every_parameter_learns_and_depths_cover_them_all(pooling: str) -> None:
    model = classifier(pooling).train()
    logits = model(torch.randn(2, 64, 128), torch.tensor([64, 40]))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    silent = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    # Softmax over patches ignores what is added to all alike.
    assert [name for name in silent if not name.endswith(("k_proj.bias", "attention_score.bias"))] == []
    depths = model.parameter_depths()
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert depths["predictor.weight"] == 5
    assert depths["encoder.patch_embedding.weight"] == 0


def test_dropout_acts_in_training_alone() -> None:
    model = classifier(dropout=0.5)
    fbank = torch.randn(1, 64, 128)
    assert torch.equal(model(fbank), model(fbank))
    model.train()
    assert not torch.equal(model(fbank), model(fbank))


def test_class_names_must_match_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match="2 names for num_classes=3"):
        AudioClassifier(build_encoder("tiny"), ClassifierConfig(num_classes=3), ["dog", "rain"])
