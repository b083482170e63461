"""Every process that a test's command starts, however far down, found by a mark in its environment."""

import psutil

MARK = "BEATS_RAY_TEST_MARK"
"""The environment variable; its value is the test's own."""


def marked_processes(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """Those that carry the mark, in this environment variable, and are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == mark and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_marked(mark: str) -> None:
    """Kills them, and what they start meanwhile, until none is left."""
    while marked := marked_processes(mark):
        for process in marked:
            try:
                process.kill()
                process.wait(10)
            except psutil.NoSuchProcess:
                continue
