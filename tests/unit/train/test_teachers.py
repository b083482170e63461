"""What training starts from: a teacher that was fine-tuned, a pre-trained one, published weights to go on with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from beats_ray.config import (
    ConfigError,
    DistillConfig,
    DistillSettings,
    PretrainConfig,
    PretrainSettings,
    load_config,
    validate,
)
from beats_ray.data.storage import open_place
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    describe_model,
    encoder_config,
    load_model,
    save_released,
)
from beats_ray.train.checks import Inputs, find_mistakes, resolve_settings, settings_mistakes
from beats_ray.train.context import single_process_context
from beats_ray.train.distill import DistillTask
from beats_ray.train.flops import step_flops_per_clip
from beats_ray.train.loop import run_training
from beats_ray.train.memory import step_activations
from beats_ray.train.preflight import measure_model
from beats_ray.train.pretrain import PretrainTask
from tests.support.prepared import write_dataset
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
TRAIN = {"steps": 30, "warmup_steps": 3, "learning_rate": 1e-3, "epsilon": 1e-8, "zero_stage": 1,
         "global_batch_size": 4, "micro_batch_size": 4, "log_every_steps": 1}  # fmt: skip
CLASSES = 7


def fine_tuned() -> AudioClassifier:
    torch.manual_seed(0)
    encoder = BeatsEncoder(encoder_config("tiny", **SMALL, fbank_mean=11.0, fbank_std=5.0))
    return AudioClassifier(encoder, ClassifierConfig(num_classes=CLASSES)).eval()


def test_a_fine_tuned_teacher_is_distilled_by_the_logits_of_each_patch(tmp_path: Path) -> None:
    """The released file of a fine-tuned model serves as a teacher; its own normalisation is what the tokenizer sees."""
    teacher = load_model(save_released(fine_tuned(), tmp_path / "iter3_finetuned.pt"))
    assert isinstance(teacher, AudioClassifier)
    settings = validate(
        DistillSettings,
        {"train": TRAIN, "encoder": {"preset": "tiny", "overrides": SMALL},
         "tokenizer": {"num_codes": 16, "code_dim": 8, "init_batches": 2}},
    )  # fmt: skip
    task = DistillTask(settings, teacher)
    other = validate(
        DistillSettings, {"train": TRAIN, "encoder": {"preset": "tiny", "overrides": SMALL | {"patch_size": 8}}}
    )
    with pytest.raises(ConfigError, match=r"encoder.overrides.patch_size: the tokenizer has 8, its teacher 16"):
        DistillTask(other, teacher)
    batch = next(SyntheticBatches(4, 4).training(0))
    fbank_BTF, num_frames_B, target_BNC, _ = task.prepare(batch, torch.Generator(), True).inputs
    logits_BC = teacher(fbank_BTF, num_frames_B)
    is_real_BN1 = ~teacher.classify(fbank_BTF, num_frames_B).is_pad_BN.unsqueeze(-1)
    assert target_BNC.shape[-1] == CLASSES
    torch.testing.assert_close((target_BNC * is_real_BN1).sum(1) / is_real_BN1.sum(1), logits_BC)
    cosines: list[float] = []
    context = single_process_context(lambda _step, metrics: cosines.append(metrics["train/teacher_cosine"]))
    run_training(task, SyntheticBatches(4, 4), settings.train, context, open_place(str(tmp_path / "run")))
    assert sum(cosines[-5:]) / 5 > sum(cosines[:5]) / 5 + 0.2
    tokenizer = load_model(tmp_path / "run" / "model")
    assert isinstance(tokenizer, SelfDistilledTokenizer)
    assert tokenizer.config.encoder.fbank_mean == teacher.encoder.config.fbank_mean


def test_a_supervised_teacher_has_the_papers_learning_rate_and_a_self_supervised_one_its_own() -> None:
    config = load_config(DistillConfig, None, ["output=o"])
    for teacher, rate in ((fine_tuned(), 5e-4), (fine_tuned().encoder, 5e-5)):
        resolved = resolve_settings(config, Inputs(describe_model(teacher), None, []))
        assert resolved.train.learning_rate == rate
        assert resolve_settings(resolved, Inputs(describe_model(teacher), None, [])) == resolved


@pytest.mark.parametrize(
    ("overrides", "refused_for_a_classifier"),
    [
        (["train.learning_rate=1e-3"], True),
        (["train.learning_rate=1e-3", "supervised_learning_rate=2e-3"], True),
        (["train.learning_rate=1e-3", "supervised_learning_rate=1e-3"], False),
        (["supervised_learning_rate=1e-3"], False),
        ([], False),
    ],
)
def test_a_learning_rate_that_would_be_of_no_effect_is_refused_and_both_settings_are_named(
    overrides: list[str], refused_for_a_classifier: bool
) -> None:
    config = load_config(DistillConfig, None, ["output=o", *overrides])
    for teacher, refused in ((fine_tuned(), refused_for_a_classifier), (fine_tuned().encoder, False)):
        inputs = Inputs(describe_model(teacher), None, [])
        mistakes = [str(mistake) for mistake in find_mistakes("distill", config, inputs, {})]
        assert len(mistakes) == refused
        if refused:
            assert mistakes[0].startswith("train.learning_rate=0.001: ")
            assert "set supervised_learning_rate=0.001, or leave train.learning_rate out" in mistakes[0]
        # What `iterate` hands over is resolved, whatever rate its pre-trained teachers have.
        assert find_mistakes("distill", resolve_settings(config, inputs), inputs, {}) == []


def test_the_estimates_know_a_fine_tuned_teacher(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", ("a",))
    config = load_config(DistillConfig, None, ["output=o", "encoder.preset=tiny", "train.micro_batch_size=1"])
    tuned, plain = (describe_model(teacher) for teacher in (fine_tuned(), fine_tuned().encoder))
    size = measure_model(config, manifest, tuned)
    assert size.frozen == sum(one.numel() for one in fine_tuned().parameters())
    patches = 496
    head = 2 * patches * 32 * CLASSES
    difference = step_flops_per_clip("distill", config, tuned) - step_flops_per_clip("distill", config, plain)
    assert difference == head + 3 * 2 * patches * encoder_config("tiny").width * (CLASSES - 32)
    peaks = [step_activations("distill", config, teacher).peak_bytes for teacher in (tuned, plain)]
    assert peaks[0] < peaks[1]  # seven logits are fewer than 32 features


def test_a_layer_of_a_fine_tuned_teacher_is_refused() -> None:
    config = load_config(DistillConfig, None, ["output=o", "tokenizer.teacher_layer=1"])
    mistakes = settings_mistakes("distill", config, Inputs(describe_model(fine_tuned()), None, []))
    assert ["is distilled by its logits, not by a layer" in str(mistake) for mistake in mistakes] == [True]


# --- continued pre-training -------------------------------------------------------------------------------------------


def test_pre_training_goes_on_from_published_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    published = load_model(save_released(BeatsEncoder(encoder_config("tiny", **SMALL)), tmp_path / "encoder.pt"))
    settings = validate(PretrainSettings, {"train": TRAIN, "encoder": {"preset": "tiny", "overrides": SMALL}})
    task = PretrainTask(settings, 1024, RandomProjectionTokenizer(), published)  # type: ignore[arg-type]
    for name, value in published.state_dict().items():
        torch.testing.assert_close(task.module.predictor.encoder.state_dict()[name], value, rtol=0, atol=0)
    scratch = PretrainTask(settings, 1024, RandomProjectionTokenizer())
    weight = "patch_embedding.weight"
    assert not torch.equal(scratch.module.predictor.encoder.state_dict()[weight], published.state_dict()[weight])


def test_an_initial_encoder_of_another_size_is_refused_and_dropout_is_no_difference() -> None:
    config = load_config(PretrainConfig, None, ["output=o", "initial=E", "encoder.preset=tiny"])
    for changes, expected in (({"width": 96, "num_heads": 4}, ["initial=E: has width=96"]), ({"dropout": 0.3}, [])):
        encoder = describe_model(BeatsEncoder(encoder_config("tiny", **changes)))
        mistakes = settings_mistakes("pretrain", config, Inputs(None, None, [], encoder))
        assert [str(mistake).split(",")[0] for mistake in mistakes] == expected
        assert all(isinstance(mistake, ConfigError) for mistake in mistakes)
