"""The errors of the package, and what they look like to users: one line with the fault, the value, the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What gloo and NCCL say when the process at the other end is gone.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset", "Broken pipe", "remote process exited")
NO_ANSWER = ("Timed out", "timed out", "timeout")


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


class ReplicaLostError(OverloadedError):
    """The replica that ran a request is dead, and others serve: the same request can be sent again."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """The error's kind and the first line of its message."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether another rank left or its process ended, rather than this one failing."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_CONNECTION)


def failure_reason(error: BaseException) -> str:
    """Why an exchange or a step failed, in one line."""
    if is_lost_connection(error):
        return "another rank was lost"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_ANSWER):
        return "another rank did not answer in time (runtime.step_timeout)"
    return kind_and_line(error)


def as_user_error(error: Exception) -> UlyssesError:
    """The error as one that every rank can raise, whatever pickle makes of the original."""
    return error if isinstance(error, UlyssesError) else UlyssesError(kind_and_line(error))


@contextmanager
def fatal(doing: str) -> Iterator[None]:
    """Whatever goes wrong inside leaves the ranks out of step: it is raised as `EngineDeadError`."""
    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:
        raise EngineDeadError(f"{doing} failed and the engine ended: {failure_reason(error)}") from error
