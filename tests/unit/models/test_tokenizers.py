"""Tokenizers: label order, padding, windows, precision, and what distillation trains."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beats_ray.models import (
    DistillationConfig,
    DistillationModel,
    QuantizerConfig,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    compute_fbank,
    encoder_config,
    normalise_fbank,
)

pytestmark = pytest.mark.unit


def textures(clips: int, frames: int, seed: int = 0) -> Tensor:
    """Filterbanks with structure: slow random spectra that change every few rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = -(-frames // 16)
    slow = F.interpolate(torch.randn(clips, 1, rows, 24, generator=generator), size=(rows * 16, 128), mode="bilinear")
    return slow[:, 0, :frames] + 0.1 * torch.randn(clips, frames, 128, generator=generator)


def distilled(**settings: Any) -> SelfDistilledTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(
        encoder=encoder_config("tiny"), quantizer=QuantizerConfig(num_codes=64, code_dim=32, init_batches=1), **settings
    )
    tokenizer = SelfDistilledTokenizer(config).train()
    with torch.no_grad():
        tokenizer(textures(4, 320))
    tokenizer.quantizer.end_step(moved=True)
    return tokenizer.eval()


ANY = [
    RandomProjectionTokenizer(),
    RandomProjectionTokenizer(RandomProjectionConfig(normalization="standardize")),
    RandomProjectionTokenizer(RandomProjectionConfig(normalization="none")),
    distilled(),
]


@pytest.mark.parametrize("tokenizer", ANY, ids=["l2", "standardize", "none", "distilled"])
def test_labels_of_a_clip_do_not_depend_on_batch_mates_and_padding_is_minus_one(
    tokenizer: RandomProjectionTokenizer | SelfDistilledTokenizer,
) -> None:
    fbank = textures(4, 200)
    frames = torch.tensor([200, 80, 9, 0])
    labels = tokenizer.label_patches(fbank, frames)
    assert labels.dtype == torch.int64
    assert (labels >= 0).sum(1).tolist() == [96, 40, 8, 0]
    for clip, count in enumerate([200, 80, 9]):
        alone = tokenizer.label_patches(fbank[clip : clip + 1, :count])[0]
        assert torch.equal(labels[clip, : len(alone)], alone)
        assert (labels[clip, len(alone) :] == -1).all()


@pytest.mark.parametrize("normalization", ["none", "l2", "standardize"])
def test_random_projection_labels_follow_the_encoders_patch_order(normalization: Any) -> None:
    tokenizer = RandomProjectionTokenizer(RandomProjectionConfig(normalization=normalization))
    fbank = textures(1, 64)
    before = tokenizer.label_patches(fbank)[0]
    changed = fbank.clone()
    changed[0, 32:48, 80:96] = torch.randn(16, 16)  # row 2, column 5
    after = tokenizer.label_patches(changed)[0]
    assert (before != after).nonzero().flatten().tolist() == [2 * 8 + 5]


def test_random_projection_picks_the_nearest_code_under_each_normalization() -> None:
    fbank = textures(1, 32)
    patch = fbank[0, 16:32, 48:64].reshape(-1)  # row 1, column 3
    for normalization in ("none", "l2", "standardize"):
        tokenizer = RandomProjectionTokenizer(RandomProjectionConfig(normalization=normalization))
        value = (patch - patch.mean()) / patch.std(correction=0) if normalization == "standardize" else patch
        projected = value @ tokenizer.projection_PD
        if normalization != "none":
            projected = F.normalize(projected, dim=0)
        nearest = torch.cdist(projected[None], tokenizer.codebook_VD).argmin()
        assert tokenizer.label_patches(fbank)[0, 11] == nearest, normalization


def test_l2_labels_ignore_scale_and_unnormalised_ones_follow_it() -> None:
    fbank = textures(1, 160)
    for normalization, same in (("l2", True), ("none", False)):
        tokenizer = RandomProjectionTokenizer(RandomProjectionConfig(normalization=normalization))
        assert torch.equal(tokenizer.label_patches(fbank), tokenizer.label_patches(3 * fbank)) == same


def test_a_seed_names_one_tokenizer_whatever_the_global_generator_and_precision() -> None:
    torch.manual_seed(1)
    first = RandomProjectionTokenizer()
    torch.manual_seed(2)
    second = RandomProjectionTokenizer().to(torch.bfloat16)
    other = RandomProjectionTokenizer(RandomProjectionConfig(seed=1))
    labels = first.label_patches(textures(2, 160))
    assert torch.equal(labels, second.label_patches(textures(2, 160)))
    assert not torch.equal(labels, other.label_patches(textures(2, 160)))
    assert not list(first.parameters())


def test_long_clips_are_labelled_in_windows_as_their_pieces_would_be() -> None:
    tokenizer = distilled(window_frames=96)
    fbank = textures(2, 300)
    frames = torch.tensor([300, 210])
    labels = tokenizer.label_patches(fbank, frames)
    assert labels.shape == (2, 18 * 8)
    assert (labels >= 0).sum(1).tolist() == [18 * 8, 13 * 8]
    for clip, end in ((0, 288), (1, 208)):
        pieces = [
            tokenizer.label_patches(fbank[clip : clip + 1, start : min(start + 96, end)])[0]
            for start in range(0, end, 96)
        ]
        expected = torch.cat(pieces)
        assert torch.equal(labels[clip, : len(expected)], expected)
    minutes = tokenizer.label_patches(textures(1, 6000))
    assert minutes.shape == (1, 375 * 8)
    assert (minutes >= 0).all()


def test_bf16_encoders_give_nearly_the_same_labels() -> None:
    tokenizer = distilled()
    fbank = textures(6, 400, seed=5)
    labels = tokenizer.label_patches(fbank)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tokenizer.label_patches(fbank) == labels).float().mean() > 0.97
    assert (tokenizer.to(torch.bfloat16).label_patches(fbank) == labels).float().mean() > 0.97


def test_an_unfitted_codebook_gives_no_labels() -> None:
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=encoder_config("tiny")))
    with pytest.raises(ValueError, match="never fitted"):
        tokenizer.label_patches(textures(1, 160))


def test_windows_must_hold_whole_patches() -> None:
    with pytest.raises(ValueError, match="window_frames=100"):
        distilled(window_frames=100)


def test_distillation_learns_its_teacher_and_every_part_takes_part() -> None:
    torch.manual_seed(0)
    model = DistillationModel(distilled(), DistillationConfig(teacher_dim=24)).train()
    fbank = textures(4, 160)
    teacher = torch.randn(128, 24) * 0.1
    target = fbank.reshape(4, 10, 16, 8, 16).mean((2, 4)).reshape(4, 80, 1) * teacher[0] + teacher[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    cosines = []
    for _ in range(12):
        output = model(fbank, None, target)
        assert int(output.num_targets) == 320
        (output.loss_sum / output.num_targets).backward()
        idle = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
        assert [name for name in idle if not name.endswith("k_proj.bias")] == []
        optimizer.step()
        optimizer.zero_grad()
        cosines.append(float(output.metrics["cosine"] / output.num_targets))
    assert cosines[-1] > cosines[0] + 0.3


@pytest.mark.parametrize("per_clip", [False, True])
def test_distillation_sums_over_real_targets_alone(per_clip: bool) -> None:
    model = DistillationModel(distilled(), DistillationConfig(teacher_dim=24)).eval()
    fbank, frames = textures(3, 160), torch.tensor([160, 48, 0])
    teacher = torch.randn(3, 24) if per_clip else torch.randn(3, 80, 24)
    together = model(fbank, frames, teacher)
    assert int(together.num_targets) == (2 if per_clip else 80 + 24)
    alone = [
        model(fbank[:1], None, teacher[:1]),
        model(fbank[1:2, :48], None, teacher[1:2] if per_clip else teacher[1:2, :24]),
    ]
    for name in ("cosine", "code_counts"):
        torch.testing.assert_close(together.metrics[name], alone[0].metrics[name] + alone[1].metrics[name])
    if not per_clip:
        torch.testing.assert_close(together.loss_sum, alone[0].loss_sum + alone[1].loss_sum)


def test_a_teacher_of_another_shape_is_refused() -> None:
    model = DistillationModel(distilled(), DistillationConfig(teacher_dim=24))
    with pytest.raises(ValueError, match="teacher"):
        model(textures(1, 160), None, torch.randn(1, 79, 24))


def release_labels(tokenizer: SelfDistilledTokenizer, wave: Tensor) -> Tensor:
    """The release's formula spelled out: nearest code by squared distance of normalised vectors."""
    features = tokenizer.encoder.extract_features(wave)[0]
    vectors = F.normalize(tokenizer.to_code(features), dim=-1).flatten(0, 1)
    distance = vectors.square().sum(1, keepdim=True) + tokenizer.quantizer.codebook_VD.square().sum(1)
    return (distance - 2 * vectors @ tokenizer.quantizer.codebook_VD.t()).argmin(1)


@torch.no_grad()
def test_labels_of_waveforms_are_those_of_their_filterbanks() -> None:
    wave = torch.randn(2, 32_000) * 0.1
    is_pad = torch.zeros_like(wave, dtype=torch.bool)
    is_pad[1, 12_000:] = True
    fbank, frames = compute_fbank(wave.masked_fill(is_pad, 0.0), torch.tensor([32_000, 12_000]))
    for tokenizer in ANY:
        labels = tokenizer.extract_labels(wave, is_pad)
        assert torch.equal(labels, tokenizer.label_patches(normalise_fbank(fbank, num_frames_B=frames), frames))
        assert torch.equal(labels[1][labels[1] >= 0], tokenizer.extract_labels(wave[1:, :12_000])[0])
        assert (labels < 0).sum(1).tolist() == [0, 12 * 8 - 4 * 8]


@torch.no_grad()
def test_compat_release_labels_all_patches_of_all_clips_in_one_row() -> None:
    tokenizer = distilled()
    wave = torch.randn(2, 32_000) * 0.1
    labels = tokenizer.extract_labels(wave, compat="release")
    assert labels.shape == (2 * 12 * 8,)
    assert (labels == release_labels(tokenizer, wave)).float().mean() > 0.99
    is_pad = torch.zeros_like(wave, dtype=torch.bool)
    is_pad[1, 12_000:] = True
    assert (tokenizer.extract_labels(wave, is_pad, compat="release") >= 0).all()


@pytest.mark.parametrize("compat", ["exact", "release"])
def test_waveforms_that_cannot_be_labelled_are_named(compat: Any) -> None:
    wave = torch.zeros(1, 16_000)
    wave[0, 5] = float("nan")
    with pytest.raises(ValueError, match="clip 0 has a NaN or infinite sample"):
        distilled().extract_labels(wave, compat=compat)
    with pytest.raises(ValueError, match="never fitted"):
        SelfDistilledTokenizer(TokenizerConfig(encoder=encoder_config("tiny"))).extract_labels(
            torch.zeros(1, 16_000), compat=compat
        )
