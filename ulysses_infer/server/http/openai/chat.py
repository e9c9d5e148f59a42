"""/v1/chat/completions: messages to a prompt, outputs to chat choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.conversation import Conversation, conversation_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Prompt, truncated
from ulysses_infer.server.http.openai.choices import ChoiceKind, ChoiceWriter, prepared_choices
from ulysses_infer.server.http.openai.logprobs import TokenNames, chat_logprob, prompt_logprobs
from ulysses_infer.server.http.output_format import OutputFormat, output_format
from ulysses_infer.server.http.output_reader import OutputEvent
from ulysses_infer.server.http.outputs import Delta, Output, Outputs
from ulysses_infer.server.http.protocol.chat import ChatFields, ChatRequest
from ulysses_infer.server.http.protocol.tokens import TokenizeRequest
from ulysses_infer.server.http.respond import PreparedRequest, check_streaming, generation_of
from ulysses_infer.server.http.sampling import sampling_params, structured_outputs
from ulysses_infer.server.http.tool_use import with_allowed_tools
from ulysses_infer.server.reasoning import ReasoningDelta
from ulysses_infer.server.tool_calls import ArgumentsDelta, CallStarted, ContentDelta

CALL_KEYS = ("id", "type", "function")


class ChatChoiceBuilder:
    """Builds one output: a whole message, or the next chunks of it."""

    def __init__(self, context: AppContext, body: ChatRequest, output: Output, form: OutputFormat) -> None:
        self._body, self._output, self._use = body, output, form.use
        self._names = TokenNames(context.texts, bool(body.return_tokens_as_token_ids))
        self._reader = form.reader(output.source.prompt.text or "")
        self._is_first = True

    @property
    def num_reasoning_tokens(self) -> int | None:
        """How many tokens of the output were reasoning; None if it is not parsed for it."""
        return self._reader.num_reasoning_tokens

    def whole(self) -> dict[str, Any]:
        """The choice of a whole response."""
        delta = self._output.flush()
        fields = self._new_fields(delta)
        content = fields.get("content", None if self._reader.has_calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if "reasoning_content" in fields:
            message["reasoning_content"] = fields["reasoning_content"]
        if "tool_calls" in fields:
            message["tool_calls"] = [{key: call[key] for key in CALL_KEYS} for call in fields["tool_calls"]]
        return self._choice("message", message, delta)

    def chunks(self) -> list[dict[str, Any]]:
        """The next chunks with what is new since the last call; the first one has the role."""
        delta = self._output.flush()
        fields = self._new_fields(delta)
        chunks = []
        if self._is_first:
            self._is_first = False
            chunks.append(self._opening())
        has_tokens = bool(self._body.logprobs or self._body.return_token_ids) and bool(delta.tokens)
        if fields or delta.finish_reason or has_tokens:
            chunks.append(self._choice("delta", fields, delta))
        return chunks

    def _new_fields(self, delta: Delta) -> dict[str, Any]:
        fields = chat_fields(self._reader.read(delta))
        if self._body.include_reasoning is False:
            fields.pop("reasoning_content", None)
        return fields

    def _opening(self) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self._output.index,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._output.source.prompt.token_ids
        return choice

    def _choice(self, name: str, value: dict[str, Any], delta: Delta) -> dict[str, Any]:
        choice = {
            "index": self._output.index,
            name: value,
            "logprobs": self._logprobs(delta),
            "finish_reason": self._finish_reason(delta),
        }
        if name == "message" or delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._output.weight_versions and delta.finish_reason is not None:
            choice["weight_versions"] = self._output.weight_versions
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _finish_reason(self, delta: Delta) -> str | None:
        """As in OpenAI's API: "tool_calls" if the model chose to call, "stop" if the request named the function."""
        has_calls = self._reader.has_calls and not self._use.is_named
        return "tool_calls" if delta.finish_reason == "stop" and has_calls else delta.finish_reason

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        num_top = self._body.top_logprobs or 0
        scored = [chat_logprob(self._names, token.logprobs, num_top) for token in delta.tokens if token.logprobs]
        return {"content": scored, "refusal": None}


def chat_fields(events: Sequence[OutputEvent]) -> dict[str, Any]:
    """Events as fields of a chunk's delta: `reasoning_content`, `content` and `tool_calls`, where not empty."""
    fields: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case ReasoningDelta(text):
                fields["reasoning_content"] = fields.get("reasoning_content", "") + text
            case ContentDelta(text):
                fields["content"] = fields.get("content", "") + text
            case CallStarted(index, identifier, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": identifier, "type": "function", "function": function}
            case ArgumentsDelta(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    return {**fields, "tool_calls": list(calls.values())} if calls else fields


async def prepare_chat(context: AppContext, body: ChatRequest) -> PreparedRequest[ChoiceWriter]:
    """Check a request, render its prompt. Raises `ApiError`, `RequestError`, `OverloadedError`, `EngineDeadError`."""
    chat = await read_chat(context, body)
    body = chat.body
    generation = generation_of(context, "chatcmpl-", body, [chat.prompt], chat.params)
    kind = ChoiceKind(
        "chat.completion",
        "chat.completion.chunk",
        lambda output: ChatChoiceBuilder(context, body, output, chat.form),
        lambda outputs: _prompt_fields(context, body, outputs),
    )
    return prepared_choices(context, body, generation, kind)


@dataclass(frozen=True)
class Chat:
    """A checked conversation: what the engine gets, and how its outputs are read."""

    body: ChatRequest
    prompt: Prompt
    params: SamplingParams
    form: OutputFormat


async def read_chat(context: AppContext, body: ChatRequest) -> Chat:
    """Check a conversation and render it. Raises what `prepare_chat` raises."""
    context.choose_model(body.model)
    check_streaming(body)
    body = with_allowed_tools(body)
    form, params = _parameters(context, body)
    max_model_len = context.engine_info().max_model_len
    text = await context.texts.render(conversation_with_template(context, body, _variables(body)))
    constraint = form.constraint(text)
    if constraint is not params.structured_outputs:
        params = replace(params, structured_outputs=constraint)
    token_ids = await context.texts.encode(text, bool(body.add_special_tokens))
    kept = truncated(token_ids, body.truncate_prompt_tokens, max_model_len, params.max_tokens)
    return Chat(body, Prompt(kept, text), params, form)


def _variables(body: ChatRequest) -> dict[str, Any]:
    """Variables of the chat template for `reasoning_effort`; "none" is what templates call thinking switched off."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    off = {name: False for name in ("enable_thinking", "thinking") if name not in (body.chat_template_kwargs or {})}
    return {"reasoning_effort": effort, **(off if effort == "none" else {})}


def conversation_with_template(
    context: AppContext, body: ChatFields | TokenizeRequest, variables: Mapping[str, Any] | None = None
) -> Conversation:
    """The conversation of a request, with the request's own chat template if that is allowed.

    Raises `ApiError`, `RequestError`.
    """
    reasoning = context.reasoning_format
    conversation = conversation_of(body, variables, None if reasoning is None else reasoning.history_key)
    if body.chat_template is None:
        return conversation
    if not context.config.server.trust_request_chat_template:
        message = "chat_template is not allowed in requests; set server.trust_request_chat_template=true to allow it"
        raise ApiError(400, message, param="chat_template")
    return replace(conversation, variables={**conversation.variables, "chat_template": body.chat_template})


def _prompt_fields(context: AppContext, body: ChatRequest, outputs: Outputs) -> dict[str, Any]:
    """The prompt's token ids and log-probabilities, if the request asks for them."""
    source = outputs.sources[0]
    fields: dict[str, Any] = {}
    if body.return_token_ids:
        fields["prompt_token_ids"] = source.prompt.token_ids
    if body.prompt_logprobs is not None:
        scored = source.start.prompt_logprobs if source.start is not None else None
        fields["prompt_logprobs"] = None if scored is None else prompt_logprobs(context.texts, scored)
    return fields


def _parameters(context: AppContext, body: ChatRequest) -> tuple[OutputFormat, SamplingParams]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true; set it", param="top_logprobs")
    form = output_format(context, body, structured_outputs(body))
    changes: dict[str, Any] = {
        "max_tokens": _max_tokens(body),
        "structured_outputs": form.use.constraint,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    if form.special is not None:
        changes["skip_special_tokens"] = False
    return form, sampling_params(body, context.sampling_defaults, **changes)


def _max_tokens(body: ChatRequest) -> int | None:
    """The maximum from the old or the new field; None: as many as fit."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens {new}; they mean the same, so give one"
        raise ApiError(400, message, param="max_completion_tokens")
    if (new if new is not None else old) == 0:
        raise ApiError(400, "max_tokens is 0; ask for at least 1", param="max_tokens")
    return new if new is not None else old
