"""What `bench ceilings` sets beside the clock: costs by formula belong to the steps that are measured, and floors."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beats_ray.bench import ceiling_cases, costs, pretrain_cases
from beats_ray.bench.cases import BENCHES, Cost, Step, formula_encoder
from beats_ray.bench.floor import find_floors
from beats_ray.bench.measure import Measured
from beats_ray.config import BenchConfig, FinetuneConfig
from beats_ray.models import compute_fbank, encoder_config, num_frames
from beats_ray.models.transformer import TransformerStack
from beats_ray.train.flops import fbank_flops
from beats_ray.train.memory import encoder_bytes, step_activations

pytestmark = pytest.mark.unit

CONFIG = BenchConfig(name="ceilings", preset="tiny", clips=2, seconds=2.0)
MODELS = ["encoder_forward", "encoder_step", "masked_encoder_step", "random_labels", "distilled_labels",
          "pretraining_step", "tokenizer_step", "finetuning_step"]  # fmt: skip


@pytest.fixture
def spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as matrix products, done once: PyTorch does not count the fused kernel of a CPU."""
    make = TransformerStack.__init__

    def init(self: TransformerStack, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.use("matmul")
        self.recompute = False

    monkeypatch.setattr(TransformerStack, "__init__", init)


@pytest.mark.usefixtures("spelled_out")
@pytest.mark.parametrize("name", MODELS)
def test_the_formula_s_flops_are_those_of_the_step(name: str) -> None:
    """Beyond them the counter sees one place more of the position convolution, which is thrown away."""
    step = getattr(ceiling_cases, name)(CONFIG)
    assert 1.0 <= counted_flops(step) / costs.COSTS[name](CONFIG).flops < 1.01


def test_the_flops_of_a_step_on_every_patch_are_those_of_the_step() -> None:
    """Beyond them the counter sees the filterbank's product too."""
    step = pretrain_cases.every_patch_step(CONFIG, formula_encoder)
    assert 1.0 <= counted_flops(step) / costs.every_patch_step_cost(CONFIG).flops < 1.02


def counted_flops(step: Step) -> int:
    mapping = {torch.ops.aten.convolution_backward: _conv_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops()


def _conv_backward(grad: list[int], _x: list[int], w: list[int], *_: object, **__: object) -> int:
    """The counter forgets the groups of the weights' gradient (tests/unit/train/test_flops.py)."""
    return 2 * 2 * grad[0] * grad[2] * w[0] * w[1] * w[2]


def test_the_filterbank_s_flops_are_its_product_and_its_transforms() -> None:
    frames = num_frames(32_000)
    with FlopCounterMode(display=False) as counter:
        compute_fbank(torch.zeros(1, 32_000))
    transforms = frames * 2.5 * 512 * 9  # which PyTorch does not count
    assert fbank_flops(32_000) == counter.get_total_flops() + transforms


def test_the_bytes_of_an_encoder_are_those_of_fine_tuning_without_its_head() -> None:
    encoder = encoder_config("tiny")
    published = {"kind": "encoder", "config": {"encoder": encoder.model_dump()}}
    train = {"micro_batch_size": 3, "global_batch_size": 3}
    config = FinetuneConfig.model_validate(
        {"output": "-", "data": {"clip_seconds": 2.0}, "train": train, "layer_drop": 0.0}
    )
    patches, classes = 96, 7
    whole = step_activations("finetune", config, published, classes).kept_bytes
    head_and_input = 4 * 3 * patches * (classes + 1 + 256)
    assert encoder_bytes(encoder, 3, patches, "fp32") == whole - head_and_input
    assert encoder_bytes(encoder, 3, patches, "bf16") < 0.51 * (whole - head_and_input)


@pytest.mark.parametrize("name", [*MODELS, "filterbank"])
def test_clips_cost_in_proportion_and_weights_once(name: str) -> None:
    # From four clips on the position convolution keeps a spectrum instead of its input.
    of = {clips: costs.COSTS[name](CONFIG.model_copy(update={"clips": clips})) for clips in (4, 5, 8)}
    assert of[8].flops == pytest.approx(2 * of[4].flops)
    per_clip = (of[8].bytes - of[5].bytes) / 3
    once = of[4].bytes - 4 * per_clip
    assert (once == 0.0) if name == "filterbank" else (0.0 < once < of[4].bytes)
    assert of[5].bytes == pytest.approx(5 * per_clip + once, rel=1e-6)


def test_masking_saves_both_and_a_backward_pass_costs_both() -> None:
    forward, whole, masked = (costs.COSTS[name](CONFIG) for name in MODELS[:3])
    assert whole.flops > 2.9 * forward.flops
    assert whole.bytes > forward.bytes
    assert masked.flops < 0.5 * whole.flops
    assert masked.bytes < whole.bytes


def test_a_floor_is_the_longer_of_two_times_at_the_fastest_ceilings() -> None:
    def case(name: str, cost: Cost, *step_ms: float, cpu_ms: float) -> Measured:
        return Measured(name, list(step_ms), [0.0], [3 * cpu_ms, cpu_ms, cpu_ms], 0.0, clips_per_step=2, cost=cost)

    floors = find_floors(
        [
            case("product", Cost(1e9, 0.0), 12.0, 10.0, 20.0, cpu_ms=5.0),  # 1e8 FLOP in a millisecond; 2e8 of CPU time
            case("copy", Cost(0.0, 2e8), 25.0, 20.0, 30.0, cpu_ms=20.0),  # 1e7 bytes
            case("by FLOPs", Cost(4e8, 1e7), 20.0, cpu_ms=8.0),
            case("by bytes", Cost(1e8, 8e7), 10.0, 20.0, 90.0, cpu_ms=16.0),
        ]
    )
    assert [one.reached_by_cpu_time for one in floors] == [pytest.approx(0.25), pytest.approx(0.5)]
    assert [(one.case, one.bound_by) for one in floors] == [("by FLOPs", "compute"), ("by bytes", "memory")]
    assert [one.floor_ms for one in floors] == [pytest.approx(2.0), pytest.approx(4.0)]  # for each of two clips
    assert [one.measured_ms for one in floors] == [10.0, 10.0]
    assert [one.reached for one in floors] == [pytest.approx(0.2), pytest.approx(0.4)]
    assert floors[0].gflop == pytest.approx(0.2)
    assert floors[0].mib == pytest.approx(5e6 / 2**20)


def test_every_stage_of_the_bench_has_its_cost() -> None:
    assert all(case.cost is not None for case in BENCHES["ceilings"])
    assert all(case.cost(CONFIG).bytes > 0 for case in BENCHES["ceilings"] if case.cost)
