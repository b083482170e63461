"""The user's mistakes, as exceptions. It imports nothing: the stream's tasks raise them too and must start quickly."""


class UserError(Exception):
    """A mistake of the user's: shown as one line on stderr, exit status 2, no stack trace."""


class ConfigError(UserError):
    """A configuration that breaks a rule; the message names field, value, rule and remedy."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__(mistakes[0] if mistakes else "")
        self.mistakes = mistakes
        """One line for every mistake that was found, the message first."""
