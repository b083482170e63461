"""The user's mistakes, as exceptions. It imports nothing heavy: the stream's tasks raise them too and start quickly."""

import re


class UserError(Exception):
    """A mistake of the user's: shown as one line on stderr, exit status 2, no stack trace."""


class ConfigError(UserError):
    """A configuration that breaks a rule; the message names field, value, rule and remedy."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__(mistakes[0] if mistakes else "")
        self.mistakes = mistakes
        """One line for every mistake that was found, the message first."""


def find_user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an error that a Ray task or worker may have wrapped.

    Of what Ray Data's tasks raise only the trace is left, as text; its last line of a mistake is the mistake.
    """
    seen: set[int] = set()
    waiting, told = [error], None
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)  # RayTaskError
        if isinstance(current, UserError) and not isinstance(cause, BaseException):
            return current
        told = told or _told_by(str(current))
        failures = getattr(current, "worker_failures", None)  # Ray Train
        waiting += [cause, *(failures.values() if isinstance(failures, dict) else ()), current.__cause__]
    return told


def _told_by(trace: str) -> UserError | None:
    lines = re.findall(r"^beats_ray\.errors\.(?:UserError|ConfigError): (.+)$", trace, re.MULTILINE)
    return UserError(lines[-1]) if lines else None
