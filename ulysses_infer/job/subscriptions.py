"""Who waits for the outputs of which request."""

from __future__ import annotations

from typing import NamedTuple

from ulysses_infer.engine.completion import Completion
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams


class _Subscription(NamedTuple):
    """Collects the outputs of a request."""

    outputs: list[RequestOutput]
    num_copies: int = 1
    """Equal outputs, of which one is computed."""
    only_finished: bool = False
    """Whether only the finished output is needed: making intermediate ones takes time proportional to their length."""


class Subscriptions:
    """Hands the outputs of requests to the lists in which they are awaited."""

    def __init__(self) -> None:
        self._by_request: dict[str, _Subscription] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def add(
        self, request_id: str, params: SamplingParams, outputs: list[RequestOutput], only_finished: bool = False
    ) -> None:
        """Append the outputs of a request with these parameters to `outputs`. only_finished: only the finished one."""
        self._by_request[request_id] = _Subscription(outputs, params.n // params.num_distinct, only_finished)

    def remove(self, request_id: str) -> bool:
        """Deliver no more of a request; returns whether it was subscribed to."""
        return self._by_request.pop(request_id, None) is not None

    def deliver(self, completion: Completion) -> None:
        """A request got a token, or ended."""
        found = self._by_request.get(completion.request_id)
        if found is not None and (completion.is_finished or not found.only_finished):
            found.outputs.append(completion.output().with_copies(found.num_copies))

    def output(self, completion: Completion) -> RequestOutput:
        """The output of a request as it would be delivered."""
        found = self._by_request.get(completion.request_id)
        return completion.output().with_copies(1 if found is None else found.num_copies)
