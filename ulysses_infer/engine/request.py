"""One sequence inside the scheduler: its tokens, its progress in the KV cache, how it ended."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ulysses_infer.cache.pools import GroupBlockIds
from ulysses_infer.cache.prefix import extend_block_hashes
from ulysses_infer.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """The state of a request. A preempted request is WAITING again and keeps its output tokens."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt being completed. Compared by identity; times are in seconds of the scheduler's clock.

    The tokens at positions `[0, num_tokens)` are *known*: the prompt, then the output. The first `num_computed_tokens`
    of them have keys and values in the blocks of `block_tables`, except blocks freed because no later token sees them.
    """

    request_id: str
    index: int
    """A small handle for step plans and sampled tokens; unique during the engine's life."""
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    priority: int = 0
    """Lower runs earlier (as in vLLM); read only under the priority policy."""
    eos_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    """Requests share cached prefix blocks only with requests of the same salt (as in vLLM)."""
    adapter: int = 0
    """Number of its LoRA adapter; 0: none."""

    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    """None while unfinished, then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the request; None for end-of-sequence and other endings."""

    num_computed_tokens: int = 0
    """Tokens in the cache after all scheduled steps have run."""
    num_placeholders: int = 0
    """Tokens that scheduled steps will add to the output."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request first ran."""
    block_tables: GroupBlockIds = field(default_factory=list)
    """One per cache group; empty while the request does not run."""
    num_blocks: int = 0
    """Blocks of its text so far: the end of every table."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks of known tokens; extended, never recomputed."""
    shared_prefix: int = 0
    """Leading tokens whose blocks are cached, but not the recurrent states after them."""
    reserved_snapshots: list[tuple[int, int]] = field(default_factory=list)
    """(number of tokens, slot) of each snapshot of its states that scheduled steps take."""
    checkpoint: int | None = None
    """The slot of its states after `num_computed_tokens` tokens, while drafted tokens behind them are verified, and
    after some were rejected until the request has gone back to it."""
    num_published_blocks: int = 0
    """Leading blocks already published in the prefix cache."""
    precedence: tuple[int, int] = (0, 0)
    """(priority, or 0 under fcfs; arrival time): lower runs first and is preempted last. Set when the request is added.
    """
    length_limit: int = sys.maxsize
    """`num_tokens` at which the request ends with "length". Set when the request is added."""
    num_preemptions: int = 0

    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finish_time: float | None = None

    num_prompt_tokens: int = field(init=False)
    """Number of prompt tokens; kept, because every step reads it for every request."""

    def __post_init__(self) -> None:
        self._stop_token_ids = frozenset(self.params.stop_token_ids or ())
        self._endings = self.eos_token_ids | self._stop_token_ids
        self.num_prompt_tokens = len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens sampled so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Number of known tokens: prompt and output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_tokens_left(self) -> int:
        """Tokens that no step has been scheduled for, including placeholder tokens."""
        known = self.num_prompt_tokens + len(self.output_token_ids)  # `num_tokens`, for every request of every step
        return known + self.num_placeholders - self.num_computed_tokens

    @property
    def is_last_token_pending(self) -> bool:
        """Whether a token that is still in flight will end the request, whatever it is."""
        return self.num_placeholders > 0 and self.num_tokens + self.num_placeholders >= self.length_limit

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    @property
    def max_tokens_left(self) -> int:
        """Output tokens this request may still produce before it ends with "length"."""
        return self.length_limit - self.num_tokens

    def token_ids_from(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions `[start, stop)`."""
        prompt = self.num_prompt_tokens
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        output = self.output_token_ids[max(0, start - prompt) : stop - prompt]
        return self.prompt_token_ids[start:] + output if start < prompt else output

    def hashes_of_blocks(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of at least the first `num_blocks` blocks of known tokens; only new ones are computed."""
        hashes = self.block_hashes
        if len(hashes) < num_blocks:
            token_ids = self.token_ids_from(len(hashes) * block_size, num_blocks * block_size)
            extend_block_hashes(hashes, token_ids, block_size, self.cache_salt)
        return hashes

    def append_token(self, token_id: int, now: float) -> tuple[str, int | None] | None:
        """Append a sampled token that was in flight, at time `now` (seconds); returns its `ending`, or None."""
        output = self.output_token_ids
        output.append(token_id)
        self.num_placeholders -= 1
        self.last_token_time = now
        if self.first_token_time is None:
            self.first_token_time = now
        may_end = token_id in self._endings or self.num_prompt_tokens + len(output) >= self.length_limit
        return self.ending() if may_end else None

    def append_drafts(self, token_ids: Sequence[int], now: float) -> tuple[str, int | None] | None:
        """Append accepted drafted tokens, up to one that ends the request; returns its `ending`, or None."""
        for token_id in token_ids:
            self.output_token_ids.append(token_id)
            self.last_token_time = now
            ending = self.ending()
            if ending is not None:
                return ending
        return None

    def ending(self) -> tuple[str, int | None] | None:
        """`(finish_reason, stop_reason)` if the newest output token ends the request, else None.

        `min_tokens` holds back end-of-sequence and stop tokens, never the length limit.
        """
        output = self.output_token_ids
        token_id = output[-1]
        if len(output) >= self.params.min_tokens:
            if token_id in self.eos_token_ids and not self.params.ignore_eos:
                return "stop", None
            if token_id in self._stop_token_ids:
                return "stop", token_id
        return ("length", None) if self.num_prompt_tokens + len(output) >= self.length_limit else None

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """The tokens that end the request, from `min_tokens` on."""
        return self._stop_token_ids if self.params.ignore_eos else self._endings

    def restart(self) -> None:
        """Preempt: drop everything computed, to be computed again later. The output tokens stay."""
        self.status = RequestStatus.WAITING
        self.block_tables, self.num_blocks = [], 0
        self.num_computed_tokens = 0
        self.num_published_blocks = 0
        self.num_preemptions += 1

    def end(self, finish_reason: str, stop_reason: int | str | None, now: float) -> None:
        """Mark the request finished at time `now` (seconds) and drop its block tables."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.finish_time = now
        self.block_tables, self.num_blocks = [], 0
