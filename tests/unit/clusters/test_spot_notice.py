"""The notice of a spot machine's end: asked for as each cloud wants it, heard once, passed on to Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.metadata_service import Metadata, metadata_service

from beats_ray.clusters import spot_notice

pytestmark = pytest.mark.unit


@pytest.fixture
def metadata() -> Iterator[str]:
    with metadata_service() as address:
        yield address


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_notice_is_waited_for_and_passed_on_with_the_time_that_is_left(
    cloud: str, metadata: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits, drained = [], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        Metadata.taken = len(waits) == 2

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(spot_notice, "drain", drained.append)
    assert spot_notice.main([cloud, metadata]) == 0
    assert len(waits) == 2
    assert drained == [{"aws": 120, "gcp": 30}[cloud]]


def test_a_service_that_is_away_is_no_notice(metadata: str) -> None:
    for cloud in spot_notice.CLOUDS.values():
        assert not cloud.is_announced("http://127.0.0.1:9")
        assert not cloud.is_announced(metadata)
        Metadata.taken = True
        assert cloud.is_announced(metadata)
        Metadata.taken = False


def test_an_unknown_cloud_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert spot_notice.main(["azure"]) == 2
    assert capsys.readouterr().err == "spot_notice: cloud='azure' is unknown; use aws or gcp\n"
