"""The replicas of a Ray Serve deployment as one engine: the other end of an `EngineClient`'s socket.

It speaks `server/messages.py` as rank 0 does, so the ingress is the HTTP process of a job but for this end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from msgspec import structs
from prometheus_client import Metric

from ulysses_infer.errors import RequestError, UlyssesError, first_line, kind_and_line
from ulysses_infer.ray.request import RoutedRequest
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.client import READ_BYTES
from ulysses_infer.server.frames import FrameReader, encode_frame
from ulysses_infer.server.messages import (
    Abort,
    AdminCall,
    EngineState,
    FromEngine,
    Ready,
    Refused,
    Reply,
    Stepped,
    StepReport,
    Submit,
    ToEngine,
)
from ulysses_infer.server.router import combined_state

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # between two looks at the replicas
REPORT_TIMEOUT = 10.0
COMMAND_SECONDS = 300.0
MAX_ATTEMPTS = 5  # to complete a request that has no output yet
ATTEMPT_SECONDS = 0.2  # before the second attempt; twice as long before each further one
COMMANDS = (
    "get_policy",
    "set_policy",
    "abort",
    "abort_all",
    "reset_prefix_cache",
    "stats",
    "weight_info",
    "is_sleeping",
)
"""Others change what a replica serves; one that starts later would not have the change."""

_decoder = msgspec.msgpack.Decoder(Stepped | Refused)


class RemoteEngine:
    """Runs requests and commands on replicas. replicas: the handle of their deployment."""

    def __init__(self, replicas: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._replicas, self._streaming = replicas, replicas.options(stream=True)
        self._reader, self._writer = reader, writer
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._commands: set[asyncio.Task[None]] = set()
        self._info: Ready | None = None
        self._states: dict[str, EngineState] = {}  # of running replicas, by id
        self._seen: dict[str, int] = {}  # the latest step of each running replica that the client was told of
        self._ended: list[EngineState] = []  # the last states of others: their counters still count

    async def run(self) -> None:
        """Serve the client until it is gone."""
        reporting = asyncio.create_task(self._report())
        frames: FrameReader[ToEngine] = FrameReader(ToEngine)
        with suppress(ConnectionError):
            while data := await self._reader.read(READ_BYTES):
                for message in frames.feed(data):
                    self._take(message)
        reporting.cancel()

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit():
                task = asyncio.create_task(self._complete(message))
                self._requests[message.request_id] = task
                task.add_done_callback(lambda _: self._requests.pop(message.request_id, None))
            case Abort():
                if (running := self._requests.get(message.request_id)) is not None:
                    running.cancel()
            case AdminCall():
                call = asyncio.create_task(self._answer(message))
                self._commands.add(call)
                call.add_done_callback(self._commands.discard)

    def _send(self, message: FromEngine) -> None:
        self._writer.write(encode_frame(message))

    # -- requests ------------------------------------------------------------------------------------------------

    async def _complete(self, submit: Submit) -> None:
        """Run a request; on another replica if the first one is lost before it has sent anything."""
        request = RoutedRequest(submit, SamplingParams.from_mapping(submit.params).num_distinct)
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                reason = await self._attempt(request)
                if not reason:
                    return
                logger.warning("request %s met a lost replica: %s", submit.request_id, reason)
                if request.has_output or attempt == MAX_ATTEMPTS:
                    self._send(
                        Refused(submit.request_id, f"{_lost(request)}: {reason}; send the request again", "lost")
                    )
                    return
                await asyncio.sleep(ATTEMPT_SECONDS * 2 ** (attempt - 1))
        finally:
            request.is_done = True

    async def _attempt(self, request: RoutedRequest) -> str:
        """Run a request on the replica that the request router chooses; returns why the replica was lost, or ""."""
        try:
            async with aclosing(self._batches(request)) as batches:
                async for message in batches:
                    request.has_output = True
                    self._send(self._of_all(message, request.tried[-1]))
        except Exception as error:  # Ray has a kind for each way in which a replica can be lost
            return _reason(error)
        return ""

    def _of_all(self, message: Stepped | Refused, replica: str) -> Stepped | Refused:
        """The message of a replica with the load of all."""
        if isinstance(message, Refused):
            return message
        self._states[replica] = message.state
        return structs.replace(message, state=self._state())

    async def _batches(self, request: RoutedRequest) -> AsyncGenerator[Stepped | Refused]:
        response = self._streaming.generate.remote(request)
        has_ended = False
        try:
            async for message in response:
                yield _decoder.decode(message)
            has_ended = True
        finally:
            if not has_ended:
                response.cancel()

    # -- commands ------------------------------------------------------------------------------------------------

    async def _answer(self, call: AdminCall) -> None:
        try:
            self._send(Reply(call.number, await self._command(call.name, call.arguments)))
        except RequestError as error:
            self._send(Reply(call.number, error=str(error)))
        except Exception as error:
            logger.exception("command %s failed", call.name)
            self._send(Reply(call.number, error=f"{call.name} failed: {_reason(error)}"))

    async def _command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a command on every replica. One that is lost meanwhile does not count."""
        if name not in COMMANDS:
            raise RequestError(
                f"{name} is not available on Ray, because replicas that start later would not have its effect; "
                "change the recipe and deploy it again"
            )
        results = await self._everywhere("command", name, arguments, seconds=COMMAND_SECONDS)
        answers = [result for result in results if not isinstance(result, BaseException)]
        if not answers:
            raise RequestError(_reason(results[0]) if results else "no replica is running; try again later")
        if name == "stats" and len(answers) > 1:
            return {"replicas": answers}
        if name == "abort_all":
            return {"aborted": [request_id for answer in answers for request_id in answer["aborted"]]}
        return answers[0]

    async def metrics(self) -> list[list[Metric]]:
        """The metrics of every running replica that answers in time."""
        try:
            found = await self._everywhere("metrics", seconds=REPORT_TIMEOUT)
        except TimeoutError:
            found = []
        return [families for families in found if not isinstance(families, BaseException)]

    async def _everywhere(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        """The results of a method on all running replicas, errors included."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            response = self._replicas.broadcast(method, *arguments)
            results: list[Any] = await response.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError:  # none is running
            return []
        return results

    # -- state ---------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Tell the client what is loaded, once a replica is up, and then the load and the steps of all."""
        while True:
            try:
                reports = await self._everywhere("report", self._seen, seconds=REPORT_TIMEOUT)
            except TimeoutError:
                reports = []
            self._take_reports([report for report in reports if not isinstance(report, BaseException)])
            await asyncio.sleep(REPORT_SECONDS)

    def _take_reports(self, reports: list[Any]) -> None:
        if not reports:
            return
        states = {report.replica: report.state for report in reports}
        ended = (each for name, each in self._states.items() if name not in states)
        self._ended += [structs.replace(each, num_running=0, num_waiting=0) for each in ended]
        self._states, self._seen = states, {report.replica: report.last_step for report in reports}
        if self._info is None:
            self._info = reports[0].info
            self._send(structs.replace(self._info, state=self._state()))
        else:
            self._send(Stepped(self._state()))
            self._send_steps([step for report in reports for step in report.steps])

    def _send_steps(self, steps: list[StepReport]) -> None:
        """Tell the client what ran on all replicas, in the order of time."""
        now, state = time.monotonic(), self._state()
        for step in sorted(steps, key=lambda step: step.started + step.seconds):
            self._send(Stepped(state, structs.replace(step, started=now + step.started)))

    def _state(self) -> EngineState:
        """The load of all running replicas; counters include those of replicas that have ended."""
        living = list(self._states.values())
        return combined_state([*living, *self._ended], living)


def _lost(request: RoutedRequest) -> str:
    if request.has_output:
        return f"replica {request.tried[-1]}, which ran the request, was lost"
    return f"{len(request.tried)} replicas that were to run the request were lost"


def _reason(error: BaseException) -> str:
    """Why a call failed, in one line; Ray wraps the errors of replicas with their traces."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause) if isinstance(cause, UlyssesError) else kind_and_line(cause)
