"""The report and TensorBoard in a real browser: nothing fails, everything is there, it fits a phone, sounds play.

python -m pytest -m slow tests/slow/test_report_browser.py      # needs `chromium` on PATH, skips without
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser, find_browser
from support.report_runs import build_full_run, build_run, training_metrics

from beats_ray.data.storage import open_place
from beats_ray.report import build_sections, write_report
from beats_ray.reporting.run_folder import read_run
from beats_ray.train.loggers import TensorBoardLogger

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no chromium on PATH: install one to look at the report in it"),
]

MEASURE = """(async () => {
  const outside = [...document.querySelectorAll('main *')].filter(
    one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1
           && !one.closest('.wide, .scroll, pre'));
  const sounds = await Promise.all([...document.querySelectorAll('audio')].map(one => new Promise(done => {
    one.onloadedmetadata = () => done(one.duration);
    one.onerror = () => done(-1);
    one.load(); one.preload = 'auto';
  })));
  const style = getComputedStyle(document.body);
  return {
    titles: [...document.querySelectorAll('h2')].map(one => one.textContent),
    empty: [...document.querySelectorAll('section')].filter(one => one.children.length < 2).length,
    scrolled: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    outside: outside.map(one => one.tagName + ' ' + one.textContent.slice(0, 40)),
    sounds: sounds,
    ground: style.backgroundColor,
    drawn: [...document.querySelectorAll('figure svg[role=img]')].filter(
      one => one.getBoundingClientRect().height > 40).length,
    figures: document.querySelectorAll('figure').length,
  };
})()"""


SHOWN_TEXT = """(function texts(node) {
  return [...node.childNodes].map(one => (one.shadowRoot ? texts(one.shadowRoot) : '')
      + (one.nodeType === 3 ? one.textContent : ['STYLE', 'SCRIPT'].includes(one.tagName) ? '' : texts(one))).join(' ');
})(document.body)"""
"""A page's text, that of its web components included."""
RATES = {"aa11": 0.0003, "bb22": 0.001, "cc33": 0.01}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser.start(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "run"
    write_report(build_full_run(folder).uri)
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_is_whole_in_a_browser(run: Path, browser: Browser, width: int, dark: bool) -> None:
    page = run / "report.html"
    visit = browser.visit(page.as_uri(), width=width, dark=dark, script=MEASURE)
    assert (visit.errors, visit.warnings) == ([], [])
    assert visit.fetched == [page.as_uri()]
    seen = visit.value
    assert seen["titles"] == [one.title for one in build_sections(read_run(open_place(str(run))), False)]
    assert seen["empty"] == 0
    assert (seen["scrolled"], seen["outside"]) == (0, [])
    assert seen["drawn"] == seen["figures"] > 15
    assert len(seen["sounds"]) == 12
    assert all(3.9 < seconds < 4.3 for seconds in seen["sounds"]), seen["sounds"]
    assert seen["ground"] == ("rgb(18, 18, 17)" if dark else "rgb(249, 249, 247)")


@pytest.mark.parametrize("finished", [0, 1])
def test_the_report_of_a_run_under_way_fits_a_phone(finished: int, browser: Browser, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", finished_iterations=finished)
    write_report(run.uri)
    visit = browser.visit((tmp_path / "run" / "report.html").as_uri(), width=390, script=MEASURE)
    assert visit.errors == []
    assert (visit.value["scrolled"], visit.value["outside"], visit.value["empty"]) == (0, [], 0)


def test_a_page_with_a_mistake_is_found_out(browser: Browser, tmp_path: Path) -> None:
    """The checks above see a script that fails, a picture that is fetched, a box that is too wide, a broken sound."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><main><h2>x</h2>"
        "<div style='width:700px'>wide</div><img src='http://example.invalid/a.png'>"
        "<audio src='data:audio/mpeg;base64,AAAA'></audio><script>nowhere()</script></main>"
    )
    visit = browser.visit(page.as_uri(), width=390, script=MEASURE)
    assert any("nowhere is not defined" in error for error in visit.errors)
    assert any("ERR_NAME_NOT_RESOLVED" in error for error in visit.errors)
    assert "http://example.invalid/a.png" in visit.fetched
    assert visit.value["outside"] == ["DIV wide"]
    assert visit.value["sounds"] == [-1]


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows one run of ours, and a sweep's three trials."""
    settings = {"pretrain": None} | {
        f"sweep/trials/{name}": {"train.learning_rate": rate, "augment.mixup": 0.4} for name, rate in RATES.items()
    }
    for run, drawn in settings.items():
        logger = TensorBoardLogger(open_place(str(tmp_path / "logs" / run / "tensorboard")), 0, run, drawn)
        for record in training_metrics(20, 6.9, 2.6):
            logger.write(record)
        logger.close(complete=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs"), "--port", str(port),
               "--host", "127.0.0.1", "--load_fast", "false"]  # fmt: skip
    with (tmp_path / "tensorboard.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/data/plugin/scalars/tags", process)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_tensorboard_shows_a_run_without_an_error(tensorboard: str, browser: Browser, width: int, dark: bool) -> None:
    cards = (
        "['pretrain/tensorboard', 'wait_fraction', 'clips_per_s'].every(one => document.body.innerText.includes(one))"
    )
    visit = browser.visit(f"{tensorboard}/#timeseries", width=width, dark=dark, ready=cards)
    assert visit.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_tensorboard_s_hparams_tab_has_a_row_for_each_trial(
    tensorboard: str, browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    wanted = [*RATES, "train.learning_rate", "train/loss"]
    ready = f"{wanted}.every(one => ({SHOWN_TEXT}).includes(one))"
    picture = tmp_path / "hparams.png"
    visit = browser.visit(f"{tensorboard}/#hparams", width=width, dark=dark, ready=ready, script=SHOWN_TEXT,
                          screenshot=picture)  # fmt: skip
    assert visit.errors == []
    print(picture)
    assert all(f"{rate:g}" in visit.value for rate in RATES.values())


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "TensorBoard ended"
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # loopback
            if b"train/loss" in answer.read():
                return
        time.sleep(0.5)
    raise TimeoutError(url)
