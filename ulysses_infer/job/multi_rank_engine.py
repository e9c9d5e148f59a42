"""An engine on several ranks: rank 0 computes and all ranks get the result; a failure on any rank ends all."""

from __future__ import annotations

import atexit
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import EngineDeadError, UlyssesError, failure_reason, fatal, is_lost_connection
from ulysses_infer.job.follower import follow
from ulysses_infer.job.interrupts import Interrupts
from ulysses_infer.job.processes import STOP_SECONDS, WorkerProcesses
from ulysses_infer.worker.channel import CALL, SHUTDOWN
from ulysses_infer.worker.rank import Rank

T = TypeVar("T")


class MultiRankEngine:
    """This rank's part of an engine, from start to end."""

    def __init__(self, spmd: bool) -> None:
        """spmd: every rank makes the same calls, as under a launcher; else the other ranks are worker processes."""
        self._spmd = spmd
        self._processes: WorkerProcesses | None = None
        self._rank: Rank | None = None
        self._engine: Engine | None = None  # only on rank 0
        self._interrupts = Interrupts(lambda: self._end(at_once=True))

    def shutdown(self) -> None:
        """Stop the engine and every process it started, and free its memory. Safe to call again."""
        stopped = False
        try:
            stopped = self._stop_workers()
        finally:
            self._end(at_once=not stopped)

    def _stop_workers(self) -> bool:
        """Ask the worker processes to end; False if they can no longer be reached."""
        if self._rank is not None and self._processes is not None:
            self._rank.groups.limit_waits(STOP_SECONDS)
            try:
                self._rank.channel.send(SHUTDOWN)
            except RuntimeError:
                return False
        return True

    def _on_rank_0(self, compute: Callable[[Engine], T]) -> T:
        """Run `compute(engine)` on rank 0; its result is returned, or its error raised, on every rank."""
        self._running_rank()
        if self._engine is None:
            result: T = self._receive()
            return result
        try:
            with self._end_on_failure():
                result = compute(self._engine)
        except UlyssesError as error:
            if self._spmd and self._rank is not None:
                self._rank.channel.send_error(error)
            raise
        self._broadcast(result)
        return result

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """In plain Python, Ctrl-C inside the block takes effect between two steps and leaves the engine usable."""
        if self._spmd:
            yield
            return
        with self._interrupts.postponed():
            yield

    def _on_all_ranks(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action(rank, *args)` on every rank; worker processes get it as a message."""
        rank = self._running_rank()
        with self._end_on_failure():
            if self._processes is not None:
                rank.channel.send(CALL, pickle.dumps((action, args)))
            action(rank, *args)

    def _receive(self) -> Any:
        """On other ranks than 0: run steps until rank 0 broadcasts a value or an error."""
        with self._end_on_failure():
            return follow(self._running_rank())

    def _broadcast(self, value: Any) -> None:
        """On rank 0: give `value` to every rank that waits in `_receive`."""
        if self._spmd:
            with self._end_on_failure(), fatal("sharing a result"):
                self._running_rank().channel.send_value(value)

    def _running_rank(self) -> Rank:
        if self._rank is None:
            raise EngineDeadError("the engine is shut down; make a new one with init_inference")
        return self._rank

    @contextmanager
    def _end_on_failure(self) -> Iterator[None]:
        """End the engine on any error except a refused request and an interrupt between two steps: after it, ranks may
        be out of step."""
        try:
            yield
        except BaseException as error:
            is_refusal = isinstance(error, UlyssesError) and not isinstance(error, EngineDeadError)
            if is_refusal or self._interrupts.is_orderly(error):
                raise
            cause = error.__cause__ or error
            losses = self._losses(cause)
            traceback.clear_frames(cause.__traceback__)  # they hold the process groups that `_end` closes
            self._end(at_once=True)
            if losses:
                raise EngineDeadError(f"the engine ended: {losses}") from cause
            if isinstance(error, EngineDeadError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine ended: {failure_reason(error)}") from error

    def _losses(self, cause: BaseException) -> str:
        """Names the worker processes that are gone, if that is why a collective failed."""
        if self._processes is None or not isinstance(cause, RuntimeError) or isinstance(cause, UlyssesError):
            return ""
        return self._processes.losses(wait=is_lost_connection(cause))

    def _end(self, at_once: bool) -> None:
        """Leave the process groups and end the workers. Weights and cache are freed with the references to them."""
        processes, rank = self._processes, self._rank
        self._processes = self._rank = self._engine = None
        atexit.unregister(self.shutdown)
        if processes is not None:
            processes.stop(at_once)
            if rank is not None:
                rank.release_cores()
        elif rank is not None:
            rank.close()
