"""Requests before they run: whether one could ever finish, the queue in which they wait, and their first step."""

from __future__ import annotations

import bisect

from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.request import Request
from ulysses_infer.errors import RequestError


class WaitingQueue:
    """Waiting requests sorted by precedence, the first at the end of the list, where removing it is O(1)."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> Request:
        """The request that is admitted next."""
        return self._requests[-1]

    def push(self, request: Request) -> None:
        """Add a request."""
        bisect.insort(self._requests, request, key=lambda r: (-r.precedence[0], -r.precedence[1]))

    def pop(self) -> Request:
        """Take the first request."""
        return self._requests.pop()

    def remove(self, request: Request) -> None:
        """Remove a request, wherever it is."""
        self._requests.remove(request)


def length_limit(request: Request, max_model_len: int) -> int:
    """Tokens of prompt and output at which a request ends."""
    max_tokens = request.params.max_tokens
    return max_model_len if max_tokens is None else min(request.num_prompt_tokens + max_tokens, max_model_len)


def first_chunk(num_tokens: int, budget: int, config: SchedulerConfig) -> int:
    """How many of a request's `num_tokens` uncomputed tokens its first step takes; 0: it has to wait.

    Without chunked prefill it is all or nothing, except for a preempted request whose output has made it longer than
    any step.
    """
    if num_tokens <= budget:
        return num_tokens
    chunked = config.enable_chunked_prefill or num_tokens > config.max_num_batched_tokens
    return budget if chunked else 0


def check_request(request: Request, config: SchedulerConfig, allocator: BlockPools, max_model_len: int) -> None:
    """Raise `RequestError` if a request could never finish."""
    num_tokens = request.num_prompt_tokens
    if num_tokens == 0:
        raise RequestError("the prompt has no tokens; give at least one")
    if num_tokens >= max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens, but prompt and output together have at most "
            f"{max_model_len}; shorten it to {max_model_len - 1} or raise model.max_model_len"
        )
    if not config.enable_chunked_prefill and num_tokens > config.max_num_batched_tokens:
        raise RequestError(
            f"the prompt has {num_tokens} tokens, but a step takes {config.max_num_batched_tokens}; "
            f"raise scheduler.max_num_batched_tokens or set scheduler.enable_chunked_prefill"
        )
    # The last token is sampled but never computed, so it needs no slot.
    num_cached = length_limit(request, max_model_len) - 1
    num_blocks = allocator.most_blocks(num_cached, config.max_num_batched_tokens)
    if num_blocks > allocator.num_blocks:
        room = allocator.num_blocks * allocator.block_size
        raise RequestError(
            f"the request may need {num_cached} tokens of cache ({num_blocks} blocks), but the cache has "
            f"{room} ({allocator.num_blocks} blocks); lower max_tokens, shorten the prompt or "
            f"enlarge the cache (cache.memory_bytes)"
        )
