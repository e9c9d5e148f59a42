"""One engine on several ranks: what rank 0 computes all of them get, and a failure on any ends it on all."""

from __future__ import annotations

import atexit
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import EngineDeadError, UlyssesError, describe, fatal, is_lost_connection
from ulysses_infer.job.follower import follow
from ulysses_infer.job.processes import STOP_SECONDS, WorkerProcesses
from ulysses_infer.worker.channel import CALL, SHUTDOWN
from ulysses_infer.worker.rank import Rank

T = TypeVar("T")


class SharedEngine:
    """This rank's part of an engine, and its end."""

    def __init__(self, spmd: bool) -> None:
        """`spmd`: every rank makes the same calls, as under a launcher; else the others are worker processes."""
        self._spmd = spmd
        self._processes: WorkerProcesses | None = None
        self._rank: Rank | None = None
        self._engine: Engine | None = None  # rank 0 alone has it

    def shutdown(self) -> None:
        """Stop the engine and every process it started, and let its memory go. Safe to call again."""
        told = False
        try:
            told = self._tell_workers()
        finally:
            self._end(at_once=not told)

    def _tell_workers(self) -> bool:
        """Ask the worker processes to end; False if one of them cannot hear it any more."""
        if self._rank is not None and self._processes is not None:
            self._rank.groups.limit_waits(STOP_SECONDS)
            try:
                self._rank.channel.send(SHUTDOWN)
            except RuntimeError:
                return False
        return True

    def _shared(self, compute: Callable[[Engine], T]) -> T:
        """Compute on rank 0 and give every rank the result, or the error."""
        self._live()
        if self._engine is None:
            followed: T = self._follow()
            return followed
        try:
            with self._ending_on_failure():
                result = compute(self._engine)
        except UlyssesError as error:
            if self._spmd and self._rank is not None:
                self._rank.channel.send_error(error)
            raise
        self._share(result)
        return result

    def _follow(self) -> Any:
        with self._ending_on_failure():
            return follow(self._live())

    def _share(self, value: Any) -> None:
        if self._spmd:
            with self._ending_on_failure(), fatal("sharing a result"):
                self._live().channel.send_value(value)

    def _live(self) -> Rank:
        if self._rank is None:
            raise EngineDeadError("the engine is shut down; make a new one with init_inference")
        return self._rank

    def _everywhere(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action(rank, *args)` on all ranks; worker processes are told to."""
        rank = self._live()
        with self._ending_on_failure():
            if self._processes is not None:
                rank.channel.send(CALL, pickle.dumps((action, args)))
            action(rank, *args)

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Anything but a refusal leaves the ranks out of step: the engine ends, and the others are let go."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, UlyssesError) and not isinstance(error, EngineDeadError):
                raise
            cause = error.__cause__ or error
            losses = self._losses(cause)
            traceback.clear_frames(cause.__traceback__)  # they hold the groups that `_end` is to close
            self._end(at_once=True)
            if losses:
                raise EngineDeadError(f"the engine ended: {losses}") from cause
            if isinstance(error, EngineDeadError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine ended: {describe(error)}") from error

    def _losses(self, cause: BaseException) -> str:
        """Which worker processes are gone, if that is what an exchange failed for."""
        if self._processes is None or not isinstance(cause, RuntimeError) or isinstance(cause, UlyssesError):
            return ""
        return self._processes.losses(wait=is_lost_connection(cause))

    def _end(self, at_once: bool) -> None:
        """Leave the group, end the workers; weights and cache go with the references to them."""
        processes, rank = self._processes, self._rank
        self._processes = self._rank = self._engine = None
        atexit.unregister(self.shutdown)
        if processes is not None:
            processes.stop(at_once)
            if rank is not None:
                rank.release_cores()
        elif rank is not None:
            rank.close()
