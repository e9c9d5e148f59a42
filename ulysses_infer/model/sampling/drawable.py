"""The distribution that tokens are drawn from, for log-probabilities of what was sampled (`runtime.logprobs_mode`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ulysses_infer.model.sampling.draw import truncate
from ulysses_infer.model.sampling.transfer import column, to_device_async
from ulysses_infer.sampling_params import SamplingParams


def drawable(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The logits of the distribution that `draw` takes tokens from: `scores: [m, V]` divided by the temperatures, -inf
    for tokens that min_p, top_k or top_p exclude. Rows with temperature 0 stay as they are. Returns [m, V]."""
    random = [index for index, p in enumerate(params) if not p.is_greedy]
    if not random:
        return scores
    places, of_random = to_device_async(random, scores), [params[index] for index in random]
    scaled = scores[places] / column([p.temperature for p in of_random], scores)
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    truncate(weights, of_random)
    return scores.index_copy(0, places, scaled.masked_fill_(weights == 0, -torch.inf))
