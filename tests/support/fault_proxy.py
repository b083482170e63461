"""An HTTP proxy in front of an object store that makes mistakes, from a seed."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class FaultRates:
    """Parts of the requests that go wrong, each in its own way."""

    errors: float = 0.0
    """Answered with one of `statuses` without asking the server."""
    cuts: float = 0.0
    """The connection is closed in the middle of the body."""
    stalls: float = 0.0
    """Answered a second late."""
    statuses: tuple[int, ...] = (500, 503)
    """500 and 503 are asked again by pyarrow itself, five times; 501 is not."""


class FaultProxy:
    """Forwards requests unchanged (signatures stay valid) to wherever `upstream` says the server is now."""

    def __init__(
        self,
        upstream: Callable[[], str],
        rates: FaultRates,
        seed: int = 0,
    ) -> None:
        self.rates = rates
        self.counts: Counter[str] = Counter()
        self._upstream = upstream
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                proxy.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            draw, status = self._random.random(), self._random.choice(self.rates.statuses)
            self.counts["requests"] += 1
        if draw < self.rates.errors:
            self._count("errors")
            self._send(request, status, {"Content-Length": "0"}, b"")
            return
        draw -= self.rates.errors
        if self.rates.cuts <= draw < self.rates.cuts + self.rates.stalls:
            self._count("stalls")
            time.sleep(1.0)
        try:
            answer, headers, content = self._ask(request, body)
        except OSError:
            self._count("unreachable")
            request.close_connection = True
            request.connection.close()
            return
        if 0 <= draw < self.rates.cuts and len(content) > 1:
            self._count("cuts")
            self._send(request, answer, headers, content[: len(content) // 2])
            request.close_connection = True
            request.wfile.flush()
            request.connection.close()
            return
        self._send(request, answer, headers, content)

    def _ask(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        server = urlsplit(self._upstream())
        connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=30)
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        content = response.read()
        dropped = ("connection", "transfer-encoding", "keep-alive")
        headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
        if request.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        connection.close()
        return response.status, headers, content

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        try:
            request.send_response_only(status)
            for name, value in headers.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(content)
        except OSError:  # the client has gone
            request.close_connection = True

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1
