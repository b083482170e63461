"""What a cloud's machines ask of themselves, served on loopback: whether a spot machine is about to be taken."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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


@contextlib.contextmanager
def metadata_service() -> Iterator[str]:
    """Its address; `Metadata.taken` announces the end."""
    Metadata.taken = False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
