"""Encoder settings: presets, and errors that say what to do."""

import re

import pytest

from beats_ray.models import ENCODER_PRESETS, BeatsEncoder, EncoderConfig, encoder_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("preset", "least", "most"),
    [("tiny", 0.5, 1.0), ("mini", 1.5, 2.5), ("small", 15, 30), ("base", 90.25, 90.35), ("large", 290, 330)],
)
def test_presets_have_their_size(preset: str, least: float, most: float) -> None:
    import torch

    with torch.device("meta"):
        encoder = BeatsEncoder(encoder_config(preset))
    assert least <= sum(one.numel() for one in encoder.parameters()) / 1e6 <= most


def test_overrides_change_their_field_alone_and_leave_the_preset() -> None:
    changed = encoder_config("base", layer_drop=0.1)
    assert changed == ENCODER_PRESETS["base"].model_copy(update={"layer_drop": 0.1})
    assert ENCODER_PRESETS["base"].layer_drop == 0.0


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("bass", {}, ["unknown encoder preset 'bass'", "did you mean 'base'", "tiny, mini, small, base, large"]),
        ("base", {"n_layers": 3}, ["unknown encoder field 'n_layers'", "did you mean 'num_layers'", "width"]),
        ("base", {"num_heads": 7}, ["num_heads=7 must divide width=768"]),
        ("base", {"conv_pos_groups": 5}, ["conv_pos_groups=5 must divide width=768"]),
        ("base", {"pre_norm": True}, ["pre_norm=True excludes deep_norm=True", "set deep_norm=False"]),
        ("base", {"dropout": 1.0}, ["dropout=1.0 must be a probability"]),
        ("base", {"num_layers": 0}, ["num_layers=0 must be at least 1"]),
        ("base", {"num_mel_bins": 80, "patch_size": 32}, ["num_mel_bins=80 must be a multiple of patch_size=32"]),
        ("base", {"relative_buckets": 30}, ["relative_buckets=30 must be a multiple of 4"]),
        ("base", {"relative_max_distance": 80}, ["relative_max_distance=80 must exceed relative_buckets / 4 = 80"]),
        ("base", {"sample_rate_hz": 44_100}, ["sample_rate_hz=44100 must be 16000", "resample"]),
        ("base", {"width": "wide"}, ["width='wide'"]),
    ],
)
def test_errors_name_field_value_rule_and_remedy(preset: str, overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(re.escape(word) for word in words)):
        encoder_config(preset, **overrides)


def test_a_config_is_frozen_and_every_field_is_explained() -> None:
    config = encoder_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.width = 5  # type: ignore[misc]
    assert [name for name, field in EncoderConfig.model_fields.items() if not field.description] == []
