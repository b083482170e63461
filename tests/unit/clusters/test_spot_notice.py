"""The notice of a spot machine's end: asked for as each cloud wants it, heard once, passed on to Ray."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from beats_ray.clusters import spot_notice

pytestmark = pytest.mark.unit


class Metadata(BaseHTTPRequestHandler):
    """Both clouds' services: EC2's answers to a session token alone, Google's to its header alone."""

    taken = False

    def do_PUT(self) -> None:
        self._answer("session" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"]:
            self._answer('{"action": "terminate"}' if type(self).taken else None)
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer("TRUE" if type(self).taken else "FALSE")
        else:
            self._answer(None)

    def log_message(self, *_: Any) -> None:
        """Nothing to the test's output."""

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.taken = False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
