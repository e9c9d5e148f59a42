"""Typed messages between the HTTP process and rank 0.

Requests travel as token ids, results as the newest token of each sequence: text is the HTTP process's business.
Moments are seconds on the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Submit(msgspec.Struct, tag=True, array_like=True):
    """Complete a prompt. The response is `Refused`, or tokens in `Stepped` until every sequence has ended."""

    request_id: str
    token_ids: list[int]
    params: dict[str, Any]
    """For `SamplingParams.from_mapping`."""
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    """Name of a LoRA adapter."""
    cache_key: str = ""
    """Requests of one key run on the same replica, if it is not empty."""


class Abort(msgspec.Struct, tag=True, array_like=True):
    """End a request in any state; unknown ones are ignored. Nothing more is sent for it."""

    request_id: str


class AdminCall(msgspec.Struct, tag=True, array_like=True):
    """An administrative command; the response is a `Reply` with the same number."""

    number: int
    name: str
    arguments: dict[str, Any]


class Goodbye(msgspec.Struct, tag=True, array_like=True):
    """The HTTP process has answered every request of the drained engine, which may exit."""


class NewToken(msgspec.Struct, array_like=True):
    """A sequence got a token, or ended."""

    request_id: str
    index: int
    """Which of the request's `n` sequences."""
    token_id: int
    """-1: the sequence ended without one (error, abort)."""
    finish_reason: str | None = None
    """None while it continues, then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence and other reasons."""
    logprobs: list[tuple[int, float, int]] | None = None
    """(token id, log-probability, rank), the chosen token first; None unless requested."""
    start: RequestStart | None = None
    """With the first token of a request."""
    weight_version: str | None = None
    """The version of the weights it was computed with; None if the trainer has named none."""


class RequestStart(msgspec.Struct, array_like=True):
    """What is known about a request once its prompt is computed."""

    num_cached_tokens: int
    scheduled_time: float
    prompt_logprobs: list[list[tuple[int, float, int]] | None] | None = None
    """One list per prompt token, the first one None; the prompt's own token comes first in each."""
    pooled: list[float] | None = None
    """The prompt's vector, if `pooling` was given."""


class SnapshotCounts(msgspec.Struct, array_like=True):
    """Snapshots of recurrent states, for prefix caching."""

    num_held: int
    num_slots: int
    num_hits: int
    """Requests that started from one."""
    num_bytes_each: int
    """On every rank."""


class OffloadCounts(msgspec.Struct, array_like=True):
    """The tier of host memory and disk below the cache. Counters run from the engine's start, bytes are per rank."""

    num_queries: int
    """Tokens looked up there, because the cache itself did not have them."""
    num_hits: int
    stored_bytes: int
    loaded_bytes: int
    host_usage: float
    """0 to 1, as the next."""
    disk_usage: float


class SpeculationCounts(msgspec.Struct, array_like=True):
    """Drafted tokens since the engine's start."""

    num_drafts: int
    """Requests with drafted tokens, summed over steps."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_per_position: list[int]
    """How often the first, second ... token of a draft was accepted."""


class EngineState(msgspec.Struct, array_like=True):
    """The engine's load, after a step or when it changes without one. Counters run from the engine's start."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """0 to 1."""
    prefix_cache_queries: int
    """Tokens."""
    prefix_cache_hits: int
    num_preemptions: int
    policy: dict[str, Any]
    """Name and settings, as from `Policy.describe`."""
    expert_tokens: list[int] = []
    """Tokens computed by the experts of each rank, updated every few seconds; empty without experts."""
    snapshots: SnapshotCounts | None = None
    """Of recurrent states; None if the model has none."""
    is_paused: bool = False
    """No steps run until an administrator resumes them."""
    speculation: SpeculationCounts | None = None
    """None without speculative decoding."""
    offload: OffloadCounts | None = None
    """None without a tier below the cache."""


class StepReport(msgspec.Struct, array_like=True):
    """One engine step."""

    sequence: int
    started: float
    seconds: float
    mode: tuple[int, int]
    """(sp, tp)"""
    num_tokens: int
    num_decodes: int
    collective_seconds: dict[str, float]
    """Seconds that rank 0 spent in each kind of collective, including waiting."""


class Stepped(msgspec.Struct, tag=True, array_like=True):
    """A step ran (or, with `step` None, the state changed without one)."""

    state: EngineState
    step: StepReport | None = None
    tokens: list[NewToken] = []


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The engine is ready: every rank has run a forward pass in every mode."""

    model: str
    """Path or hub id, as in the recipe."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    modes: list[tuple[int, int]]
    """Loaded modes, the base mode first."""
    num_blocks: int
    block_size: int
    weight_bytes_per_rank: list[int]
    state: EngineState
    sampling_defaults: dict[str, Any] = {}
    """Values of `SamplingParams` for requests that do not set them."""


class Refused(msgspec.Struct, tag=True, array_like=True):
    """A request that the engine did not accept."""

    request_id: str
    message: str
    kind: str = "invalid"
    """invalid: the request is wrong (400); overloaded: the queue is full (503); internal: a bug (500)."""


class Reply(msgspec.Struct, tag=True, array_like=True):
    """The response to an `AdminCall`: a value, or one line of error."""

    number: int
    value: Any = None
    error: str | None = None


class Draining(msgspec.Struct, tag=True, array_like=True):
    """No more requests are accepted; running ones have until `deadline`."""

    deadline: float


class Dead(msgspec.Struct, tag=True, array_like=True):
    """The engine has ended or is about to: running requests will not be completed."""

    reason: str
    expected: bool = False
    """Whether it was asked to end (second SIGTERM, admin route) rather than failed."""


class ReplicaLost(msgspec.Struct, tag=True, array_like=True):
    """A replica of several has ended; the others go on."""

    index: int
    reason: str


ToEngine = Submit | Abort | AdminCall | Goodbye
FromEngine = Ready | Stepped | Refused | Reply | Draining | Dead
FromCoordinator = ReplicaLost | Dead
