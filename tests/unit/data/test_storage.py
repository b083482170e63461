"""Places behave the same on local folders and on a real S3 server, and faults are one clear line."""

import pickle
import socket
import time
from pathlib import Path

import pyarrow as pa
import pytest

from beats_ray.config import UserError
from beats_ray.data.storage import StorageError, open_place, read_table, write_table
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.unit


def test_what_is_written_is_read_again(root: str) -> None:
    place = open_place(root) / "a" / "b.bin"
    assert not place.exists()
    place.write_bytes(b"old")
    place.write_bytes(b"newer")
    assert place.read_bytes() == b"newer"
    assert place.size_bytes() == 5
    assert place.exists()
    assert not place.is_dir()
    assert open_place(root).is_dir()


def test_json_and_tables_come_back(root: str) -> None:
    place = open_place(root)
    (place / "x.json").write_json({"größe": [1, 2.5, None]})
    assert (place / "x.json").read_json() == {"größe": [1, 2.5, None]}
    table = pa.table({"a": list(range(10)), "b": ["x"] * 10})
    write_table(place / "x.parquet", table, row_group_rows=4)
    assert read_table(place / "x.parquet") == table
    assert read_table(place / "x.parquet", ["a"]).column_names == ["a"]


def test_list_is_sorted_and_empty_where_nothing_is(root: str) -> None:
    place = open_place(root)
    assert place.list() == []
    for name in ("b/2", "b/1", "a"):
        (place / name).write_bytes(b"x")
    assert [found.uri for found in place.list()] == [f"{place.uri}/a", f"{place.uri}/b"]
    files = [found for found in place.list(recursive=True) if not found.is_dir()]
    assert [found.uri.removeprefix(place.uri) for found in files] == ["/a", "/b/1", "/b/2"]
    assert files[0].read_bytes() == b"x"


def test_missing_file_is_file_not_found(root: str) -> None:
    for read in (open_place(root).read_bytes, lambda: read_table(open_place(root) / "no.parquet")):
        with pytest.raises(FileNotFoundError):
            read()


def test_delete_takes_a_whole_tree_and_nothing_beside_it(root: str) -> None:
    place = open_place(root)
    for name in ("run/a/b/c", "run/a/d", "run/e", "run-2/f", "runs"):
        (place / name).write_bytes(b"x")
    started = time.monotonic()
    (place / "run").delete()
    (place / "run").delete()  # nothing there any more: nothing happens
    assert time.monotonic() - started < 8.0
    assert not (place / "run").exists()
    assert (place / "run-2/f").exists()
    (place / "runs").delete()
    assert [found.name for found in place.list()] == ["run-2"]


def test_upload_and_download_keep_the_tree(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/x").write_bytes(b"1")
    (source / "y").write_bytes(b"2")
    place = open_place(root) / "copy"
    place.upload(source)
    copy = place.download(tmp_path / "copy")
    assert {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
        "deep/er/x": b"1",
        "y": b"2",
    }


def test_open_output_writes_what_it_is_given(root: str) -> None:
    place = open_place(root) / "new" / "stream"
    with place.open_output() as stream:
        stream.write(b"ab")
        stream.write(b"c")
    assert place.read_bytes() == b"abc"


def test_a_place_pickles_and_opens_its_own_connection(root: str) -> None:
    place = open_place(root) / "x"
    place.write_bytes(b"1")
    copy = pickle.loads(pickle.dumps(place))  # noqa: S301
    assert copy == place
    assert "filesystem" not in vars(copy)
    assert copy.read_bytes() == b"1"


def test_a_failed_local_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(str(tmp_path / "x"))
    place.write_bytes(b"old")

    def full_disk(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(StorageError, match="x: No space left on device"):
        place.write_bytes(b"new")
    assert place.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/x: "):
        open_place(str(tmp_path / "file" / "x")).write_bytes(b"1")


@pytest.mark.parametrize(
    ("uri", "message"),
    [("", "empty"), ("s3://", "names no bucket"), ("gs://b/x", "unknown scheme"), ("s3:///", "names no bucket")],
)
def test_a_path_that_is_none_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_place(uri)


def test_relative_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_place("runs/a").uri == str(tmp_path / "runs/a")
    assert open_place("s3://bucket/key/").uri == "s3://bucket/key"


@pytest.mark.usefixtures("store")
def test_a_missing_bucket_is_named() -> None:
    place = open_place("s3://no-such-bucket/x")
    for write in (lambda: place.write_bytes(b""), lambda: place.open_output().__enter__()):
        with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist; create it first"):
            write()
    assert not place.exists()
    with pytest.raises(FileNotFoundError):
        place.read_bytes()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_refused_whatever_is_asked(
    store: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    open_place("s3://beats/secret").write_bytes(b"1")
    monkeypatch.setenv(variable, "wrong")
    place = open_place("s3://beats/secret")
    for ask in (place.read_bytes, place.exists, place.list, place.delete, lambda: place.write_bytes(b"2")):
        with pytest.raises(StorageError, match="refused the request; check AWS_ACCESS_KEY_ID"):
            ask()
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    assert open_place("s3://beats/secret").read_bytes() == b"1"


@pytest.mark.usefixtures("store")
def test_no_key_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    open_place("s3://beats/secret").write_bytes(b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="refused the request; check AWS_ACCESS_KEY_ID"):
        open_place("s3://beats/secret").read_bytes()


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("ask", ["read", "write"])
def test_a_store_that_is_down_fails_in_seconds(monkeypatch: pytest.MonkeyPatch, ask: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        place = open_place("s3://beats/x")
        started = time.monotonic()
        with pytest.raises(StorageError, match=f"object store at {endpoint} cannot be reached; check AWS_ENDPOINT_URL"):
            place.read_bytes() if ask == "read" else place.write_bytes(b"1")
        assert time.monotonic() - started < 30.0
