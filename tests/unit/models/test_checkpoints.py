"""Model folders: what is saved comes back, and what is damaged is refused by name."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    QuantizerConfig,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    build_encoder,
    encoder_config,
    load_model,
    save_model,
)

pytestmark = pytest.mark.unit

TINY = encoder_config("tiny", num_layers=1, width=32, ffn_width=32, conv_pos_kernel=8, patch_embed_width=16)


def fitted_tokenizer() -> SelfDistilledTokenizer:
    settings = TokenizerConfig(encoder=TINY, quantizer=QuantizerConfig(num_codes=16, code_dim=8))
    tokenizer = SelfDistilledTokenizer(settings).train()
    tokenizer(torch.randn(2, 64, 128))
    tokenizer.quantizer.end_step(moved=True)
    return tokenizer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: BeatsEncoder(TINY, "compact"),
    "classifier": lambda: AudioClassifier(
        BeatsEncoder(TINY), ClassifierConfig(num_classes=2, pooling="attention"), ["Hund", "Tür"]
    ),
    "random_projection_tokenizer": lambda: RandomProjectionTokenizer(
        RandomProjectionConfig(normalization="standardize", seed=7)
    ),
    "self_distilled_tokenizer": fitted_tokenizer,
}


def result(module: nn.Module, fbank: torch.Tensor) -> torch.Tensor:
    if isinstance(module, RandomProjectionTokenizer | SelfDistilledTokenizer):
        return module.label_patches(fbank)
    output = module(fbank)
    tensor: torch.Tensor = output[0] if isinstance(module, BeatsEncoder) else output
    return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_equal_and_in_eval_mode(kind: str, tmp_path: Path) -> None:
    module = KINDS[kind]().train()
    save_model(module, tmp_path / "model", {"recipe": {"steps": 5}})
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is type(module)
    assert not loaded.training
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    fbank = torch.randn(1, 48, 128)
    assert torch.equal(result(loaded, fbank), result(module.eval(), fbank))
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    assert description["kind"] == kind
    assert description["extra"] == {"recipe": {"steps": 5}}
    if isinstance(module, AudioClassifier) and isinstance(loaded, AudioClassifier):
        assert loaded.class_names == ["Hund", "Tür"]
    if isinstance(loaded, BeatsEncoder):
        assert loaded.positions == "compact"


def test_saving_again_replaces_the_folder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_model(KINDS["classifier"](), tmp_path / "model")
    save_model(KINDS["encoder"](), tmp_path / "model")
    assert sorted(one.name for one in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model_whole(tmp_path: Path) -> None:
    save_model(KINDS["encoder"](), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        save_model(KINDS["encoder"](), tmp_path / "model", {"not json": object()})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no model folder"):
        save_model(KINDS["encoder"](), tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_only_the_four_kinds_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear"):
        save_model(nn.Linear(2, 2), tmp_path / "model")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        description = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(description | changes))

    return apply


def other_width(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["config"]["encoder"]["ffn_width"] = 64
    (folder / "config.json").write_text(json.dumps(description))


def other_depth(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["config"]["encoder"]["num_layers"] = 2
    (folder / "config.json").write_text(json.dumps(description))


def misspelt(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["config"]["encoder"]["num_layer"] = 1
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no model description"),
        (truncate, "damaged or truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb())), "damaged or truncated"),
        (edit(kind="vocoder"), "kind='vocoder'; known kinds: encoder, classifier"),
        (edit(format_version=2), "format_version=2; this release reads up to 1: upgrade"),
        (edit(config={}), "does not describe a encoder: 'encoder'"),
        (other_width, "fc1.bias has shape (32,) instead of (64,)"),
        (other_depth, "lacks 20 tensors"),
        (misspelt, "did you mean 'num_layers'"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(KINDS["encoder"](), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_shared_bias_stays_one_parameter_after_loading(tmp_path: Path) -> None:
    save_model(build_encoder("tiny"), tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert len({id(one) for name, one in loaded.named_parameters(remove_duplicate=False) if "relative" in name}) == 1
