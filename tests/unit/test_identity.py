"""What makes a run another one: the names of labels, where a job reads labels, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from beats_ray import cross_validate
from beats_ray.config import (
    CrossValidateConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    Job,
    PretrainConfig,
    SweepConfig,
    TokenizeConfig,
    load_config,
)
from beats_ray.data.manifest import DatasetManifest
from beats_ray.identity import content_keys
from tests.support.prepared import write_dataset

pytestmark = pytest.mark.unit

NAMES = ("dog", "rain", "siren")


@pytest.fixture
def manifest(tmp_path: Path) -> DatasetManifest:
    return write_dataset(tmp_path / "data", NAMES)


@pytest.mark.parametrize(
    ("job", "reads_labels"),
    [
        (FinetuneConfig, True),
        (SweepConfig, True),
        (EvaluateConfig, True),
        (CrossValidateConfig, True),
        (PretrainConfig, False),
        (DistillConfig, False),
        (TokenizeConfig, False),
    ],
)
@pytest.mark.parametrize(
    "change", [{"label_names": ("cat", "rain", "siren")}, {"label_names": NAMES[::-1]}, {"multi_label": True}],
    ids=["renamed", "reordered", "multi-label"],
)  # fmt: skip
def test_other_label_names_are_another_data_set_to_the_jobs_that_read_labels(
    tmp_path: Path, manifest: DatasetManifest, job: type[Job], reads_labels: bool, change: dict[str, Any]
) -> None:
    config = load_config(job, None, [f"data.path={tmp_path / 'data'}", "output=o"])
    before = content_keys(config)
    assert content_keys(config) == before
    (tmp_path / "data" / "dataset.json").write_text(manifest.model_copy(update=change).model_dump_json())
    assert (content_keys(config) != before) == reads_labels


def test_a_run_of_a_cross_validation_has_the_key_of_a_fine_tuning_of_its_own(
    tmp_path: Path, manifest: DatasetManifest
) -> None:
    (tmp_path / "encoder.pt").write_bytes(b"weights")
    places = [f"data.path={tmp_path / 'data'}", f"encoder={tmp_path / 'encoder.pt'}", "output=o"]
    config = load_config(FinetuneConfig, None, places)
    assert cross_validate._keys_of(config.data.path, config.encoder) == content_keys(config)
