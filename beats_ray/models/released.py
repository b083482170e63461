"""Checkpoint files of other projects: the authors' released `.pt` files, and ESPnet's (OpenBEATs).

    encoder = load_released("BEATs_iter3.pt")       # encoder, classifier or tokenizer: whatever the file holds
    save_released(encoder, "mine.pt")               # for every tool that takes the released files

Two layouts are read. Released files, and ESPnet's exported encoders: {"cfg": settings, "model": weights}, with the
class names of a fine-tuned model under "label_dict". ESPnet's training runs: weights whose names begin with `encoder.`
(below "module" in a DeepSpeed checkpoint), with the settings in a `config.yaml` beside the file.

Files are unpickled with `weights_only=True`: nothing in them can run.
Source: the released files' settings and parameter names; ESPnet's `egs2/audioset/ssl1`.
"""

import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from beats_ray.models.checkpoints import load_weights
from beats_ray.models.config import FBANK_MEAN, FBANK_STD, NUM_MEL_BINS, EncoderConfig, validated
from beats_ray.models.encoder import BeatsEncoder
from beats_ray.models.heads import AudioClassifier, ClassifierConfig
from beats_ray.models.quantizer import QuantizerConfig
from beats_ray.models.tokenizers import SelfDistilledTokenizer, TokenizerConfig

Weights = dict[str, Tensor]

_FIELDS = {
    "num_layers": "encoder_layers",
    "width": "encoder_embed_dim",
    "num_heads": "encoder_attention_heads",
    "ffn_width": "encoder_ffn_embed_dim",
    "patch_embed_width": "embed_dim",
    "patch_size": "input_patch_size",
    "conv_pos_kernel": "conv_pos",
    "conv_pos_groups": "conv_pos_groups",
    "relative_buckets": "num_buckets",
    "relative_max_distance": "max_distance",
    "gated_relative_bias": "gru_rel_pos",
    "deep_norm": "deep_norm",
    "pre_norm": "layer_norm_first",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layer_drop": "encoder_layerdrop",
    "fbank_mean": "fbank_mean",
    "fbank_std": "fbank_std",
}
"""Our encoder fields and their released names; the last two are an addition that other readers ignore."""

_ABSENT: dict[str, Any] = {
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_attention_heads": 12,
    "encoder_ffn_embed_dim": 3072,
    "embed_dim": 512,
    "input_patch_size": 16,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "num_buckets": 320,
    "max_distance": 1280,
    "gru_rel_pos": False,
    "deep_norm": False,
    "layer_norm_first": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "fbank_mean": FBANK_MEAN,
    "fbank_std": FBANK_STD,
}
"""What the released code takes for a setting that a file does not name."""

_FIXED = {"activation_fn": "gelu", "conv_bias": False, "relative_position_embedding": True}
"""Settings that all published files share, and no other value of which is implemented."""

_TOKENIZER_NAMES = {"to_code.": "quantize_layer.", "encoder.": ""}
_HEADS = ("predictor", "decoder.linear_out", "decoder.output_layer", "classifier", "head", "output_layer")
_ESPNET_ONLY = ("patch_embedding_pad.", "raw2fbank_pad.")
"""Frozen convolutions with which ESPnet counts frames; they hold nothing learned."""


def load_released(path: str | os.PathLike[str]) -> nn.Module:
    """Returns the module that a `.pt` file holds, in eval mode, on the CPU.

    A BeatsEncoder; an AudioClassifier for a fine-tuned model; a SelfDistilledTokenizer for a tokenizer. Encoders that
    ESPnet pre-trained get positions="compact", as they were trained.
    Raises ValueError naming what is wrong: no such file, damaged or truncated, holding code, an unknown layout,
    settings that are not implemented, weights that do not fit.
    """
    file = Path(path)
    settings, weights, class_names = _read_layout(file, _unpickle(file))
    from_espnet = any(name.startswith(_ESPNET_ONLY) for name in weights)
    weights = {name: value.float() for name, value in weights.items() if not name.startswith(_ESPNET_ONLY)}
    encoder = BeatsEncoder(_encoder_config(file, settings), "compact" if from_espnet else "true")
    module: nn.Module
    if "quantize.embedding.weight" in weights:
        module, weights = _tokenizer(encoder.config, weights)
    elif "predictor.weight" in weights:
        head = ClassifierConfig(
            num_classes=len(weights["predictor.weight"]),
            multi_label=bool(settings.get("multi_label", True)),
            dropout=float(settings.get("predictor_dropout", 0.1)),
        )
        if class_names and len(class_names) != head.num_classes:
            raise ValueError(
                f"{file} has {len(class_names)} class names for {head.num_classes} classes; get a whole copy"
            )
        module = AudioClassifier(encoder, head, class_names or None)
        weights = {name if name.startswith("predictor.") else f"encoder.{name}": one for name, one in weights.items()}
    else:
        module = encoder
    load_weights(module, weights, str(file))
    return module.eval()


def save_released(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes an encoder, a mean-pooled classifier or a self-distilled tokenizer as a released-format `.pt` file.

    Settings, parameter names and shapes are those of the released files, so that code written for them loads it with
    strict names. Raises ValueError for a module that the format cannot hold.
    """
    file = Path(path)
    settings, weights = _release_form(module)
    content: dict[str, Any] = {"cfg": settings, "model": weights}
    if isinstance(module, AudioClassifier) and module.class_names is not None:
        content["label_dict"] = dict(enumerate(module.class_names))
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    try:
        torch.save(content, staging)
        Path(staging).chmod(0o644)
        Path(staging).replace(file)
    finally:
        Path(staging).unlink(missing_ok=True)
    return file


# --- reading ----------------------------------------------------------------------------------------------------------


def _unpickle(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; check the path")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError) as error:
        found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if found:
            raise ValueError(
                f"{file} holds code or objects besides tensors and plain settings ({found[1]}); nothing of it was run. "
                "Save it again as plain tensors where it was made, or do not trust it"
            ) from None
        details = str(error).rpartition("WeightsUnpickler error:")[2].split("\n\nCheck the documentation")[0].split()
        reason = " ".join(details)[:120] or type(error).__name__
        raise ValueError(
            f"{file} is no PyTorch checkpoint, or damaged or truncated ({reason}); copy it again"
        ) from None


def _read_layout(file: Path, content: Any) -> tuple[dict[str, Any], Weights, list[str]]:
    """Settings, weights under the released names, and class names ([] where there are none)."""
    keys = sorted(str(key) for key in content) if isinstance(content, dict) else []
    if isinstance(content, dict) and isinstance(content.get("cfg"), dict) and isinstance(content.get("model"), dict):
        labels = content.get("label_dict") or {}
        names = [str(labels[index]) for index in sorted(labels, key=int)] if isinstance(labels, dict) else []
        return content["cfg"], _tensors(file, content["model"]), names
    weights = content.get("module", content) if isinstance(content, dict) else {}
    if isinstance(weights, dict) and "encoder.patch_embedding.weight" in weights:
        settings, names = _espnet_settings(file)
        return settings, _espnet_weights(_tensors(file, weights)), names
    shown = (
        f"the keys {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" if keys else f"a {type(content).__name__}"
    )
    raise ValueError(
        f"{file} has an unknown layout: {shown}; a released file has 'cfg' and 'model', an ESPnet one weights under "
        "'encoder.' and a config.yaml beside it"
    )


def _tensors(file: Path, weights: dict[Any, Any]) -> Weights:
    odd = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(f"{file} holds a {type(weights[odd]).__name__} under {odd!r} instead of a tensor")
    return {str(name): value for name, value in weights.items()}


def _espnet_settings(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings under the released names, and class names, from the config.yaml of the run that wrote the file."""
    beside = file.parent / "config.yaml"
    if not beside.is_file():
        raise ValueError(f"{file} holds the weights of an ESPnet run alone; put the run's config.yaml beside it")
    try:
        config = yaml.safe_load(beside.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{beside} is not valid YAML: {' '.join(str(error).split())}") from None
    encoder, decoder, model = (_section(config, name) for name in ("encoder_conf", "decoder_conf", "model_conf"))
    settings = encoder.get("beats_config") or encoder.get("tokenizer_config") or _base_settings(file, encoder)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{beside} has no encoder_conf.beats_config; give the config.yaml of the run that wrote {file}"
        )
    if decoder.get("pooling", "mean") != "mean":
        raise ValueError(f"{beside}: decoder_conf.pooling={decoder['pooling']!r} is not implemented; only 'mean' is")
    statistics = {name: encoder[name] for name in ("fbank_mean", "fbank_std") if name in encoder}
    multi_label = {"multi_label": model.get("classification_type") == "multi-label"}
    tokens = config.get("token_list")
    names = [str(name) for name in tokens if str(name) not in ("<blank>", "<unk>", "<sos/eos>")] if tokens else []
    return multi_label | settings | statistics, names


def _section(config: Any, name: str) -> dict[str, Any]:
    found = config.get(name) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _base_settings(file: Path, encoder: dict[str, Any]) -> Any:
    """The settings of the checkpoint that a fine-tuning run began with, where it lies beside the run's own."""
    name = encoder.get("beats_ckpt_path")
    if not name:
        return None
    base = file.parent / Path(str(name)).name
    if not base.is_file():
        raise ValueError(f"{file.parent / 'config.yaml'} takes its settings from {name}; put that checkpoint beside it")
    content = _unpickle(base)
    return content.get("cfg") if isinstance(content, dict) else None


def _espnet_weights(weights: Weights) -> Weights:
    renamed = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
    width = weights["encoder.patch_embedding.weight"].shape[0]
    if "encoder.post_extract_proj.weight" in weights:
        width = weights["encoder.post_extract_proj.weight"].shape[0]
    for head in _HEADS:
        weight, bias = weights.get(f"{head}.weight"), weights.get(f"{head}.bias")
        if weight is not None and bias is not None and weight.dim() == 2 and weight.shape[1] == width:
            return renamed | {"predictor.weight": weight, "predictor.bias": bias}
    return renamed


def _encoder_config(file: Path, settings: dict[str, Any]) -> EncoderConfig:
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{file}: cfg {name}={settings[name]!r} is not implemented; only {value!r} is")
    values = {ours: settings.get(theirs, _ABSENT[theirs]) for ours, theirs in _FIELDS.items()}
    try:
        return validated(EncoderConfig, values)
    except ValueError as error:
        raise ValueError(f"{file}: its cfg describes no encoder: {error}") from None


def _tokenizer(config: EncoderConfig, weights: Weights) -> tuple[SelfDistilledTokenizer, Weights]:
    codebook_VD = weights["quantize.embedding.weight"]
    quantizer = QuantizerConfig(num_codes=len(codebook_VD), code_dim=codebook_VD.shape[1])
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=config, quantizer=quantizer))
    renamed: Weights = {}
    for name, value in weights.items():
        if name.startswith("quantize_layer."):
            renamed[name.replace("quantize_layer.", "to_code.", 1)] = value
        elif not name.startswith("quantize."):
            renamed[f"encoder.{name}"] = value
    fitted = bool(weights.get("quantize.embedding.initted", torch.ones(1)).any())
    renamed["quantizer.codebook_VD"] = codebook_VD
    renamed["quantizer.usage_V"] = weights.get("quantize.cluster_size", torch.zeros(len(codebook_VD)))
    renamed["quantizer.batches_seen"] = torch.tensor(quantizer.init_batches if fitted else 0)
    return tokenizer, renamed


# --- writing ----------------------------------------------------------------------------------------------------------


def _release_form(module: nn.Module) -> tuple[dict[str, Any], Weights]:
    weights: Weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    if isinstance(module, BeatsEncoder):
        return release_settings(module.config), weights
    if isinstance(module, AudioClassifier) and module.config.pooling == "mean":
        settings = release_settings(module.encoder.config) | {
            "finetuned_model": True,
            "predictor_class": module.config.num_classes,
            "predictor_dropout": module.config.dropout,
            "multi_label": module.config.multi_label,
        }
        return settings, {name.removeprefix("encoder."): value for name, value in weights.items()}
    if isinstance(module, SelfDistilledTokenizer):
        return _tokenizer_form(module, weights)
    if isinstance(module, AudioClassifier):
        raise ValueError(f"pooling={module.config.pooling!r} has no place in the released format; only 'mean' has")
    raise ValueError(
        f"a {type(module).__name__} has no place in the released format; encoders, classifiers and self-distilled "
        "tokenizers have"
    )


def release_settings(config: EncoderConfig) -> dict[str, Any]:
    """The settings of an encoder under their released names. ValueError for what the format has no setting for."""
    if config.num_mel_bins != NUM_MEL_BINS:
        raise ValueError(
            f"num_mel_bins={config.num_mel_bins} has no place in the released format, which has {NUM_MEL_BINS}"
        )
    if config.relative_bias_2d:
        raise ValueError("relative_bias_2d=True has no place in the released format, whose bias has one dimension")
    settings = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    extra = {"layer_wise_gradient_decay_ratio": 1.0, "dropout_input": 0.0, "finetuned_model": False}
    return settings | _FIXED | extra


def _tokenizer_form(module: SelfDistilledTokenizer, weights: Weights) -> tuple[dict[str, Any], Weights]:
    quantizer = module.config.quantizer
    settings = release_settings(module.config.encoder)
    settings |= {"quant_n": quantizer.num_codes, "quant_dim": quantizer.code_dim}
    renamed: Weights = {}
    for name, value in weights.items():
        for ours, theirs in _TOKENIZER_NAMES.items():
            if name.startswith(ours):
                renamed[theirs + name.removeprefix(ours)] = value
                break
    codebook_VD, usage_V = weights["quantizer.codebook_VD"], weights["quantizer.usage_V"]
    fitted = float(int(weights["quantizer.batches_seen"]) > 0)
    return settings, renamed | {
        "quantize.cluster_size": usage_V,
        "quantize.embedding.initted": torch.tensor([fitted]),
        "quantize.embedding.weight": codebook_VD,
        "quantize.embedding.cluster_size": usage_V.clone(),
        "quantize.embedding.embed_avg": codebook_VD.clone(),
    }
