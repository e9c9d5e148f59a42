"""Errors a user can act on. Each message is one line: what was wrong, the value, the remedy."""


class UlyssesError(Exception):
    """Base of every error this package raises on purpose; front ends print its message without a stack trace."""


class ConfigError(UlyssesError, ValueError):
    """A recipe, override or argument is wrong."""


class CheckpointError(UlyssesError):
    """A checkpoint is missing, truncated or does not match its own config."""


class UnsupportedModelError(UlyssesError):
    """An architecture or feature this engine refuses to serve, named with its reason."""


class RequestError(UlyssesError, ValueError):
    """One request is invalid; every other request goes on unharmed."""


class EngineDeadError(UlyssesError, RuntimeError):
    """The engine can no longer run steps: a rank died, raised or was shut down."""


class OverloadedError(UlyssesError):
    """The server takes no more requests for now: it is starting, full or shutting down. Trying later helps."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
