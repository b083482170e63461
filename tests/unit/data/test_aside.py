"""Superseded results are kept, found again, and whole, wherever the move of one is interrupted."""

from pathlib import Path
from typing import Any

import pytest

from beats_ray import aside
from beats_ray.aside import find_result, kept_place, make_ready
from beats_ray.config import UserError, fingerprint
from beats_ray.data.storage import Place, open_place
from beats_ray.stage import check_output, read_stage, run_stage

pytestmark = pytest.mark.unit

FILES = ("model/config.json", "model/model.safetensors", "metrics.jsonl")
OLD, NEW, THIRD = {"steps": 1}, {"steps": 2}, {"steps": 3}


def fill(folder: Place, identity: dict[str, Any]) -> None:
    """A complete stage whose files say whose they are."""

    def work() -> None:
        for name in FILES:
            (folder / name).write_bytes(f"{name} of {identity}".encode())

    make_ready(folder, fingerprint(identity))
    run_stage(folder, identity, work)


def check_whole(place: Place | None, identity: dict[str, Any]) -> None:
    assert place is not None, f"the result of {identity} is lost"
    assert read_stage(place)["status"] == "complete"
    assert read_stage(place)["config"] == identity
    for name in FILES:
        assert (place / name).read_bytes() == f"{name} of {identity}".encode()


def test_a_result_is_kept_aside_and_comes_back(root: str) -> None:
    folder = open_place(root) / "iteration-1" / "pretrain"
    fill(folder, OLD)
    fill(folder, NEW)
    kept = kept_place(folder, fingerprint(OLD))
    assert kept.name == f"pretrain-{fingerprint(OLD)[:8]}"
    check_whole(folder, NEW)
    check_whole(kept, OLD)
    make_ready(folder, fingerprint(OLD))
    check_whole(folder, OLD)
    check_whole(kept_place(folder, fingerprint(NEW)), NEW)
    assert not kept.exists()


def test_the_same_stage_stays_where_it_is(root: str) -> None:
    folder = open_place(root) / "iteration-1" / "pretrain"
    fill(folder, OLD)
    before = sorted(place.uri for place in open_place(root).list(recursive=True))
    make_ready(folder, fingerprint(OLD))
    assert sorted(place.uri for place in open_place(root).list(recursive=True)) == before


def test_a_result_that_is_kept_is_what_the_stage_was_and_no_more(root: str) -> None:
    """A copy that was interrupted has left files that the stage itself has since removed."""
    folder = open_place(root) / "iteration-1" / "pretrain"
    fill(folder, OLD)
    kept = kept_place(folder, fingerprint(OLD))
    (kept / "checkpoints" / "step-00000002" / "commit.json").write_json({})
    fill(folder, NEW)
    assert sorted(kept.sizes(recursive=True)) == sorted([*FILES, "stage.json"])


class Killed(BaseException):
    """The process ends here."""


class Operations:
    """Counts what is done to storage, and kills before the operation with this number."""

    def __init__(self, patch: pytest.MonkeyPatch, kill_at: int) -> None:
        self.done, self._kill_at = 0, kill_at
        for owner, name in ((Place, "write_bytes"), (Place, "delete"), (aside, "_copy_file")):
            patch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, operation: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            if self.done == self._kill_at:
                raise Killed
            self.done += 1
            return operation(*arguments)

        return counted


@pytest.mark.parametrize("with_new", [False, True], ids=["new-to-be-made", "new-kept-aside"])
@pytest.mark.parametrize("then", [OLD, NEW, THIRD], ids=["changed-back", "goes-on", "changed-again"])
def test_killed_anywhere_in_a_move_nothing_is_lost_and_nothing_half_is_taken_for_whole(
    with_new: bool, then: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "_rename", aside._copy_and_delete)  # as on an object store
    kills = 0
    for kill_at in range(100):
        folder = open_place(str(tmp_path / f"{kill_at}" / "pretrain"))
        if with_new:
            fill(folder, NEW)
        fill(folder, OLD)
        with monkeypatch.context() as patch:
            operations = Operations(patch, kill_at)
            try:
                make_ready(folder, fingerprint(NEW))
                assert operations.done <= kill_at
                break
            except Killed:
                kills += 1
        for identity in (OLD, NEW) if with_new else (OLD,):
            check_whole(find_result(folder, fingerprint(identity)), identity)
        make_ready(folder, fingerprint(then))
        for identity in (OLD, NEW) if with_new else (OLD,):
            check_whole(find_result(folder, fingerprint(identity)), identity)
        if then == OLD or (then == NEW and with_new):
            check_whole(folder, then)
        else:
            assert folder.sizes(recursive=True) == {}, "a new stage must not begin among another one's files"
    assert kills > (15 if with_new else 8)


def test_a_command_of_its_own_refuses_a_folder_that_is_half_moved(tmp_path: Path) -> None:
    folder = open_place(str(tmp_path / "pretrain"))
    fill(folder, OLD)
    (folder / "stage.json").write_json(read_stage(folder) | {"status": "moved"})
    with pytest.raises(UserError, match="was being moved aside by `beats-ray iterate`"):
        check_output(folder, OLD)
