"""A headless Chromium for tests: what a page logs, fetches and measures, over the DevTools protocol.

    with Browser.start(tmp_path) as browser:
        visit = browser.visit(page.as_uri(), width=390, dark=True, script="document.title")
        assert visit.errors == []

Nothing but loopback can be reached from it. `find_browser()` is None where there is no Chromium.
"""

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_SECONDS = 60.0
VISIT_SECONDS = 90.0
POLL_SECONDS = 0.25
LEVELS = ("error", "assert", "warning")
PHONE_WIDTH = 600
"""Below it a page is shown as a phone shows it."""


def find_browser() -> str | None:
    """The path of a Chromium on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """What came of opening a page."""

    value: Any = None
    """Of the script."""
    errors: list[str] = field(default_factory=list)
    """Exceptions, console errors, failed loads."""
    warnings: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    """Addresses that the page asked for, data URIs left out."""


@dataclass
class Browser:
    """A running Chromium."""

    port: int

    @classmethod
    @contextlib.contextmanager
    def start(cls, folder: Path) -> Iterator["Browser"]:
        """Starts one with a profile of its own in `folder`; it ends with the block. Needs `find_browser()`."""
        program = find_browser()
        assert program is not None
        profile = folder / "profile"
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
            "--remote-debugging-port=0", f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]  # fmt: skip
        with (folder / "browser.log").open("wb") as log:
            process = subprocess.Popen([program, *options, "about:blank"], stdout=log, stderr=log)
            try:
                yield cls(_wait_for_port(profile / "DevToolsActivePort", process))
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def visit(
        self,
        url: str,
        *,
        width: int = 1200,
        height: int = 900,
        dark: bool = False,
        script: str = "null",
        ready: str = "true",
        screenshot: Path | None = None,
    ) -> Visit:
        """Opens the page in a tab of its own; waits until `ready` holds, then evaluates `script` (may be a promise).

        screenshot: a PNG of the whole page. AssertionError where `ready` never holds.
        """
        job = self._visit(url, (width, height), dark, script, ready, screenshot)
        return asyncio.run(asyncio.wait_for(job, VISIT_SECONDS))

    async def _visit(
        self, url: str, size: tuple[int, int], dark: bool, script: str, ready: str, screenshot: Path | None
    ) -> Visit:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{self.port}/json/new?about:blank") as answer:
                target = await answer.json(content_type=None)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = _Tab(socket)
                await tab.prepare(size, dark)
                await tab.call("Page.navigate", url=url)
                while not await tab.evaluate(f"document.readyState === 'complete' && Boolean({ready})"):
                    await asyncio.sleep(POLL_SECONDS)
                tab.visit.value = await tab.evaluate(script)
                if screenshot is not None:
                    taken = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
                    screenshot.write_bytes(base64.b64decode(taken["data"]))
            async with session.get(f"http://127.0.0.1:{self.port}/json/close/{target['id']}"):
                return tab.visit


class _Tab:
    """Calls to one tab, and what it says meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.visit = Visit()

    async def prepare(self, size: tuple[int, int], dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        width, height = size
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                        mobile=width < PHONE_WIDTH)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message.get("method", ""), message.get("params", {}))

    async def evaluate(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.visit.errors.append(str(details["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and details["type"] in LEVELS:
            self._told(details["type"]).append(str(details["args"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in LEVELS:
            entry = details["entry"]
            self._told(entry["level"]).append(f"{entry['text']} {entry.get('url', '')}")
        elif event == "Network.requestWillBeSent" and not details["request"]["url"].startswith("data:"):
            self.visit.fetched.append(details["request"]["url"])

    def _told(self, level: str) -> list[str]:
        return self.visit.warnings if level == "warning" else self.visit.errors


def _wait_for_port(file: Path, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended with status {process.returncode}")
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return int(file.read_text().splitlines()[0])
        time.sleep(0.1)
    raise RuntimeError("the browser did not open its port")
