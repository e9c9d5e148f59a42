"""The response object of the Responses API, whole and as typed events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation
from ulysses_infer.server.http.openai.chat import Chat
from ulysses_infer.server.http.openai.logprobs import TokenNames, chat_logprob
from ulysses_infer.server.http.outputs import Delta, Output, Outputs
from ulysses_infer.server.http.protocol.responses import ResponsesRequest
from ulysses_infer.server.http.responses.items import Event, OutputItems
from ulysses_infer.server.http.sse import event
from ulysses_infer.server.tool_calls import ContentDelta

ECHOED = ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "user", "safety_identifier")
"""Fields of the request that the response repeats."""
TOOL = {"description": None, "parameters": None, "strict": None}
"""Fields of a tool that the response names even if the request did not."""


class ResponseWriter:
    """Writes one response. `response` is its state at any time."""

    def __init__(
        self,
        context: AppContext,
        body: ResponsesRequest,
        generation: Generation,
        chat: Chat,
        outputs: Outputs,
        is_stored: bool,
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        self._on_end = on_end
        self._body, self._chat, self._outputs, self._output = body, chat, outputs, outputs.all[0]
        self._reader = chat.form.reader(chat.prompt.text or "")
        self._names = TokenNames(context.texts, False)
        self._items = OutputItems()
        self._num_events = 0
        self.response = _new_response(body, generation, chat, generation.adapter or context.model_name, is_stored)

    def whole(self) -> dict[str, Any]:
        """The response, once it has ended."""
        self._take(self._output.flush())
        self._on_end(self.response)
        return self.response

    def events(self, touched: Sequence[Output]) -> bytes:
        """Events of what is new."""
        opening: list[Event] = []
        if self._num_events == 0:
            opening = [{"type": f"response.{name}", "response": dict(self.response)} for name in OPENING]
        return self._written([*opening, *self._take(self._output.flush())])

    def last_events(self) -> bytes:
        """The event with the whole response."""
        self._on_end(self.response)
        return self._written([{"type": f"response.{self.response['status']}", "response": self.response}])

    def failure(self, error: ApiError) -> bytes:
        """The events of a failed response."""
        self.fail(error)
        return self._written([{"type": "response.failed", "response": self.response}])

    def fail(self, error: ApiError) -> None:
        """The response has failed."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._end("failed")
        self.response["error"] = {"code": code, "message": error.message}

    def cancel(self) -> None:
        """The response was cancelled: it keeps what there is."""
        for _ in self._items.close("incomplete"):
            pass
        self._end("cancelled")

    def _take(self, delta: Delta) -> list[Event]:
        """Add what is new to the response; returns the events."""
        logprobs = self._logprobs(delta)
        events: list[Event] = []
        for read in self._reader.read(delta):
            taken = logprobs if isinstance(read, ContentDelta) else []
            events += self._items.add(read, taken)
            logprobs = [] if taken else logprobs
        if delta.finish_reason is not None:
            is_cut = delta.finish_reason == "length"
            events += self._items.close("incomplete" if is_cut else "completed")
            self._end({"length": "incomplete", "abort": "cancelled"}.get(delta.finish_reason, "completed"))
            if is_cut:
                self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["output"] = self._items.all
        return events

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        """Of the tokens that are new; those of reasoning are left out by the item they would belong to."""
        num_top = self._chat.params.logprobs
        if num_top is None:
            return []
        return [chat_logprob(self._names, token.logprobs, num_top) for token in delta.tokens if token.logprobs]

    def _end(self, status: str) -> None:
        self.response |= {"status": status, "completed_at": int(time.time()), "usage": self._usage()}
        self.response["output"] = self._items.all

    def _usage(self) -> dict[str, Any]:
        usage = self._outputs.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens or 0},
            "total_tokens": usage["total_tokens"],
        }

    def _written(self, events: Iterable[Event]) -> bytes:
        data = b""
        for each in events:
            data += event({**each, "sequence_number": self._num_events}, each["type"])
            self._num_events += 1
        return data


OPENING = ("created", "in_progress")


def _new_response(
    body: ResponsesRequest, generation: Generation, chat: Chat, model: str, is_stored: bool
) -> dict[str, Any]:
    text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": generation.id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "store": is_stored,
        "temperature": chat.params.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.tool_choice if body.tool_choice is not None else "auto",
        "tools": [{**TOOL, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": chat.params.top_p,
        "presence_penalty": chat.params.presence_penalty,
        "frequency_penalty": chat.params.frequency_penalty,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "metadata": body.metadata or {},
        "service_tier": "default",
        "prompt_cache_key": body.prompt_cache_key,
        **{name: getattr(body, name) for name in ECHOED},
    }
