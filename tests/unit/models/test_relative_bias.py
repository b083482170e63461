"""The bias of two dimensions: what it depends on, that parts agree with the whole, and what it cannot go with."""

from pathlib import Path

import pytest
import torch

from beats_ray.models import (
    BeatsEncoder,
    PatchMask,
    build_encoder,
    encoder_config,
    load_model,
    save_model,
    save_released,
)
from beats_ray.models.attention import GridRelativeBias
from beats_ray.models.predictor import MaskedPatchPredictor, PredictorConfig

pytestmark = pytest.mark.unit

ROWS, COLUMNS = 5, 8


def bias() -> GridRelativeBias:
    torch.manual_seed(0)
    return GridRelativeBias(320, 2, 800, COLUMNS)


def test_the_bias_is_one_of_the_time_distance_plus_one_of_the_frequency_distance() -> None:
    table = bias()
    bias_HRCRC = table(ROWS * COLUMNS)[0].unflatten(2, (ROWS, COLUMNS)).unflatten(1, (ROWS, COLUMNS))
    for row, column, to_row, to_column in ((0, 0, 0, 0), (1, 2, 4, 2), (1, 2, 1, 7), (4, 7, 0, 0), (2, 7, 3, 0)):
        time = table.time(ROWS)[0, :, row, to_row]
        frequency = table.frequency(COLUMNS)[0, :, column, to_column]
        torch.testing.assert_close(bias_HRCRC[:, row, column, to_row, to_column], time + frequency)
    assert len({float(x) for x in table.frequency(COLUMNS)[0, 0].flatten()}) == 2 * COLUMNS - 1  # each distance its own
    assert len({float(x) for x in table.time(ROWS)[0, 0].flatten()}) == 2 * ROWS - 1
    # The distance between grid indices does not tell these two apart.
    assert not torch.allclose(bias_HRCRC[:, 0, 7, 1, 0], bias_HRCRC[:, 0, 0, 0, 1])


def test_visible_patches_have_the_bias_of_their_places() -> None:
    table = bias()
    whole_HNN = table(ROWS * COLUMNS)[0]
    position_BM = torch.tensor([[0, 3, 9, 22, 39], [8, 7, 1, 30, 12]])
    parts_BHMM = table(ROWS * COLUMNS, position_BM)
    for places, part_HMM in zip(position_BM, parts_BHMM, strict=True):
        torch.testing.assert_close(part_HMM, whole_HNN[:, places][:, :, places])


def test_masking_nothing_changes_nothing_and_every_table_learns() -> None:
    encoder = build_encoder("tiny", relative_bias_2d=True)
    fbank = torch.randn(1, 80, 128)
    everything = torch.arange(40).unsqueeze(0)
    torch.testing.assert_close(encoder(fbank)[0], encoder(fbank, None, everything)[0], atol=1e-5, rtol=1e-4)
    predictor = MaskedPatchPredictor(encoder, PredictorConfig(num_codes=5, num_layers=1))
    predictor(fbank, None, PatchMask(everything[:, ::4], everything[:, 1::4])).sum().backward()
    tables = {name: one for name, one in predictor.named_parameters() if "relative_attention_bias" in name}
    assert len(tables) == 4  # two of the encoder, two of the label predictor
    assert all(one.grad is not None and one.grad.any() for one in tables.values())


def test_it_is_off_by_default_and_changes_the_features_where_it_is_on() -> None:
    features = []
    for options in ({}, {"relative_bias_2d": False}, {"relative_bias_2d": True}):
        torch.manual_seed(0)
        encoder = build_encoder("tiny", **options)
        torch.manual_seed(1)
        for name, parameter in encoder.named_parameters():
            if "relative_attention_bias" in name:
                torch.nn.init.normal_(parameter)
        features.append(encoder(torch.randn(1, 80, 128, generator=torch.Generator().manual_seed(2)))[0])
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=0.01)


def test_its_encoder_is_saved_and_loaded_but_has_no_released_form(tmp_path: Path) -> None:
    encoder = build_encoder("tiny", relative_bias_2d=True).eval()
    loaded = load_model(save_model(encoder, tmp_path / "model"))
    fbank = torch.randn(1, 80, 128)
    assert torch.equal(loaded(fbank)[0], encoder(fbank)[0])
    with pytest.raises(ValueError, match="relative_bias_2d=True has no place in the released format"):
        save_released(encoder, tmp_path / "model.pt")


def test_compact_positions_have_no_rows_and_columns() -> None:
    with pytest.raises(ValueError, match=r"positions='compact'.*relative_bias_2d"):
        BeatsEncoder(encoder_config("tiny", relative_bias_2d=True), "compact")
