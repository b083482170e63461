"""Checkpoint files of other projects: what they hold comes back exactly, and nothing in them can run."""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import beats_ray
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    EncoderConfig,
    QuantizerConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    build_encoder,
    encoder_config,
    load_model,
    save_released,
)

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::FutureWarning:openbeats", "ignore:.*weight_norm")]

TINY = encoder_config("tiny", num_layers=2, width=32, num_heads=2, ffn_width=48, conv_pos_kernel=8, conv_pos_groups=4,
                      patch_embed_width=16)  # fmt: skip
CFG: dict[str, Any] = {
    "encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 2,
    "activation_fn": "gelu", "layer_wise_gradient_decay_ratio": 0.6, "layer_norm_first": False, "deep_norm": True,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.05,
    "dropout_input": 0.0, "conv_pos": 8, "conv_pos_groups": 4, "relative_position_embedding": True,
    "num_buckets": 320, "max_distance": 800, "gru_rel_pos": True, "input_patch_size": 16, "embed_dim": 16,
    "conv_bias": False,
}  # fmt: skip
"""Settings with the names of the released files."""

LAYER = (
    "self_attn.grep_a", "self_attn.grep_linear.weight", "self_attn.grep_linear.bias",
    "self_attn.relative_attention_bias.weight",
    *(f"self_attn.{part}_proj.{kind}" for part in "kvq" for kind in ("weight", "bias")),
    "self_attn.out_proj.weight", "self_attn.out_proj.bias",
    *(f"{part}.{kind}" for part in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
      for kind in ("weight", "bias")),
)  # fmt: skip
ENCODER_NAMES = {
    "post_extract_proj.weight", "post_extract_proj.bias", "patch_embedding.weight", "layer_norm.weight",
    "layer_norm.bias", "encoder.layer_norm.weight", "encoder.layer_norm.bias", "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv.0.weight_v", "encoder.pos_conv.0.bias",
    *(f"encoder.layers.{layer}.{name}" for layer in range(2) for name in LAYER),
}  # fmt: skip
TOKENIZER_NAMES = ENCODER_NAMES | {
    "quantize.cluster_size", "quantize.embedding.weight", "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg", "quantize.embedding.initted",
    "quantize_layer.0.weight", "quantize_layer.0.bias", "quantize_layer.2.weight", "quantize_layer.2.bias",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def encoder() -> BeatsEncoder:
    return BeatsEncoder(TINY).eval()


def classifier(**settings: Any) -> AudioClassifier:
    config = ClassifierConfig(num_classes=3, multi_label=True, **settings)
    return AudioClassifier(encoder(), config, ["/m/09x0r", "/m/05zppz", "/m/02zsn"]).eval()


def tokenizer() -> SelfDistilledTokenizer:
    made = SelfDistilledTokenizer(TokenizerConfig(encoder=TINY, quantizer=QuantizerConfig(num_codes=8, code_dim=6)))
    made.train()(torch.randn(2, 64, 128))
    made.quantizer.end_step(moved=True)
    return made.eval()


def waves() -> tuple[Tensor, Tensor]:
    wave = torch.randn(2, 16_000) * 0.1
    is_pad = torch.zeros(2, 16_000, dtype=torch.bool)
    is_pad[1, 9000:] = True
    return wave.masked_fill(is_pad, 0.0), is_pad


@pytest.mark.parametrize(
    ("make", "names"),
    [(encoder, ENCODER_NAMES), (classifier, ENCODER_NAMES | {"predictor.weight", "predictor.bias"}),
     (tokenizer, TOKENIZER_NAMES)],
)  # fmt: skip
def test_written_files_have_the_released_names_and_settings(
    make: Callable[[], nn.Module], names: set[str], tmp_path: Path
) -> None:
    content = torch.load(save_released(make(), tmp_path / "model.pt"), weights_only=True)
    assert set(content["model"]) == names
    assert content["model"]["patch_embedding.weight"].shape == (16, 1, 16, 16)
    assert content["model"]["encoder.pos_conv.0.weight_v"].shape == (32, 8, 8)
    assert content["model"]["encoder.layers.1.self_attn.relative_attention_bias.weight"].shape == (320, 2)
    assert content["cfg"]["dropout_input"] == 0.0
    expected = CFG | {"layer_wise_gradient_decay_ratio": 1.0, "encoder_layerdrop": 0.0}
    assert content["cfg"].items() >= expected.items()
    assert content["cfg"]["finetuned_model"] == (make is classifier)
    if make is classifier:
        assert content["label_dict"] == {0: "/m/09x0r", 1: "/m/05zppz", 2: "/m/02zsn"}
        assert content["cfg"]["predictor_class"] == 3
    if make is tokenizer:
        assert (content["cfg"]["quant_n"], content["cfg"]["quant_dim"]) == (8, 6)


@pytest.mark.parametrize("make", [encoder, classifier, tokenizer])
def test_a_module_comes_back_equal_from_a_released_file(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = make()
    loaded = beats_ray.load(save_released(module, tmp_path / "model.pt"))
    assert type(loaded) is type(module)
    assert not loaded.training
    wave, is_pad = waves()
    if isinstance(module, SelfDistilledTokenizer) and isinstance(loaded, SelfDistilledTokenizer):
        assert torch.equal(loaded.extract_labels(wave, is_pad), module.extract_labels(wave, is_pad))
        return
    assert isinstance(module, BeatsEncoder | AudioClassifier)
    assert isinstance(loaded, BeatsEncoder | AudioClassifier)
    assert loaded.config == module.config
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in module.state_dict().items())
    for ours, theirs in zip(loaded.extract_features(wave, is_pad), module.extract_features(wave, is_pad), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    if isinstance(loaded, AudioClassifier):
        assert loaded.class_names == ["/m/09x0r", "/m/05zppz", "/m/02zsn"]
        assert torch.all((loaded.extract_features(wave)[0] - loaded(*front_end(wave)).sigmoid()).abs() < 1e-6)


def front_end(wave: Tensor) -> tuple[Tensor, Tensor]:
    from beats_ray.models import compute_fbank, normalise_fbank

    fbank, frames = compute_fbank(wave)
    return normalise_fbank(fbank), frames


def test_settings_that_a_file_leaves_out_are_those_of_the_released_code(tmp_path: Path) -> None:
    module = BeatsEncoder(TINY.model_copy(update={"deep_norm": False, "gated_relative_bias": False}))
    path = save_released(module, tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    for name in ("deep_norm", "gru_rel_pos", "dropout", "attention_dropout", "max_distance", "num_buckets",
                 "activation_fn", "layer_norm_first", "fbank_mean", "finetuned_model"):  # fmt: skip
        del content["cfg"][name]
    torch.save(content, path)
    loaded = beats_ray.load(path)
    assert isinstance(loaded, BeatsEncoder)
    config = loaded.config
    assert (config.deep_norm, config.gated_relative_bias, config.pre_norm) == (False, False, False)
    assert (config.dropout, config.attention_dropout, config.relative_max_distance) == (0.1, 0.1, 1280)
    assert (config.relative_buckets, config.fbank_mean) == (320, 15.41663)


def test_half_precision_weights_come_back_as_fp32(tmp_path: Path) -> None:
    path = save_released(encoder(), tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    content["model"] = {name: value.half() for name, value in content["model"].items()}
    torch.save(content, path)
    assert {value.dtype for value in beats_ray.load(path).state_dict().values()} == {torch.float32}


def espnet_encoder() -> nn.Module:
    module = pytest.importorskip("openbeats.beats_encoder")
    made: nn.Module = module.BeatsEncoder(0, beats_config=dict(CFG)).eval()
    return made


def test_an_espnet_export_gives_espnets_features(tmp_path: Path) -> None:
    theirs = espnet_encoder()
    torch.save({"cfg": CFG, "model": theirs.state_dict()}, tmp_path / "OpenBEATs.pt")
    ours = beats_ray.load(tmp_path / "OpenBEATs.pt")
    assert isinstance(ours, BeatsEncoder)
    assert ours.positions == "compact"
    assert ours.config.layer_drop == 0.05
    wave = torch.randn(2, 20_000) * 0.1
    with torch.no_grad():
        expected = theirs(wave, torch.tensor([20_000, 20_000]))[0]
        assert (ours.extract_features(wave)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("deepspeed", [False, True])
def test_an_espnet_training_run_is_read_with_the_config_beside_it(deepspeed: bool, tmp_path: Path) -> None:
    theirs = espnet_encoder()
    weights = {f"encoder.{name}": value for name, value in theirs.state_dict().items()}
    head = {"decoder.output_layer.weight": torch.randn(2, 32), "decoder.output_layer.bias": torch.randn(2)}
    file = tmp_path / "valid.acc.ave.pth"
    torch.save({"module": weights | head} if deepspeed else weights | head, file)
    with pytest.raises(ValueError, match=r"config\.yaml beside it"):
        beats_ray.load(file)
    wave = torch.randn(1, 20_000) * 0.1
    with torch.no_grad():
        features = theirs(wave, torch.tensor([20_000]))[0].mean(1)
        logits = features @ head["decoder.output_layer.weight"].t() + head["decoder.output_layer.bias"]
    for kind, expected in (("multi-class", logits.softmax(-1)), ("multi-label", logits.sigmoid())):
        config = {
            "encoder_conf": {"beats_config": CFG},
            "model_conf": {"classification_type": kind},
            "token_list": ["dog", "rain", "<unk>"],
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        ours = beats_ray.load(file)
        assert isinstance(ours, AudioClassifier)
        assert ours.class_names == ["dog", "rain"]
        assert (ours.extract_features(wave)[0] - expected).abs().max() < 1e-4


def test_an_espnet_fine_tune_takes_its_settings_from_the_checkpoint_it_began_with(tmp_path: Path) -> None:
    theirs = espnet_encoder()
    file = tmp_path / "valid.acc.ave.pth"
    torch.save({f"encoder.{name}": value for name, value in theirs.state_dict().items()}, file)
    section = {"beats_ckpt_path": "/elsewhere/OpenBEATs.pt", "fbank_mean": 11.7, "fbank_std": 10.6}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"encoder_conf": section}))
    with pytest.raises(
        ValueError, match=r"takes its settings from /elsewhere/OpenBEATs\.pt; put that checkpoint beside it"
    ):
        beats_ray.load(file)
    torch.save({"cfg": CFG, "model": {}}, tmp_path / "OpenBEATs.pt")
    ours = beats_ray.load(file)
    assert isinstance(ours, BeatsEncoder)
    assert (ours.config.fbank_mean, ours.config.fbank_std, ours.config.num_layers) == (11.7, 10.6, 2)


def test_an_espnet_pooling_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    torch.save({"encoder.patch_embedding.weight": torch.zeros(16, 1, 16, 16)}, tmp_path / "m.pth")
    config = {"encoder_conf": {"beats_config": CFG}, "decoder_conf": {"pooling": "CLS"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="pooling='CLS' is not implemented; only 'mean' is"):
        beats_ray.load(tmp_path / "m.pth")


def test_class_names_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"n{index}" for index in range(12)]
    module = AudioClassifier(encoder(), ClassifierConfig(num_classes=12), names)
    path = save_released(module, tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    content["label_dict"] = {str(index): name for index, name in enumerate(names)}  # as JSON would make of it
    torch.save(content, path)
    loaded = beats_ray.load(path)
    assert isinstance(loaded, AudioClassifier)
    assert loaded.class_names == names


@pytest.mark.parametrize("section", ["", "encoder_conf: 3", "encoder_conf: {}", "[1", "- a"])
def test_an_espnet_config_without_settings_is_named(section: str, tmp_path: Path) -> None:
    torch.save({"encoder.patch_embedding.weight": torch.zeros(16, 1, 16, 16)}, tmp_path / "m.pth")
    (tmp_path / "config.yaml").write_text(section)
    with pytest.raises(ValueError, match=r"config\.yaml (has no encoder_conf|is not valid YAML)"):
        beats_ray.load(tmp_path / "m.pth")


# --- files that must not be read --------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def change(**entries: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        for name, value in entries.items():
            content[name] = content[name] | value
        torch.save(content, path)

    return apply


def drop(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        del content["model"][name]
        torch.save(content, path)

    return apply


def cut(fraction: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)]) and None


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: path.unlink(), "does not exist"),
    (lambda path: path.write_bytes(b""), "damaged or truncated"),
    (lambda path: path.write_bytes(b"RIFF" + bytes(100)), "no PyTorch checkpoint"),
    (cut(0.5), "damaged or truncated"),
    (cut(0.999), "damaged or truncated"),
    (lambda path: torch.save({"cfg": {}, "model": Bomb()}, path), "holds code or objects"),
    (lambda path: path.write_bytes(pickle.dumps(Bomb(), protocol=2)), "nothing of it was run"),
    (lambda path: path.write_bytes(pickle.dumps(Bomb(), protocol=5)), "is no PyTorch checkpoint"),
    (lambda path: torch.save([1, 2], path), "unknown layout: a list"),
    (lambda path: torch.save({"state_dict": {}, "epoch": 3}, path), "unknown layout: the keys epoch, state_dict"),
    (lambda path: torch.save({"cfg": {}, "model": {"a": 3}}, path), "holds a int under 'a' instead of a tensor"),
    (change(cfg={"activation_fn": "relu"}), "cfg activation_fn='relu' is not implemented; only 'gelu' is"),
    (change(cfg={"relative_position_embedding": False}), "relative_position_embedding=False is not implemented"),
    (
        change(cfg={"encoder_attention_heads": 3}),
        "its cfg describes no encoder: EncoderConfig: num_heads=3 must divide",
    ),
    (change(cfg={"encoder_layers": "two"}), "num_layers='two'"),
    (change(cfg={"encoder_layers": 3}), "lacks 20 tensors"),
    (drop("encoder.layers.1.fc1.bias"), "lacks 1 tensors (encoder.layers.1.fc1.bias)"),
    (change(model={"decoder.weight": torch.zeros(2)}), "has 1 unknown tensors (decoder.weight)"),
    (change(model={"encoder.layers.1.fc1.bias": torch.zeros(7)}), "fc1.bias has shape (7,) instead of (48,)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_file_that_is_not_right_is_refused_by_name(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_released(encoder(), tmp_path / "model.pt")
    damage(path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_model(path)
    assert "model.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_would_go_off_without_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cfg": {}, "model": Bomb()}, tmp_path / "model.pt")
    assert zipfile.is_zipfile(tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (RandomProjectionTokenizer, "RandomProjectionTokenizer has no place in the released format"),
        (lambda: classifier(pooling="attention"), "pooling='attention' has no place"),
        (lambda: BeatsEncoder(TINY.model_copy(update={"num_mel_bins": 64})), "num_mel_bins=64 has no place"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(
    module: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_released(module(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_base_has_the_published_size_and_settings(tmp_path: Path) -> None:
    config = EncoderConfig()
    assert sum(one.numel() for one in build_encoder("base").parameters()) == pytest.approx(90.3e6, rel=0.005)
    assert (config.num_layers, config.width, config.relative_max_distance) == (12, 768, 800)
