"""A stage's record on storage that fails for a moment."""

from pathlib import Path

import pytest

from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.stage import is_complete, run_stage

pytestmark = pytest.mark.unit


def fail_once(monkeypatch: pytest.MonkeyPatch, method: str, passing: bool = True) -> list[StorageError]:
    """The next call of a method of Place fails; returns what it is about to fail with."""
    error = StorageError("s3://bucket/stage.json: object store answers 503")
    error.passing = passing
    original, waiting = getattr(Place, method), [error]

    def fails_once(place: Place, *arguments: object) -> object:
        if waiting:
            raise waiting.pop()
        return original(place, *arguments)

    monkeypatch.setattr(Place, method, fails_once)
    return waiting


@pytest.mark.parametrize("method", ["read_bytes", "write_bytes"])
def test_a_store_that_fails_for_a_moment_costs_a_stage_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    output = open_place(str(tmp_path))
    waiting = fail_once(monkeypatch, method)
    assert run_stage(output, {"a": 1}, lambda: None)
    assert not waiting
    assert is_complete(output)


def test_the_mark_of_completion_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = open_place(str(tmp_path))
    waiting: list[StorageError] = [StorageError("not yet")]

    def work() -> None:
        waiting[:] = []
        waiting.append(fail_once(monkeypatch, "write_bytes"))  # type: ignore[arg-type]

    assert run_stage(output, {"a": 1}, work)
    assert waiting == [[]]
    assert is_complete(output)


def test_why_a_stage_ended_is_never_hidden_by_a_store_that_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        fail_once(monkeypatch, "write_bytes", passing=False)
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_stage(open_place(str(tmp_path)), {"a": 1}, work)
