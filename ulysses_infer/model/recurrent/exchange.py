"""The exchanges around the inner part of a recurrent layer: tokens to heads before it, heads to tokens after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ulysses_infer.model.context import StepContext
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Sharding


class InputExchange:
    """Sends the outputs of a projection to the ranks that own them."""

    def __init__(self, sharding: Sharding) -> None:
        self.sharding = sharding
        self._sizes: list[int] = []
        self._order: list[int] | None = None
        self._indices: dict[tuple[Place, torch.device], torch.Tensor] = {}

    def bind(self, place: Place) -> None:
        """Switch to the features of `place`."""
        self._place = place
        held = self.sharding.spans(place.weight_index, place.mode.tp)
        wanted = [self.sharding.spans(shard, place.world_size) for shard in sp_shards(place)]
        self._sizes = [span.size for span in held]
        in_order = all(
            len(spans) == len(held) and spans[part] == _even(whole, index, len(wanted))
            for index, spans in enumerate(wanted)
            for part, whole in enumerate(held)
        )
        self._order = None if in_order else _positions(held, [span for spans in wanted for span in spans])

    def sources(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        """outputs: [t, features / tp]; returns what to send, each [t, sp, features of a rank]."""
        sp = self._place.mode.sp
        if self._order is None:
            return [part.unflatten(1, (sp, -1)) for part in outputs.split(self._sizes, dim=1)]
        return [outputs.index_select(1, self._index(outputs.device)).unflatten(1, (sp, -1))]

    def join(self, received: list[torch.Tensor]) -> torch.Tensor:
        """The own features, [T, features / W], of what `sources` made; takes them from the front of `received`."""
        count = len(self._sizes) if self._order is None else 1
        parts = [received.pop(0).squeeze(1) for _ in range(count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _index(self, device: torch.device) -> torch.Tensor:
        key = self._place, device
        if key not in self._indices:
            self._indices[key] = torch.tensor(self._order, device=device)
        return self._indices[key]


def tokens_to_heads(
    context: StepContext, exchanges: Sequence[InputExchange], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """One fused all-to-all for all projections. outputs: each [t, features / tp]; returns each as [T, features / W]."""
    if context.collectives.place.mode.sp == 1:
        return list(outputs)
    count = context.num_local_tokens
    sources = [
        source
        for exchange, output in zip(exchanges, outputs, strict=True)
        for source in exchange.sources(output[:count])
    ]
    received = context.collectives.tokens_to_heads(sources, context.token_spans)
    return [exchange.join(received) for exchange in exchanges]


def heads_to_tokens(context: StepContext, output: torch.Tensor) -> torch.Tensor:
    """output: [T, features / W]; returns [t, features / tp]."""
    if context.collectives.place.mode.sp == 1:
        return output
    back = context.collectives.heads_to_tokens(output, context.token_spans)
    # An empty slice runs a dummy token, whose output is unused.
    return back if back.shape[0] else back.new_zeros(1, back.shape[1])


def sp_shards(place: Place) -> range:
    """The head shards of the SP group of `place`, in order."""
    return range(place.weight_index * place.mode.sp, (place.weight_index + 1) * place.mode.sp)


def _even(whole: Span, index: int, count: int) -> Span:
    """Part `index` of `whole` cut into `count` equal parts; an empty span at its start if they are not equal."""
    if whole.size % count:
        return Span(whole.start, whole.start)
    size = whole.size // count
    return Span(whole.start + index * size, whole.start + (index + 1) * size)


def _positions(held: Sequence[Span], wanted: Sequence[Span]) -> list[int]:
    """For each wanted feature, its position among the held ones."""
    features = [feature for span in held for feature in range(span.start, span.stop)]
    position = {feature: number for number, feature in enumerate(features)}
    return [position[feature] for span in wanted for feature in range(span.start, span.stop)]
