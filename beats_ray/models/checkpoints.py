"""Models as folders: `config.json` (kind, format version, settings), `model.safetensors`, a classifier's `labels.json`.

    save_model(encoder, "out/encoder")
    encoder = load_model("out/encoder")      # in eval mode
    encoder = load_model("BEATs_iter3.pt")   # a released file: see `released.py`

Nothing in such a folder or file can run code. Paths are local; the callers move them to and from object storage.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beats_ray.models.config import RELEASED_SUFFIXES, EncoderConfig, validated
from beats_ray.models.encoder import BeatsEncoder
from beats_ray.models.heads import AudioClassifier, ClassifierConfig
from beats_ray.models.tokenizers import (
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
)

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LABELS_FILE = "labels.json"


def save_model(module: nn.Module, path: str | os.PathLike[str], extra_config: dict[str, Any] | None = None) -> Path:
    """Writes the model folder at once: readers see the old folder, none, or the whole new one.

    extra_config: anything JSON can hold, kept under "extra" (recipe, commit, metrics).
    Raises ValueError for a module of another kind, and FileExistsError for a path that holds something else.
    """
    target = Path(path)
    if target.exists() and not (target / CONFIG_FILE).is_file() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is no model folder; choose another path")
    description = describe_model(module)
    if extra_config:
        description["extra"] = extra_config
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        # Each name gets memory of its own: safetensors refuses the relative bias that all layers share.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
        save_file(tensors, str(staging / WEIGHTS_FILE))
        if isinstance(module, AudioClassifier) and module.class_names is not None:
            (staging / LABELS_FILE).write_text(json.dumps(module.class_names, ensure_ascii=False, indent=1) + "\n")
        _replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def describe_model(module: nn.Module) -> dict[str, Any]:
    """What `config.json` says of a module: its kind, the format version, and its settings under "config"."""
    return {"kind": _kind(module), "format_version": FORMAT_VERSION, "config": _settings(module)}


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """Reads a model folder, or a released `.pt` file, and returns the module in eval mode, on the CPU.

    Raises ValueError naming what is wrong: a missing or damaged file, an unknown kind, a newer format, other weights
    than the settings ask for.
    """
    folder = Path(path)
    if folder.is_file() or folder.suffix in RELEASED_SUFFIXES:
        from beats_ray.models.released import load_released

        return load_released(folder)
    description = _read_json(folder / CONFIG_FILE)
    if not isinstance(description, dict) or "kind" not in description or "format_version" not in description:
        raise ValueError(f"{folder / CONFIG_FILE} is no model description: it needs 'kind' and 'format_version'")
    version = description["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version={version}; this release reads up to {FORMAT_VERSION}: upgrade beats_ray"
        )
    kind = description["kind"]
    if kind not in _BUILDERS:
        raise ValueError(f"{folder} holds kind={kind!r}; known kinds: {', '.join(_BUILDERS)}")
    labels = _read_json(folder / LABELS_FILE) if (folder / LABELS_FILE).exists() else None
    try:
        module = _BUILDERS[kind](description.get("config", {}), labels)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe a {kind}: {error}") from None
    load_weights(module, _read_weights(folder / WEIGHTS_FILE), str(folder))
    return module.eval()


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Fills the module; names and shapes must be exactly its own. Raises ValueError naming the first differences."""
    own = module.state_dict()
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"lacks {len(missing)} tensors ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})")
    if surplus := sorted(tensors.keys() - own.keys()):
        problems.append(
            f"has {len(surplus)} unknown tensors ({', '.join(surplus[:3])}{', ...' if len(surplus) > 3 else ''})"
        )
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}")
            break
    if problems:
        raise ValueError(f"{source} does not fit a {_kind(module)} of its settings: it " + "; it ".join(problems))
    module.load_state_dict(tensors)


def _kind(module: nn.Module) -> str:
    for kind, module_class in _CLASSES.items():
        if type(module) is module_class:
            return kind
    raise ValueError(f"cannot save a {type(module).__name__}; known kinds: {', '.join(_CLASSES)}")


def _settings(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, BeatsEncoder):
        return {"encoder": module.config.model_dump(), "positions": module.positions}
    if isinstance(module, AudioClassifier):
        return _settings(module.encoder) | {"classifier": module.config.model_dump()}
    assert isinstance(module, RandomProjectionTokenizer | SelfDistilledTokenizer)
    return {"tokenizer": module.config.model_dump()}


def _build_encoder(settings: dict[str, Any], _labels: Any = None) -> BeatsEncoder:
    return BeatsEncoder(validated(EncoderConfig, settings["encoder"]), settings.get("positions", "true"))


def _build_classifier(settings: dict[str, Any], labels: Any) -> AudioClassifier:
    return AudioClassifier(_build_encoder(settings), validated(ClassifierConfig, settings["classifier"]), labels)


def _build_random_projection(settings: dict[str, Any], _labels: Any) -> RandomProjectionTokenizer:
    return RandomProjectionTokenizer(validated(RandomProjectionConfig, settings["tokenizer"]))


def _build_self_distilled(settings: dict[str, Any], _labels: Any) -> SelfDistilledTokenizer:
    return SelfDistilledTokenizer(validated(TokenizerConfig, settings["tokenizer"]))


_CLASSES: dict[str, type[nn.Module]] = {
    "encoder": BeatsEncoder,
    "classifier": AudioClassifier,
    "random_projection_tokenizer": RandomProjectionTokenizer,
    "self_distilled_tokenizer": SelfDistilledTokenizer,
}
_BUILDERS: dict[str, Callable[[dict[str, Any], Any], nn.Module]] = {
    "encoder": _build_encoder,
    "classifier": _build_classifier,
    "random_projection_tokenizer": _build_random_projection,
    "self_distilled_tokenizer": _build_self_distilled,
}


def _replace_folder(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    staging.rename(target)
    shutil.rmtree(old)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a model folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a model folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); copy it again") from None
