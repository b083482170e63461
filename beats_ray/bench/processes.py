"""Work in a process of its own, which sends what it finds as it finds it, and may be given a deadline."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

STOP_SECONDS = 30.0
"""How long a process that was asked to end may take; one that has a Ray cluster stops that first."""

Send = Callable[[Any], None]


class Lost(Exception):  # no mistake of anybody's: what is left to be said of a process
    """A process that did not come to its end; the message says why."""


def messages_from(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    deadline: float | None = None,
    environment: Mapping[str, str | None] = MappingProxyType({}),
) -> Iterator[Any]:
    """Yields what `work(send, *arguments)` sends from a new process, until it returns.

    deadline: on the clock of `time.monotonic`; the process is ended there. Raises Lost then, and where it died.
    environment: variables of the new process, whatever they are in this one; it lacks those that are None.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(sender, work, arguments))
    with _variables(environment):
        process.start()
    sender.close()
    try:
        while True:
            if deadline is not None and not receiver.poll(max(0.0, deadline - time.monotonic())):
                process.terminate()
                raise Lost("not measured: the time was up")
            try:
                message = receiver.recv()
            except EOFError:
                break
            yield message
        process.join(STOP_SECONDS)
        if process.exitcode:
            raise Lost(f"its process ended with status {process.exitcode} (-9: out of memory); lower clips or seconds")
    except SystemExit:  # what the command line makes of SIGTERM; Ctrl-C reaches the process by itself
        process.terminate()
        raise
    finally:
        for ask in (process.terminate, process.kill):
            process.join(STOP_SECONDS)
            if process.is_alive():
                ask()
        process.join()
        receiver.close()


@contextlib.contextmanager
def _variables(environment: Mapping[str, str | None]) -> Iterator[None]:
    """Within the block a process that is started has these variables."""
    before = {name: os.environ.get(name) for name in environment}
    _set(environment)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run(sender: Any, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, _stop)
    os.dup2(2, 1)  # what others print there is not part of the caller's JSON
    work(sender.send, *arguments)
    sender.close()


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(143)  # unwinds, so that a cluster is stopped
