"""Switches of pre-training and fine-tuning that are not the paper's: each changes what it should, as it should."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beats_ray.config import (
    FinetuneSettings,
    IterateConfig,
    PretrainConfig,
    PretrainSettings,
    TokenizeConfig,
    UserError,
    load_config,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.storage import open_place
from beats_ray.models import (
    BeatsEncoder,
    MaskedPatchPredictor,
    PatchMask,
    PredictorConfig,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    build_encoder,
    describe_model,
    encoder_config,
    load_model,
    save_model,
)
from beats_ray.tokenize import run_tokenize
from beats_ray.train.checks import Inputs, find_mistakes
from beats_ray.train.context import single_process_context
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.flops import step_flops_per_clip
from beats_ray.train.loop import run_training
from beats_ray.train.pretrain import PretrainModule, PretrainTask, num_codebooks_of, num_codes_of
from tests.support.prepared import write_dataset
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
MASK = PatchMask(torch.tensor([[0, 3, 9, 22], [1, 2, 3, 4]]), torch.tensor([[10, 12, 31], [5, 7, -1]]))


def tokenizer_of(codebooks: int, codes: int = 50) -> RandomProjectionTokenizer:
    return RandomProjectionTokenizer(RandomProjectionConfig(num_codes=codes, code_dim=16, num_codebooks=codebooks))


def test_the_first_of_several_codebooks_is_the_only_one_of_a_tokenizer_of_one() -> None:
    fbank_BTF, frames_B = torch.randn(2, 64, 128), torch.tensor([64, 40])
    one_BN, three_BNQ = (tokenizer_of(books).label_patches(fbank_BTF, frames_B) for books in (1, 3))
    assert three_BNQ.shape == (*one_BN.shape, 3)
    assert torch.equal(three_BNQ[..., 0], one_BN)
    real = one_BN >= 0
    assert bool((three_BNQ[~real] == -1).all())
    agree = [(three_BNQ[real][:, a] == three_BNQ[real][:, b]).float().mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert max(agree) < 0.5
    assert int(three_BNQ.max()) < 50


def module_of(codebooks: int, label_smoothing: float = 0.0) -> PretrainModule:
    torch.manual_seed(0)
    config = PredictorConfig(num_layers=1, num_codes=50, num_codebooks=codebooks)
    return PretrainModule(MaskedPatchPredictor(build_encoder("tiny", **SMALL), config), label_smoothing=label_smoothing)


def test_the_loss_of_several_codebooks_is_the_mean_of_theirs_and_accuracy_counts_all() -> None:
    fbank_BTF, module = torch.randn(2, 64, 128), module_of(2)
    labels_BNQ = tokenizer_of(2).label_patches(fbank_BTF)
    logits_BKQV = module.predictor(fbank_BTF, None, MASK)
    assert logits_BKQV.shape == (2, 3, 2, 50)
    expected, correct = torch.zeros(()), 0
    for clip, targets in enumerate(MASK.target_BK.tolist()):
        for place, patch in enumerate(targets):
            for book in range(2) if patch >= 0 else ():
                logits, label = logits_BKQV[clip, place, book], labels_BNQ[clip, patch, book]
                expected += F.cross_entropy(logits, label) / 2
                correct += int(logits.argmax() == label)
    loss, metrics = module(fbank_BTF, None, MASK, labels_BNQ)
    torch.testing.assert_close(loss, expected)
    assert [int(part) for part in metrics["train/masked_accuracy"]] == [correct, 2 * 5]
    assert int(metrics["train/clip_band_loss"][1]) == 2 * 5
    assert torch.equal(metrics["labels/code_counts"], torch.bincount(labels_BNQ[..., 0].flatten(), minlength=50))


def test_each_codebook_has_a_map_of_its_own_that_learns_from_its_labels_alone() -> None:
    fbank_BTF, module = torch.randn(2, 64, 128), module_of(2)
    labels_BNQ = tokenizer_of(2).label_patches(fbank_BTF)
    gradients = []
    for changed in (0, 1):
        other = labels_BNQ.clone()
        other[..., changed] = (other[..., changed] + 1) % 50
        for labels in (labels_BNQ, other):
            module.zero_grad()
            module(fbank_BTF, None, MASK, labels)[0].backward()
            gradients.append(module.predictor.code_proj.weight.grad.clone().unflatten(0, (2, 50)))
        before, after = gradients[-2:]
        assert torch.equal(before[1 - changed], after[1 - changed])
        assert not torch.equal(before[changed], after[changed])


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    fbank_BTF, module = torch.randn(2, 64, 128), module_of(1, label_smoothing=0.2)
    labels_BN = tokenizer_of(1).label_patches(fbank_BTF)
    with torch.no_grad():
        smoothed = module.train()(fbank_BTF, None, MASK, labels_BN)[0]
        plain = module.eval()(fbank_BTF, None, MASK, labels_BN)[0]
        logits_KV = module.predictor(fbank_BTF, None, MASK)[MASK.target_BK >= 0]
    labels_K = torch.cat([labels_BN[0, [10, 12, 31]], labels_BN[1, [5, 7]]])
    own = F.cross_entropy(logits_KV, labels_K, reduction="sum")
    torch.testing.assert_close(plain, own)
    torch.testing.assert_close(smoothed, 0.8 * own - 0.2 * logits_KV.log_softmax(-1).mean(-1).sum())
    assert abs(smoothed - plain) > 1e-3


def test_a_run_on_several_codebooks_learns_and_publishes_a_plain_encoder(tmp_path: Path) -> None:
    train = {
        "steps": 25, "warmup_steps": 2, "learning_rate": 3e-3, "epsilon": 1e-8, "global_batch_size": 4,
        "micro_batch_size": 4, "log_every_steps": 1,
    }  # fmt: skip
    settings = validate(PretrainSettings, {"encoder": {"preset": "tiny", "overrides": SMALL}, "train": train})
    torch.manual_seed(0)
    tokenizer = tokenizer_of(3)
    task = PretrainTask(settings, num_codes_of(tokenizer), tokenizer, num_codebooks=num_codebooks_of(tokenizer))
    losses: list[float] = []
    context = single_process_context(lambda _step, metrics: losses.append(metrics["train/loss"]))
    run_training(task, SyntheticBatches(4, 4), settings.train, context, open_place(str(tmp_path)))
    assert losses[-1] < losses[0] - 0.3
    assert load_model(tmp_path / "model").state_dict().keys() == build_encoder("tiny", **SMALL).state_dict().keys()


def test_the_flops_of_several_codebooks() -> None:
    config = load_config(PretrainConfig, None, ["data.clip_seconds=4", "encoder.preset=tiny"], output="o")
    counts = []
    for books in (1, 3):
        tokenizer = tokenizer_of(books)
        with FlopCounterMode(display=False) as counter:
            tokenizer.label_patches(torch.randn(1, 398, 128))
        on_the_fly = step_flops_per_clip("pretrain", config, describe_model(tokenizer))
        stored = step_flops_per_clip("pretrain", config.model_copy(update={"labels": "l"}), describe_model(tokenizer))
        assert on_the_fly - stored == counter.get_total_flops()
        counts.append(stored)
    targets, width = 192 - 48, 128
    assert counts[1] - counts[0] == 3 * 2 * targets * width * (2 * 50)


def test_a_labels_stage_has_one_codebook_and_says_so(tmp_path: Path) -> None:
    save_model(tokenizer_of(2), tmp_path / "tokenizer")
    write_dataset(tmp_path / "data", ())
    places = {"output": str(tmp_path / "labels"), "tokenizer": str(tmp_path / "tokenizer")}
    config = validate(TokenizeConfig, places | {"data": {"path": str(tmp_path / "data")}})
    with pytest.raises(UserError, match=r"2 labels for each patch.*pre-train without `labels`"):
        run_tokenize(config, Console())
    assert not (tmp_path / "labels").exists()
    asked = load_config(PretrainConfig, None, ["labels=somewhere", f"output={tmp_path}/run"])
    found = find_mistakes("pretrain", asked, Inputs(describe_model(tokenizer_of(2)), None, []))
    assert [line for line in map(str, found) if "leave labels empty" in line]
    assert not find_mistakes("pretrain", asked, Inputs(describe_model(tokenizer_of(1)), None, []))


def test_every_switch_is_a_key_and_off_by_default() -> None:
    config = load_config(IterateConfig, None, ["output=o"])
    switches = {
        "pretrain.masking.ratio": 0.75,
        "pretrain.masking.block_size": 1,
        "pretrain.encoder.positions": "true",
        "pretrain.encoder.overrides.relative_bias_2d": False,
        "pretrain.predictor.num_layers": 3,
        "pretrain.predictor.mask_vector": "zero",
        "pretrain.predictor.label_smoothing": 0.0,
        "random_projection.num_codes": 1024,
        "random_projection.code_dim": 256,
        "random_projection.num_codebooks": 1,
        "random_projection.normalization": "l2",
        "distill.tokenizer.num_codes": 1024,
        "distill.tokenizer.teacher_layer": None,
        "finetune.pooling": "mean",
        "finetune.freeze_encoder": False,
        "finetune.train.average_last": 0,
        "finetune.augment.mixup_of": "waveform",
    }
    values = config.model_dump()
    for name, expected in switches.items():
        found: Any = values
        for part in name.split("."):
            found = getattr(config.pretrain.encoder.resolve(), part) if part == "relative_bias_2d" else found[part]
        assert found == expected, name
        load_config(IterateConfig, None, ["output=o", f"{name}={'null' if expected is None else expected}".lower()])


def finetuning(multi_label: bool = False, **settings: Any) -> FinetuneTask:
    torch.manual_seed(0)
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=multi_label)
    encoder = BeatsEncoder(encoder_config("tiny", **SMALL))
    return FinetuneTask(validate(FinetuneSettings, settings), encoder, manifest)


def test_smoothing_spreads_single_label_targets_in_training_and_leaves_multi_label_ones() -> None:
    fbank_BTF, frames_B, targets_BC = torch.randn(3, 64, 128), torch.full((3,), 64), torch.eye(3)
    for multi_label in (False, True):
        losses = {}
        for smoothing in (0.0, 0.3):
            module = finetuning(multi_label, label_smoothing=smoothing, layer_drop=0.0).module
            for mode in (True, False):
                losses[smoothing, mode] = float(module.train(mode)(fbank_BTF, frames_B, targets_BC)[0])
        assert (losses[0.3, True] == losses[0.0, True]) is multi_label
        assert losses[0.3, False] == losses[0.0, False]
    log_BC = finetuning(layer_drop=0.0).module.eval().classifier(fbank_BTF, frames_B).log_softmax(-1)
    spread_BC = 0.7 * targets_BC + 0.1
    smoothed = finetuning(label_smoothing=0.3, layer_drop=0.0).module.train()(fbank_BTF, frames_B, targets_BC)[0]
    torch.testing.assert_close(smoothed, -(spread_BC * log_BC).sum())


def test_the_head_that_pools_by_attention_is_published_as_such(tmp_path: Path) -> None:
    task = finetuning(pooling="attention")
    task.publish(task.module.state_dict(), tmp_path / "model")
    assert load_model(tmp_path / "model").config.pooling == "attention"
    assert finetuning().module.classifier.attention_score is None


@pytest.mark.parametrize("mixup_of", ["waveform", "fbank"])
def test_what_is_mixed_is_what_was_asked_for(mixup_of: str) -> None:
    augment = {"mixup": 0.8, "roll_seconds": 0.0, "num_time_masks": 0, "num_freq_masks": 0}
    batch = next(SyntheticBatches(8, 8).training(0))
    mixed, plain = (
        finetuning(augment=augment | changes).prepare(batch, torch.Generator().manual_seed(0), training=True).inputs
        for changes in ({"mixup_of": mixup_of}, {"mixup": 0.0})
    )
    torch.testing.assert_close(mixed[2].sum(1), torch.ones(8))
    assert not torch.equal(mixed[2], plain[2])
    clip = int((mixed[2].max(1).values - 0.7).abs().argmin())
    share = float(mixed[2][clip].max())
    partners = [one for one in range(8) if one != clip]
    frames = int(plain[1].min())
    linear = [share * plain[0][clip, :frames] + (1 - share) * plain[0][one, :frames] for one in partners]
    nearest = min(float((mixed[0][clip, :frames] - one).abs().max()) for one in linear)
    assert (nearest < 1e-4) is (mixup_of == "fbank")
