"""The layouts of a model on a number of devices: which are legal, which fit, and what they leave for the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ulysses_infer.cache.budget import GIB, activation_bytes, assumed_memory
from ulysses_infer.config import CacheConfig, Config
from ulysses_infer.model.experts.kinds import ExpertSizes
from ulysses_infer.model.experts.placement import REPLICATE, choose_placement
from ulysses_infer.parallel.layout import Layout, Mode, divisors
from ulysses_infer.planning.node import Node
from ulysses_infer.planning.operations import cache_bytes_per_token, index_bytes_per_token
from ulysses_infer.planning.sizes import ModelSizes


@dataclass(frozen=True)
class PlannedLayout:
    """One way to use the devices, with its memory per rank in bytes."""

    dp: int
    base: Mode
    placement: str
    """Of experts: replicate, expert or width."""
    weights: float
    activations: float
    available: float
    token_bytes: float
    """Per cached token on one rank."""
    request_bytes: float
    """Recurrent state of one request on one rank."""
    copies: float = 0.0
    """For the tier below the cache: a buffer or, on a CPU, its host memory."""
    tier: float = 0.0
    """Host memory and disk space of the tier below the cache."""
    reason: str | None = None
    """Why it cannot be used; None if it can."""

    @property
    def layout(self) -> Layout:
        """The arithmetic of its ranks."""
        return Layout(self.base)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The base mode and full tensor parallelism."""
        return tuple(dict.fromkeys((self.base, self.layout.shift)))

    @property
    def cache_bytes(self) -> float:
        """What is left for the cache."""
        return self.available - self.weights - self.activations - self.copies

    def num_sequences(self, max_num_seqs: int) -> int:
        """How many sequences run at once: their states take at most half of the cache (`StateSizing`)."""
        if not self.request_bytes:
            return max_num_seqs
        return max(1, min(max_num_seqs, int(self.cache_bytes / 2 / self.request_bytes)))

    def cache_tokens(self, max_num_seqs: int) -> int:
        """Tokens that the cache of one replica holds beside the states of so many sequences."""
        states = self.num_sequences(max_num_seqs) * self.request_bytes
        return int((self.cache_bytes - states) / max(self.token_bytes, 1.0))

    @property
    def tier_tokens(self) -> int:
        """Tokens that the tier below the cache of one replica holds."""
        return int(self.tier / max(self.token_bytes, 1.0))

    def __str__(self) -> str:
        return f"dp{self.dp} {self.base}" if self.dp > 1 else str(self.base)


def all_layouts(sizes: ModelSizes, node: Node, config: Config, num_nodes: int = 1) -> list[PlannedLayout]:
    """Every layout of all devices, the unusable ones with their reason. A replica does not span nodes."""
    return [
        _planned(sizes, node, config, num_nodes * node.num_devices // world, Mode(world // tp, tp))
        for world in reversed(divisors(node.num_devices))
        for tp in divisors(world)
    ]


def _planned(sizes: ModelSizes, node: Node, config: Config, dp: int, base: Mode) -> PlannedLayout:
    available = assumed_memory(int(node.memory_bytes), config.cache.memory_utilization)
    placement = _placement(sizes, config, base, available)
    item = 1.0 if config.cache.dtype.startswith("fp8") else 2.0
    per_layer = cache_bytes_per_token(sizes, base.world_size, item) + index_bytes_per_token(sizes)
    states = sizes.recurrent.state_bytes() / base.world_size * sizes.num_recurrent_layers
    layout = PlannedLayout(
        dp=dp,
        base=base,
        placement=placement,
        weights=weights_of(sizes, base, placement),
        activations=_activations(sizes, config, base),
        available=available,
        token_bytes=per_layer * sizes.num_caching_layers,
        request_bytes=states,
        copies=_copies(node, config.cache),
        tier=config.cache.offload_host_bytes + config.cache.offload_disk_bytes,
    )
    return _with_reason(layout, sizes, config)


def _copies(node: Node, cache: CacheConfig) -> float:
    if not cache.offload_host_bytes or node.host_link is None:
        return 0.0
    return node.host_link.staging_bytes or cache.offload_host_bytes


def _placement(sizes: ModelSizes, config: Config, base: Mode, available: int) -> str:
    """As the loader chooses it."""
    if not sizes.num_experts:
        return REPLICATE
    experts = sizes.expert_weights * sizes.weight_bytes
    others = sizes.layer_weights * sizes.weight_bytes + 2 * sizes.embedding_weights
    stored = ExpertSizes(int(experts), int(others), sizes.num_experts)
    return choose_placement(config.parallel.expert_placement, Layout(base), stored, available)


def weights_of(sizes: ModelSizes, base: Mode, placement: str) -> float:
    """Bytes of weights on one rank: layers over tp, experts by their placement, the head over all ranks."""
    layers = sizes.layer_weights / base.tp
    if sizes.num_key_value_heads < base.tp:  # KV heads that ranks share are stored on each
        extra = sizes.key_value_heads(base.tp) - sizes.num_key_value_heads / base.tp
        width = sizes.key_width + sizes.value_width
        layers += extra * width * sizes.hidden_size * sizes.num_caching_layers
    experts = sizes.expert_weights / (base.tp if placement == REPLICATE else base.world_size)
    embedding = sizes.vocab_size * sizes.hidden_size * 2
    head = 0 if sizes.has_tied_head else embedding / base.world_size
    routers = sizes.num_experts * sizes.hidden_size * sizes.num_expert_layers * 2
    return (layers + experts) * sizes.weight_bytes + embedding + head + routers


def _activations(sizes: ModelSizes, config: Config, base: Mode) -> float:
    tokens = config.scheduler.max_num_batched_tokens or 8192
    width = max(sizes.intermediate_size, sizes.shared_width + sizes.experts_per_token * sizes.expert_width)
    share = sizes.vocab_size // base.world_size
    return activation_bytes(tokens, sizes.hidden_size, width, share, config.scheduler.max_num_seqs, 2)


def _with_reason(layout: PlannedLayout, sizes: ModelSizes, config: Config) -> PlannedLayout:
    reason: str | None = None
    longest = min(config.model.max_model_len or sizes.max_model_len, sizes.max_model_len)
    if layout.cache_bytes <= 0:
        missing = -layout.cache_bytes / GIB
        taken = (layout.weights + layout.activations + layout.copies) / GIB
        and_tier = ", activations and the tier below the cache" if layout.copies else " and activations"
        reason = f"weights{and_tier} take {taken:.1f} of {layout.available / GIB:.1f} GiB: {missing:.2f} too much"
    if reason is None and layout.cache_tokens(1) < longest:
        reason = f"the cache would hold {layout.cache_tokens(1):,} tokens, less than one request of {longest:,}"
    return replace(layout, reason=reason)
