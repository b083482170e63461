"""What a job shows while it runs: stages, progress, notes and tables, on a terminal or in a log file.

console.stage("pretrain, iteration 1")
console.progress(1200, 6400, loss=5.1)      # as often as the caller likes
console.table("Leaderboard", ["iteration", "probe"], [[1, 0.797]])
"""

import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two progress lines where there is no terminal."""
LIVE_LINE_SECONDS = 0.2
LOG_WIDTH = 160
SHARES = ("data wait",)
"""Metrics that are shown as percentages."""


class Console:
    """Writes to stdout. On a terminal, progress is one line that renews itself; elsewhere a plain line now and then."""

    def __init__(self, rich_console: RichConsole | None = None) -> None:
        self._rich = rich_console or RichConsole(highlight=False, soft_wrap=True)
        if not self._rich.is_terminal and rich_console is None:
            self._rich.width = LOG_WIDTH
        self._started = time.monotonic()
        self._title = ""
        self._listener: Callable[[str, str], None] = lambda _stage, _line: None
        self._live: Live | None = None
        self._first: tuple[float, int] | None = None
        self._last_line = ""
        self._last_shown = self._started

    def follow(self, listener: Callable[[str, str], None], title: str) -> None:
        """From now on calls the listener with the stage's title and its line of progress, as often as there is one.

        title: of the job, for what comes before its first stage.
        """
        self._listener = listener
        self._title = title
        listener(title, "")

    def stage(self, title: str) -> None:
        """Starts a new part of the job; progress counts from here."""
        self._finish_line()
        self._begin()
        self._title = title
        self._listener(title, "")
        self._print(Text(f"[{_duration(time.monotonic() - self._started):>7}] {title}", style="bold"))

    def progress(self, done: int, total: int | None, unit: str = "clips", **metrics: float) -> None:
        """Shows done/total, units per second since the first call of this stage, time left, and the metrics."""
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        line = _progress_line(done, total, unit, (now - self._first[0], done - self._first[1]), metrics)
        complete = total is not None and done >= total
        self._listener(self._title, line)
        if self._rich.is_terminal:
            self._renew(line, now, complete)
        elif line != self._last_line and (complete or now - self._last_shown >= PLAIN_LINE_SECONDS):
            self._last_shown = now
            self._print(Text(line))
        self._last_line = line

    def note(self, text: str) -> None:
        """One line of plain text."""
        self._finish_line()
        self._print(Text(f"          {text}"))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A small table; numbers are right-aligned, floats get three decimals."""
        self._finish_line()
        rows = [list(row) for row in rows]
        table = Table(title=title, title_justify="left", title_style="bold")
        for place, column in enumerate(columns):
            numeric = all(isinstance(row[place], int | float) or row[place] is None for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._rich.print(table)

    def written(self, pairs: Iterable[tuple[str, str]]) -> None:
        """What the job wrote and where: the last thing it shows."""
        self._finish_line()
        pairs = list(pairs)
        width = max((len(label) for label, _ in pairs), default=0)
        for label, uri in pairs:
            self._print(Text(f"{label:<{width}}  {uri}"))

    def close(self) -> None:
        """Ends the live line, so that the terminal is left in order."""
        self._finish_line()

    def _begin(self) -> None:
        self._first = None
        self._last_line = ""
        self._last_shown = time.monotonic()

    def _renew(self, line: str, now: float, complete: bool) -> None:
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=True)
            self._live.start()
            self._last_shown = 0.0
        if complete or now - self._last_shown >= LIVE_LINE_SECONDS:
            self._last_shown = now
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _finish_line(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._print(Text(self._last_line))  # the transient line is gone; its last state stays

    def _print(self, text: Text) -> None:
        self._rich.print(text, soft_wrap=True)
        self._rich.file.flush()  # a log file shows it at once


def _progress_line(
    done: int, total: int | None, unit: str, elapsed: tuple[float, int], metrics: dict[str, float]
) -> str:
    seconds, since_first = elapsed
    parts = [f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"]
    if seconds > 0 and since_first > 0:
        rate = since_first / seconds
        parts.append(f"{rate:,.1f} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s")
        if total is not None and done < total:
            parts.append(f"{_duration((total - done) / rate)} left")
    parts += [f"{name} {value:.1%}" if name in SHARES else f"{name} {_cell(value)}" for name, value in metrics.items()]
    return "          " + "  ".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if 0.001 <= abs(value) < 1e6 or value == 0 else f"{value:.2e}"
    return str(value)
