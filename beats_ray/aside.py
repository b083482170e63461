"""Results that other settings took the place of stay beside their stage, and are found again by their key.

    iteration-1/pretrain              the stage as its settings are now
    iteration-1/pretrain-1a2b3c4d     what it was under a key that begins with these digits

On a local disk a move is one rename. On an object store it is three steps, so that at any moment one folder counts:
everything is copied, `stage.json` last, and until then the copy does not count; the original's `stage.json` is set to
`moved`, from when on it does not count; the original is deleted, `stage.json` last. Whoever is interrupted anywhere
calls `make_ready` again.
"""

from pathlib import Path

from beats_ray.config import fingerprint
from beats_ray.data.storage import Place, storage_errors
from beats_ray.stage import STAGE_FILE, read_stage

KEY_DIGITS = 8
MOVED = "moved"


def make_ready(folder: Place, key: str) -> None:
    """Afterwards `folder` holds the result of this key, complete or begun, or nothing; no other result is lost."""
    kept = kept_place(folder, key)
    for place in (folder, kept):
        if read_stage(place).get("status") == MOVED:
            _delete_moved(place)
    found = read_stage(folder)
    if found.get("fingerprint") == key:
        return
    if found:
        old_key = str(found.get("fingerprint") or fingerprint(found))
        _move(folder, kept_place(folder, old_key))
    elif folder.list():
        folder.delete()  # a copy that was interrupted: what it is a copy of is whole
    if read_stage(kept).get("fingerprint") == key:
        _move(kept, folder)


def find_result(folder: Place, key: str) -> Place | None:
    """Where the result of this key lies, complete or begun: the stage's folder or the one kept aside; else None."""
    for place in (folder, kept_place(folder, key)):
        found = read_stage(place)
        if found.get("fingerprint") == key and found.get("status") != MOVED:
            return place
    return None


def kept_place(folder: Place, key: str) -> Place:
    """Where a stage's result with this key is kept while another one has its folder."""
    return folder.parent / f"{folder.name}-{key[:KEY_DIGITS]}"


def _move(source: Place, target: Place) -> None:
    target.delete()  # at most an unfinished or an older copy of the same: the source is whole
    if source.is_remote:
        _copy_and_delete(source, target)
    else:
        _rename(source, target)


def _rename(source: Place, target: Place) -> None:
    Path(source.path).rename(target.path)


def _copy_and_delete(source: Place, target: Place) -> None:
    """Moves a stage's folder where there is no rename; see the top of the file."""
    names = [name for name in source.sizes(recursive=True) if name != STAGE_FILE]
    for name in [*names, STAGE_FILE]:
        _copy_file(source / name, target / name)
    state = read_stage(source)
    (source / STAGE_FILE).write_json(state | {"status": MOVED})
    _delete_moved(source)


def _delete_moved(folder: Place) -> None:
    for name in folder.sizes(recursive=True):
        if name != STAGE_FILE:
            (folder / name).delete()
    folder.delete()


def _copy_file(source: Place, target: Place) -> None:
    """Within one storage, by the storage itself: weights do not travel to this machine and back."""
    with storage_errors(target.uri, writing=True):
        if not target.is_remote:
            Path(target.path).parent.mkdir(parents=True, exist_ok=True)
        source.filesystem.copy_file(source.path, target.path)
