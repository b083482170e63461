"""A manifest comes back as it was written; anything else at its place is one clear line."""

import json
from pathlib import Path

import pytest

from beats_ray.config import UserError
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard, read_manifest
from beats_ray.data.storage import open_place

pytestmark = pytest.mark.unit

MANIFEST = DatasetManifest(
    name="x",
    label_names=("dog", "rain"),
    clips=3,
    clips_by_fold={"1": 3},
    clips_by_split={"": 3},
    seconds=1.5,
    fbank_mean=11.7,
    fbank_std=4.5,
    source="/raw",
    source_files=4,
    quarantined=1,
    shards=(Shard(file="00000.parquet", sha256="ab", bytes=9, row_groups=(RowGroup(clips=3, fold=1, split=""),)),),
    settings={"kind": "esc50", "shard_mib": 1.5},
)


def test_a_manifest_comes_back(root: str) -> None:
    (open_place(root) / "dataset.json").write_json(MANIFEST.model_dump(mode="json"))
    assert read_manifest(open_place(root)) == MANIFEST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a prepared data set (no dataset.json); run `beats-ray prepare` first"),
        ("{", "dataset.json: not valid JSON"),
        ("[]", "format_version=None, this program reads 1"),
        ('{"format_version": 2}', "format_version=2, this program reads 1; prepare the data set again"),
        ('{"format_version": 1}', "dataset.json: name: Field required"),
        (json.dumps(MANIFEST.model_dump(mode="json") | {"clips": "many"}), "dataset.json: clips: Input should be"),
        (json.dumps(MANIFEST.model_dump(mode="json") | {"colour": 1}), "dataset.json: colour: Extra inputs"),
    ],
)
def test_what_is_no_manifest_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_manifest(open_place(str(tmp_path)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
