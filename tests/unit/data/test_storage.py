"""Places behave the same on local folders and on real S3 and GCS servers, and faults are one clear line."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from support.fault_proxy import FaultProxy, FaultRates
from support.gcs_server import GcsServer

from beats_ray.config import UserError
from beats_ray.data import stores
from beats_ray.data.storage import StorageError, open_place, read_table, storage_errors, with_retries, write_table
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


def test_sizes_are_those_of_the_files_at_that_depth(root: str) -> None:
    place = open_place(root)
    for name in ("b/2", "b/ä +%1", "a"):
        (place / name).write_bytes(name.encode())
    assert place.sizes() == {"a": 1}
    assert place.sizes(recursive=True) == {"a": 1, "b/2": 3, "b/ä +%1": 8}
    assert (place / "b/ä +%1").read_bytes() == "b/ä +%1".encode()


def test_copies_go_from_any_place_to_any_place(root: str, tmp_path: Path) -> None:
    place = open_place(root)
    large = bytes(range(256)) * (3 * 2**12)  # several parts of a large upload
    (place / "a/x").write_bytes(large)
    (place / "a/b/y").write_bytes(b"")
    (place / "a").copy_to(place / "copy")
    (place / "a/x").copy_to(open_place(str(tmp_path / "one")))
    assert place.sizes(recursive=True) == {"a/x": len(large), "a/b/y": 0, "copy/x": len(large), "copy/b/y": 0}
    assert (tmp_path / "one").read_bytes() == large


def test_one_column_of_one_row_group_is_read_in_ranges(root: str) -> None:
    place = open_place(root) / "x.parquet"
    write_table(place, pa.table({"a": list(range(1000)), "b": [bytes(1000)] * 1000}), row_group_rows=100)
    with place.filesystem.open_input_file(place.path) as stream:
        assert pq.ParquetFile(stream).read_row_group(3, ["a"])["a"].to_pylist() == list(range(300, 400))
        assert stream.read_at(4, stream.size() - 4) == b"PAR1"


def test_ray_keeps_folders_there(root: str) -> None:
    place = open_place(root) / "ray"
    place.keyless_filesystem.create_dir(f"{place.path}/trial/checkpoint", recursive=True)
    with place.keyless_filesystem.open_output_stream(f"{place.path}/trial/checkpoint/x") as stream:
        stream.write(b"1")
    found = place.keyless_filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    assert [info.path for info in found if info.is_file] == [f"{place.path}/trial/checkpoint/x"]
    assert [below.name for below in place.list()] == ["trial"]
    assert place.sizes(recursive=True) == {"trial/checkpoint/x": 1}
    (place / "trial").delete()
    assert not (place / "trial").exists()


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


def test_a_stream_is_written_from_its_beginning(root: str, tmp_path: Path) -> None:
    place = open_place(root) / "new" / "stream"
    data = bytes(range(256)) * (9 * 2**12)  # more than is in memory at a time
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source:
        source.read(5)
        place.write_stream(source)
        assert place.read_bytes() == data
        place.write_stream(source)
    assert place.read_bytes() == data


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

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full_disk)
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
    [("", "empty"), ("s3://", "names no bucket"), ("http://b/x", "unknown scheme"), ("gs:///", "names no bucket")],
)
def test_a_path_that_is_none_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_place(uri)


def test_relative_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_place("runs/a").uri == str(tmp_path / "runs/a")
    assert open_place("s3://bucket/key/").uri == "s3://bucket/key"
    assert open_place("gs://bucket/key/").path == "bucket/key"


@pytest.mark.usefixtures("store", "gcs_server")
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_missing_bucket_is_named(scheme: str) -> None:
    place = open_place(f"{scheme}://no-such-bucket/x")
    for write in (lambda: place.write_bytes(b""), lambda: place.write_bytes(bytes(20 * 2**20))):
        with pytest.raises(
            StorageError, match=f"{place.uri}: .* has no bucket of that name; create it first"
        ) as caught:
            write()
        assert not caught.value.passing
    assert not place.exists()
    assert place.list() == []
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


def test_a_store_that_is_down_fails_in_seconds(store: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, endpoint)

        def fail(scheme: str, ask: str) -> None:
            place = open_place(f"{scheme}://beats/x")
            started = time.monotonic()
            with pytest.raises(StorageError, match=f"object store at {endpoint} cannot be reached; check ") as caught:
                place.read_bytes() if ask == "read" else place.write_bytes(b"1")
            assert caught.value.passing
            assert time.monotonic() - started < 30.0

        with ThreadPoolExecutor(4) as threads:  # waiting is all they do
            asked = [threads.submit(fail, scheme, ask) for scheme in ("s3", "gs") for ask in ("read", "write")]
            for one in asked:
                one.result()


def test_without_google_credentials_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file.json")
    place = open_place("gs://beats/x")
    for ask in (place.read_bytes, place.exists, place.list, place.delete, lambda: place.write_bytes(b"2")):
        with pytest.raises(StorageError, match=r"^gs://beats/x: object store at Google Cloud got no cred") as caught:
            ask()
        assert "check GOOGLE_APPLICATION_CREDENTIALS" in str(caught.value)
        assert not caught.value.passing


def test_a_token_never_travels_unencrypted(monkeypatch: pytest.MonkeyPatch, gcs_server: GcsServer) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file.json")  # would fail if it were looked for
    open_place("gs://beats/anonymous").write_bytes(b"1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint.removeprefix("http://"))  # as some set it
    assert open_place("gs://beats/anonymous").read_bytes() == b"1"


# pyarrow holds the interpreter's lock while it opens a file of GCS: the proxy would wait for it in the same process.
READ_AND_WRITE = """
import pyarrow as pa
import pyarrow.parquet as pq
from functools import partial
from beats_ray.data.plan import RowGroupRef
from beats_ray.data.shards import read_row_group
from beats_ray.data.storage import open_place, with_retries, write_table

place = open_place("gs://beats/faulty")
table = pa.table({"a": list(range(1000)), "b": [bytes(1000)] * 1000})
with_retries(partial(write_table, place / "x.parquet", table, 100), 60.0)
for number in range(6):
    data = bytes([number]) * 300_000
    with_retries(partial((place / str(number)).write_bytes, data), 60.0)
    assert with_retries((place / str(number)).read_bytes, 60.0) == data
    group = RowGroupRef("x.parquet", number, 100)
    rows = with_retries(partial(read_row_group, place / "x.parquet", str(number), group, ["a"]), 60.0)
    assert rows["a"].to_pylist() == list(range(100 * number, 100 * number + 100))
assert with_retries(place.sizes, 60.0)["x.parquet"] > 10_000
"""


def test_reads_and_writes_of_gcs_outlive_passing_faults(gcs_server: GcsServer) -> None:
    with FaultProxy(lambda: gcs_server.endpoint, FaultRates(errors=0.1, cuts=0.05), seed=1) as proxy:
        environment = os.environ | {"STORAGE_EMULATOR_HOST": proxy.endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", READ_AND_WRITE], env=environment, check=True, timeout=200)
        assert proxy.counts["errors"] >= 3
        assert proxy.counts["cuts"] >= 1


@pytest.mark.parametrize(("status", "passing"), [(403, False), (401, False), (503, True), (429, True)])
def test_what_gcs_refuses_is_not_asked_again_and_what_passes_is(
    monkeypatch: pytest.MonkeyPatch, status: int, passing: bool
) -> None:
    monkeypatch.setattr(stores, "GCS_RETRY_SECONDS", 1)
    with FaultProxy(lambda: "", FaultRates(errors=1.0, statuses=(status,))) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"^gs://beats/x: object store at http://127\.0\.0\.1:") as caught:
            open_place("gs://beats/x").read_bytes()
        assert time.monotonic() - started < 10.0
        assert caught.value.passing is passing
        assert ("refused the request; check GOOGLE_APP" in str(caught.value)) is not passing


def test_a_file_of_gcs_that_lost_its_stream_is_asked_for_again() -> None:
    with pytest.raises(StorageError, match=r"^gs://beats/x: ") as caught, storage_errors("gs://beats/x"):
        raise ValueError("I/O operation on closed file")  # what pyarrow makes of it
    assert caught.value.passing
    with pytest.raises(ValueError, match=r"^I/O operation"), storage_errors("s3://beats/x"):
        raise ValueError("I/O operation on closed file")


def test_time_is_counted_from_the_first_failure() -> None:
    """A shard that took minutes to upload before it failed is uploaded again."""
    passing = StorageError("cut")
    passing.passing = True
    tries: list[float] = []

    def slow_and_cut() -> None:
        tries.append(time.monotonic())
        time.sleep(0.3)
        raise passing

    with pytest.raises(StorageError, match="cut"):
        with_retries(slow_and_cut, 0.2)
    assert len(tries) == 2
    with pytest.raises(StorageError, match="cut"):
        with_retries(slow_and_cut, 0.0)
    assert len(tries) == 3
