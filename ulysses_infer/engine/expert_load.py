"""Counts how many tokens the experts of each rank have computed."""

from __future__ import annotations

import pickle
from typing import Any

from ulysses_infer.worker.channel import CALL
from ulysses_infer.worker.rank import Rank


def expert_load(rank: Rank) -> dict[str, Any]:
    """The placement and every rank's counts; {} for a model without experts. On rank 0, between steps.

    A token counts once for each expert that a rank computed for it, fully or in part: with width slices on several
    ranks, once on each. Counts run from the start.
    """
    layers = rank.worker.model.injection.expert_layers
    if not layers:
        return {}
    rank.channel.send(CALL, pickle.dumps((_collect, ())))
    counts = _collect(rank)
    return {
        "expert_placement": rank.worker.model.injection.expert_placement,
        "expert_tokens_per_rank": [sum(sum(layer) for layer in of_rank) for of_rank in counts],
        "expert_tokens": [
            _of_layer([of_rank[index] for of_rank in counts], layer.num_experts) for index, layer in enumerate(layers)
        ],
    }


def _collect(rank: Rank) -> list[list[list[int]]]:
    """Every rank's counts in head-shard order: [W][layers][own experts]. Collective."""
    counts = rank.channel.gather([layer.token_counts() for layer in rank.worker.model.injection.expert_layers])
    return [counts[index] for index in rank.groups.shard_order]


def _of_layer(counts: list[list[int]], num_experts: int) -> list[int]:
    """Tokens of each expert of a layer over all ranks, from the counts of the experts that each rank owns."""
    if any(len(of_rank) != num_experts for of_rank in counts):
        return [count for of_rank in counts for count in of_rank]
    return [sum(of_expert) for of_expert in zip(*counts, strict=True)]
