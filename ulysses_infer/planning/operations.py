"""The operations of one step in one mode, with their predicted times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning import roofline
from ulysses_infer.planning.node import Node
from ulysses_infer.planning.sizes import ModelSizes
from ulysses_infer.step_time.step_shape import StepShape

ITEM = 2  # bytes of an activation
KERNELS_PER_LAYER = 12  # of a captured step: the budget of docs/kernels.md
EAGER_KERNELS_PER_LAYER = 24  # without one kernel for all parts, as prompts run


class Operation(NamedTuple):
    """A kind of operation: seconds of one, and how often a step runs it."""

    name: str
    seconds: float
    times: int
    kind: str
    """product, attention, experts, elementwise or collective."""

    @property
    def total(self) -> float:
        """Seconds per step."""
        return self.seconds * self.times


@dataclass(frozen=True)
class Changes:
    """Hypothetical improvements of the engine, whose gain can be told before they are built."""

    fused_all_reduce: bool = True
    """Residual addition and norm in the kernel of the all-reduce (as the engine does on GPUs)."""
    fp8_exchange: bool = False
    """The all-to-all sends FP8 instead of bf16."""
    attention_by_request: bool = False
    """At saturation, ranks attend to whole requests instead of heads, so no KV head is read by more than one."""


class StepOperations:
    """Lists the operations of steps of one model on one node. Sizes follow docs/life-of-a-request.md."""

    def __init__(self, sizes: ModelSizes, node: Node, placement: str, changes: Changes, num_nodes: int = 1) -> None:
        """placement: of experts, replicate, expert or width. changes: hypothetical improvements."""
        self.sizes, self.node, self.placement, self.changes = sizes, node, placement, changes
        self._num_nodes = num_nodes
        self._input_bytes = 2.0 if sizes.dtype in ("bf16", "int4") else 1.0
        self._seconds: dict[tuple[Mode, int, int], float] = {}

    def of(self, mode: Mode, shape: StepShape) -> list[Operation]:
        """The operations of a step on the rank with the most tokens."""
        found = self._of_tokens(mode, shape.num_tokens, shape.num_sequences) + self._of_contexts(mode, shape)
        return [operation for operation in found if operation.times and operation.seconds > 0]

    def seconds(self, mode: Mode, shape: StepShape) -> float:
        """The sum over all operations of a step."""
        key = mode, shape.num_tokens, shape.num_sequences  # many steps differ only in their contexts
        if key not in self._seconds:
            self._seconds[key] = sum(operation.total for operation in self._of_tokens(*key))
        return self._seconds[key] + sum(operation.total for operation in self._of_contexts(mode, shape))

    def _of_tokens(self, mode: Mode, tokens: int, sequences: int) -> list[Operation]:
        """The operations that depend only on the number of tokens and sequences."""
        local, later = ceil_div(tokens, mode.sp), self.sizes.num_later_layers
        found = self._attention_layers(mode, local) + self._recurrent_layers(mode, local)
        found += self._dense_layers(mode, local) + self._expert_layers(mode, tokens, local)
        found += self._elementwise("", mode, local, self.sizes.num_layers - later)
        return found + self._later_layers(mode, local, sequences) + self._head(mode, sequences)

    def _of_contexts(self, mode: Mode, shape: StepShape) -> list[Operation]:
        """The operations that depend on what the tokens attend to."""
        found = self._attention(mode, shape) + self._recurrence(mode, shape)
        if later := self.sizes.num_later_layers:
            seconds = self._attention_seconds(mode, shape.narrowed)
            found.append(Operation("attention of later layers", seconds, later, "attention"))
        return found

    # -- products ----------------------------------------------------------------------------------------------

    def _product(self, name: str, rows: int, outputs: float, inputs: float, count: int) -> Operation:
        sizes, rate = self.sizes, self.node.products[self.sizes.dtype]
        seconds = roofline.product_seconds(rate, rows, outputs, inputs, sizes.weight_bytes, self._input_bytes)
        return Operation(name, seconds, count, "product")

    def _attention_layers(self, mode: Mode, local: int) -> list[Operation]:
        sizes, count = self.sizes, self.sizes.num_attention_layers - self.sizes.num_later_layers
        if not count:
            return []
        heads, held = sizes.num_attention_heads / mode.tp, sizes.key_value_heads(mode.tp)
        width = heads * sizes.key_width + held * (sizes.key_width + sizes.value_width)
        own = sizes.key_value_heads(mode.world_size) * mode.sp
        sent = heads * sizes.key_width + own * (sizes.key_width + sizes.value_width)
        if sizes.latent_width:
            sent = heads * sizes.latent_width + sizes.latent_width * mode.sp
        return [
            self._product("query, key and value projections", local, width, sizes.hidden_size, count),
            self._exchange("all-to-all to heads", mode, local * sent, count),
            self._exchange("all-to-all to tokens", mode, local * heads * sizes.value_width, count),
            self._product("output projection", local, sizes.hidden_size, heads * sizes.value_width, count),
            self._sum("all-reduce after attention", mode, local, count),
        ]

    def _later_layers(self, mode: Mode, local: int, sequences: int) -> list[Operation]:
        """Layers that cache keys and values of all tokens, and compute the tokens whose logits are needed alone."""
        sizes, count = self.sizes, self.sizes.num_later_layers
        if not count:
            return []
        rows, making = ceil_div(sequences, mode.sp), count - sizes.num_reading_layers
        heads, both = sizes.num_attention_heads / mode.tp, sizes.key_width + sizes.value_width
        sent = local * sizes.key_value_heads(mode.world_size) * mode.sp * both
        return [
            self._product(
                "later key and value projections",
                local,
                sizes.key_value_heads(mode.tp) * both,
                sizes.hidden_size,
                making,
            ),
            self._exchange("all-to-all of later keys and values", mode, sent, making),
            self._gather("all-gather of tokens that go on", mode, sequences),
            self._product("later query projection", rows, heads * sizes.key_width, sizes.hidden_size, count),
            self._exchange("all-to-all to later heads", mode, rows * heads * sizes.key_width, count),
            self._exchange("all-to-all from later heads", mode, rows * heads * sizes.value_width, count),
            self._product("later output projection", rows, sizes.hidden_size, heads * sizes.value_width, count),
            self._sum("all-reduce after later attention", mode, rows, count),
            *self._feed_forward("later ", mode, rows, sizes.intermediate_size, count),
            *self._elementwise("later ", mode, rows, count),
        ]

    def _attention(self, mode: Mode, shape: StepShape) -> list[Operation]:
        """All tokens, own heads. Layers with a window read at most its tokens."""
        found = []
        windows = self.sizes.num_window_layers
        for name, count, window in (
            ("attention", self.sizes.num_attention_layers - self.sizes.num_later_layers - windows, 0),
            ("windowed attention", windows, self.sizes.window),
        ):
            if count:
                seconds = self._attention_seconds(mode, _within(_within(shape, window), self.sizes.selected))
                found.append(Operation(name, seconds, count, "attention"))
        return [*found, self._index(shape)] if self.sizes.selected else found

    def _index(self, shape: StepShape) -> Operation:
        """The scores by which tokens choose what they attend to: every rank computes those of all heads."""
        sizes, node, seconds = self.sizes, self.node, 0.0
        if shape.num_prefills:
            pairs = (shape.fresh_pairs + shape.past_pairs) / 2  # products with keys only, no sums of values
            seconds += roofline.prefill_attention_seconds(
                node.prefill_attention, sizes.index_heads, sizes.index_width, pairs
            )
        if shape.num_decodes:
            seconds += roofline.decode_attention_seconds(
                node.decode_attention, index_bytes_per_token(sizes) * shape.decode_context
            )
        return Operation("index of sparse attention", float(seconds), sizes.num_attention_layers, "attention")

    def _attention_seconds(self, mode: Mode, shape: StepShape) -> float:
        sizes, node = self.sizes, self.node
        seconds = 0.0
        heads, width = sizes.attention_heads(mode.world_size), (sizes.key_width + sizes.value_width) / 2
        if sizes.latent_width:
            width = float(sizes.latent_width)
        if shape.num_prefills:
            pairs = shape.fresh_pairs + shape.past_pairs
            seconds += roofline.prefill_attention_seconds(node.prefill_attention, heads, width, pairs)
        if shape.num_decodes:
            cached = cache_bytes_per_token(sizes, mode.world_size) * shape.decode_context
            if self.changes.attention_by_request:
                cached *= sizes.key_value_heads(1) / (sizes.key_value_heads(mode.world_size) * mode.world_size)
            seconds += roofline.decode_attention_seconds(node.decode_attention, cached)
        return float(seconds)

    def _recurrent_layers(self, mode: Mode, local: int) -> list[Operation]:
        sizes, count = self.sizes, self.sizes.num_recurrent_layers
        if not count:
            return []
        inputs, outputs = sizes.recurrent.inputs / mode.tp, sizes.recurrent.outputs / mode.tp
        return [
            self._product("recurrent input projections", local, inputs, sizes.hidden_size, count),
            self._exchange("all-to-all to recurrent heads", mode, local * inputs, count),
            self._exchange("all-to-all from recurrent heads", mode, local * outputs, count),
            self._product("recurrent output projection", local, sizes.hidden_size, outputs, count),
            self._sum("all-reduce after the recurrence", mode, local, count),
        ]

    def _recurrence(self, mode: Mode, shape: StepShape) -> list[Operation]:
        sizes, count = self.sizes, self.sizes.num_recurrent_layers
        found = []
        if count and shape.num_decodes:
            moved = 2 * sizes.recurrent.state_bytes() / mode.world_size  # read and written
            seconds = self.node.decode_recurrent.seconds(0.0, moved * shape.num_decodes)
            found.append(Operation("recurrence of decodes", seconds, count, "attention"))
        if count and shape.num_prefills:
            states = sizes.recurrent.state / mode.world_size
            seconds = self.node.prefill_recurrent.seconds(6 * states * shape.num_prefill_tokens, 0.0)
            found.append(Operation("recurrence of prompts", seconds, count, "attention"))
        return found

    def _dense_layers(self, mode: Mode, local: int) -> list[Operation]:
        count = self.sizes.num_dense_layers - self.sizes.num_later_layers
        return self._feed_forward("", mode, local, self.sizes.intermediate_size, count)

    def _feed_forward(self, prefix: str, mode: Mode, local: int, width: int, count: int) -> list[Operation]:
        if not count or not width:
            return []
        sizes = self.sizes
        return [
            self._product(f"{prefix}gate and up projections", local, 2 * width / mode.tp, sizes.hidden_size, count),
            self._product(f"{prefix}down projection", local, sizes.hidden_size, width / mode.tp, count),
            self._sum(f"all-reduce after {prefix or 'feed-forward '}blocks", mode, local, count),
        ]

    def _expert_layers(self, mode: Mode, tokens: int, local: int) -> list[Operation]:
        sizes, count = self.sizes, self.sizes.num_expert_layers
        if not count:
            return []
        router = self._product("router", local, sizes.num_experts, sizes.hidden_size, count)
        shared = self._feed_forward("shared expert ", mode, local, sizes.shared_width, count)
        if self.placement == "replicate":
            parts = [self._experts(local, sizes.num_experts, sizes.expert_width / mode.tp, count)]
            parts += [] if shared else [self._sum("all-reduce after experts", mode, local, count)]
        else:
            parts = self._placed_experts(mode, tokens, local, count)
        return [router, *parts, *shared]

    def _placed_experts(self, mode: Mode, tokens: int, local: int, count: int) -> list[Operation]:
        """Experts or their widths divided over all ranks, the same in every mode."""
        sizes, world = self.sizes, mode.world_size
        if self.placement == "width":
            experts = self._experts(tokens, sizes.num_experts, sizes.expert_width / world, count)
        else:
            experts = self._experts(tokens, sizes.num_experts, sizes.expert_width, count, world)
        moved = tokens * sizes.hidden_size / mode.sp
        gather = self._link_operation("all-gather for experts", self.node.all_gather, mode.sp, moved * mode.sp, count)
        back = self._sum("sum over the ranks' experts", Mode(1, world), tokens // mode.sp or 1, count)
        return [gather, experts, back]

    def _experts(self, tokens: int, num_experts: int, width: float, count: int, world: int = 1) -> Operation:
        """world: ranks that own different experts; the rank with the most rows counts."""
        sizes = self.sizes
        rows = tokens * sizes.experts_per_token
        used = roofline.experts_used(num_experts, sizes.experts_per_token, tokens) / world
        mean = rows / world
        busiest = sizes.expert_imbalance * mean + math.sqrt(2 * math.log(world) * mean)
        most = min(rows, busiest) if world > 1 else mean
        rate = self.node.experts[sizes.dtype]
        seconds = roofline.experts_seconds(rate, most, max(used, 1.0), sizes.hidden_size, width, sizes.weight_bytes)
        return Operation("experts", float(seconds), count, "experts")

    # -- the rest ----------------------------------------------------------------------------------------------

    def _elementwise(self, prefix: str, mode: Mode, local: int, count: int) -> list[Operation]:
        sizes, rate = self.sizes, self.node.elementwise
        width = sizes.shared_width + sizes.experts_per_token * sizes.expert_width or sizes.intermediate_size
        moved = local * ITEM * (8 * sizes.hidden_size + 3 * width / mode.tp)
        kernels = 3 if mode.tp > 1 and self.changes.fused_all_reduce else 4
        seconds = kernels * rate.floor_seconds + moved / rate.bytes_per_second
        return [Operation(f"{prefix}norms, rotary embedding and activations", seconds, count, "elementwise")]

    def _head(self, mode: Mode, rows: int) -> list[Operation]:
        sizes = self.sizes
        rate = self.node.products["bf16"]
        seconds = roofline.product_seconds(rate, rows, sizes.vocab_size / mode.world_size, sizes.hidden_size, 2.0, 2.0)
        return [
            self._gather("all-gather of rows that need logits", mode, rows),
            Operation("vocabulary head", float(seconds), 1, "product"),
        ]

    def _gather(self, name: str, mode: Mode, rows: int) -> Operation:
        """Of the hidden states of `rows` tokens, once per step."""
        elements = rows * self.sizes.hidden_size * mode.sp
        return self._link_operation(name, self.node.all_gather, mode.sp, elements, 1)

    def _sum(self, name: str, mode: Mode, rows: int, count: int) -> Operation:
        """An all-reduce over the TP group: the fused one-shot kernel or NCCL, whichever is faster."""
        if mode.tp == 1:
            return Operation(name, 0.0, 0, "collective")
        moved = rows * self.sizes.hidden_size * ITEM
        links = (self.node.all_reduce, self.node.all_reduce_small)
        seconds = min(roofline.all_reduce_seconds(self._link(link, mode.tp), mode.tp, moved) for link in links)
        return Operation(name, float(seconds), count, "collective")

    def _exchange(self, name: str, mode: Mode, elements: float, count: int) -> Operation:
        item = 1 if self.changes.fp8_exchange else ITEM
        return self._link_operation(name, self.node.all_to_all, mode.sp, elements * item / ITEM, count)

    def _link_operation(
        self, name: str, links: Mapping[int, roofline.Link], ranks: int, elements: float, count: int
    ) -> Operation:
        if ranks == 1:
            return Operation(name, 0.0, 0, "collective")
        seconds = roofline.exchange_seconds(self._link(links, ranks), ranks, elements * ITEM)
        return Operation(name, float(seconds), count, "collective")

    def _link(self, links: Mapping[int, roofline.Link], ranks: int) -> roofline.Link:
        """The link of `ranks` ranks, or of the next larger measured group; between nodes, the slower one."""
        link = links[min((known for known in links if known >= ranks), default=max(links))]
        if self._num_nodes == 1 or ranks <= self.node.num_devices:
            return link
        far = self.node.inter_node
        return roofline.Link(
            link.latency_seconds + far.latency_seconds, min(link.bytes_per_second, far.bytes_per_second)
        )


def cache_bytes_per_token(sizes: ModelSizes, world_size: int, item: float = ITEM) -> float:
    """Bytes of keys and values that one token caches per layer with a cache, on one rank."""
    if sizes.latent_width:
        return sizes.latent_width * item
    return sizes.key_value_heads(world_size) * (sizes.key_width + sizes.value_width) * item


def index_bytes_per_token(sizes: ModelSizes) -> float:
    """Bytes of keys of the index that one token caches per layer, on every rank."""
    return sizes.index_width * ITEM if sizes.selected else 0.0


def _within(shape: StepShape, window: int) -> StepShape:
    """The shape that layers with a window see."""
    if not window:
        return shape
    chunks = max(shape.num_prefills, 1)
    mean = shape.num_prefill_tokens / chunks
    visible = shape.num_prefill_tokens * min(window, (shape.fresh_pairs + shape.past_pairs) / max(1, mean * chunks))
    return shape._replace(
        decode_context=min(shape.decode_context, shape.num_decodes * window), fresh_pairs=int(visible), past_pairs=0
    )
