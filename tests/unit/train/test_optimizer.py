"""The schedule and the parameter groups."""

import pytest
import torch

from beats_ray.config import TrainSettings
from beats_ray.models import build_encoder
from beats_ray.train.optimizer import build_optimizer, learning_rate, parameter_groups

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_rises_to_its_peak_and_falls_to_nearly_zero(schedule: str) -> None:
    settings = TrainSettings(steps=100, warmup_steps=10, learning_rate=1e-3, schedule=schedule)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 2e-5


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    encoder = build_encoder("tiny")
    frozen = next(encoder.parameters()).requires_grad_(False)
    groups = parameter_groups(encoder, TrainSettings(), encoder.parameter_depths())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in encoder.parameters() if parameter is not frozen)


def test_layer_decay_slows_the_input_side_most_and_biases_do_not_decay() -> None:
    encoder = build_encoder("tiny")
    depths = encoder.parameter_depths()
    groups = parameter_groups(encoder, TrainSettings(layer_decay=0.5), depths)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    deepest = max(depths.values())
    for name, parameter in encoder.named_parameters():
        assert scale[id(parameter)] == 0.5 ** (deepest - depths[name])
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.0) == (parameter.ndim < 2)
    assert min(scale.values()) < max(scale.values()) == 1.0


def test_names_without_a_depth_count_as_deepest() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    groups = parameter_groups(module, TrainSettings(layer_decay=0.5), {"0.weight": 0, "0.bias": 3})
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(module[0].weight)] == 0.125
    assert scales[id(module[1].weight)] == 1.0


def test_the_optimizer_is_fused() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), TrainSettings())
    assert {group["fused"] for group in optimizer.param_groups} == {True}
