"""Draws random tokens, after min_p, top_k and top_p, each applied to what the one before it left.

A token takes one uniform random number, which is looked up in the cumulative distribution over the vocabulary in id
order. So noise of 1e-5 in the logits changes a token only with a probability of that order. Weights are summed as
integers, so a row's token depends neither on the batch nor on the implementation: Triton's kernel on a GPU, C on a CPU,
or torch. All take the weights that torch computed.

The whole rows are on rank 0, where penalties and log-probabilities need them, too. Gathering 256 rows of 152k bf16
logits from 8 H200 takes about 0.22 ms, 64 rows 0.07 ms (public NCCL tables). Searching limits on shards would take up
to 32 all-reduces of at least 16 us: 0.5 ms, even for one row. FlashInfer's sampling is not used: its draws depend on
its own generator and on the number of rejections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ulysses_infer.arithmetic import FRACTION
from ulysses_infer.kernels import launch
from ulysses_infer.model.sampling.transfer import column, to_device_async
from ulysses_infer.native import sampling as native
from ulysses_infer.sampling_params import SamplingParams

TOP_P_CANDIDATES = 1024  # most nuclei are smaller, and this top-k is far cheaper than a full sort
CANDIDATE_GROWTH = 16  # factor of the next attempt if the nucleus is larger
EVERYTHING = torch.iinfo(torch.int64).max


def masses(weights: torch.Tensor) -> torch.Tensor:
    """`weights` float32 in [0, 1] as multiples of 1 / FRACTION, rounded down: int64."""
    return (weights * FRACTION).to(torch.int64)


def draw(
    scores: torch.Tensor, peak: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> torch.Tensor:
    """One token per row of `scores: [m, V]`, by inverse transform sampling in id order.

    peak: [m], the largest scores; numbers: a random number in [0, 1) per row; returns [m] int64.
    """
    temperature = column([p.temperature for p in params], scores)
    weights = (scores - peak[:, None]).div_(temperature).exp_()  # [m, V], the largest is 1
    if launch.runs_kernels(weights.device):
        return _draw_by_kernel(weights, params, numbers)
    if native.draws_natively(weights):
        return native.draw(weights, _options(weights, params, numbers))
    truncate(weights, params)
    return draw_from(masses(weights), numbers)


def draw_from(each: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """One token per row of the masses `each: [m, V]` int64, with its share as probability: [m] int64."""
    cumulative = each.cumsum(-1)
    target = to_device_async(numbers, each, torch.float64) * cumulative[:, -1]
    # The first token whose cumulative weight exceeds the target; never one of weight 0.
    return torch.searchsorted(cumulative, target.long()[:, None], right=True)[:, 0]


def masses_of(scores: torch.Tensor, peak: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution that `draw` draws from, as masses: [m, V] int64."""
    weights = (scores - peak[:, None]).div_(column([p.temperature for p in params], scores)).exp_()
    truncate(weights, params)
    return masses(weights)


def draw_unless_accepted(
    scores: torch.Tensor,
    peak: torch.Tensor,
    params: Sequence[SamplingParams],
    numbers: Sequence[float],
    drafts: Sequence[int],
    accepting: Sequence[float],
) -> torch.Tensor:
    """Rejection sampling of one drafted token per row of `scores: [m, V]`: [m] int64.

    The draft is returned with its probability p(draft), which `accepting`, a random number in [0, 1) per row, decides;
    else a token is drawn from the rest of the distribution by `numbers`. So tokens have the distribution p, whatever is
    drafted. Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192,
    for a proposer that gives its draft the probability 1. peak, params: as in `draw`.
    """
    each = masses_of(scores, peak, params)
    places = to_device_async(drafts, each, torch.int64)[:, None]
    own = each.gather(1, places)[:, 0]
    chance = to_device_async(accepting, each, torch.float64) * each.sum(-1)
    other = draw_from(each.scatter_(1, places, 0), numbers)
    return torch.where(chance.long() < own, places[:, 0], other)


def draw_unless_source_accepted(
    scores: torch.Tensor,
    peak: torch.Tensor,
    params: Sequence[SamplingParams],
    numbers: Sequence[float],
    drafts: Sequence[int],
    accepting: Sequence[float],
    sources: torch.Tensor,
) -> torch.Tensor:
    """`draw_unless_accepted` for drafts that were drawn from distributions q, which `sources: [m, V]` int64 are masses
    of: a draft x is accepted with min(1, p(x) / q(x)), else a token is drawn with what p exceeds q by."""
    each = masses_of(scores, peak, params)
    each, sources = each.double(), sources.double()
    model, source = each / each.sum(-1, keepdim=True), sources / sources.sum(-1, keepdim=True)
    places = to_device_async(drafts, each, torch.int64)[:, None]
    bar = to_device_async(accepting, each, torch.float64) * source.gather(1, places)[:, 0]
    excess = (model - source).clamp_(min=0)
    most = excess.amax(-1, keepdim=True)
    # Without any excess p is q, and every draft is accepted.
    other = draw_from(masses(torch.where(most > 0, excess / most, model)), numbers)
    return torch.where(bar < model.gather(1, places)[:, 0], places[:, 0], other)


def _draw_by_kernel(weights: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    from ulysses_infer.kernels import sampling

    return sampling.draw(weights, _options(weights, params, numbers))


def _options(weights: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    """What the kernels take for each row: [m, 4] float64."""
    options = [(number, _size(p, weights), p.top_p, p.min_p) for p, number in zip(params, numbers, strict=True)]
    return to_device_async(options, weights, torch.float64)


def _size(params: SamplingParams, weights: torch.Tensor) -> int:
    """How many tokens top_k leaves at most."""
    return min(params.top_k or weights.shape[1], weights.shape[1])


def truncate(weights: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Zero the weights excluded by min_p, then top_k, then top_p, each applied to the rest."""
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(weights < column([p.min_p for p in params], weights), 0.0)
    sizes = [_size(p, weights) for p in params]
    cut = [index for index, p in enumerate(params) if sizes[index] < weights.shape[1] or p.top_p < 1]
    if cut:
        places = to_device_async(cut, weights)
        top_p = to_device_async([params[i].top_p for i in cut], weights, torch.float64)
        weights[places] = _keep_top_k_top_p(weights[places], [sizes[i] for i in cut], top_p)


def _keep_top_k_top_p(
    weights: torch.Tensor, top_k: Sequence[int], top_p: torch.Tensor, num_candidates: int = TOP_P_CANDIDATES
) -> torch.Tensor:
    """`weights: [m, V]` with zeros outside the top_k: [m] largest and, of these, the top_p: [m] nucleus
    (Holtzman et al. 2020, arXiv 1904.09751). Of equal weights at the threshold the lowest ids stay. A CPU first
    looks for the nucleus among the `num_candidates` largest weights; a GPU sorts all, to avoid a synchronization. May
    overwrite `weights`.
    """
    vocab_size = weights.shape[1]
    num_values = max((k for k in top_k if k < vocab_size), default=1)
    if vocab_size in top_k:
        num_values = vocab_size if weights.is_cuda else min(max(num_values, num_candidates), vocab_size)
    values = weights.topk(num_values).values  # [m, num_values], descending
    sizes = to_device_async(top_k, weights)
    kept = _prefix_lengths(weights, values, sizes, top_p, vocab_size in top_k)
    if num_values == vocab_size or vocab_size not in top_k:
        return _keep_prefix(weights, values, kept)
    wider = ((sizes == vocab_size) & (kept == num_values)).nonzero()[:, 0].tolist()
    # Rows whose nucleus is larger are cut again below.
    result = weights if len(wider) == len(weights) else _keep_prefix(weights, values, kept)
    if wider:
        result[wider] = _keep_top_k_top_p(
            weights[wider], [vocab_size] * len(wider), top_p[wider], num_candidates * CANDIDATE_GROWTH
        )
    return result


def _prefix_lengths(
    weights: torch.Tensor, values: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, some_whole: bool
) -> torch.Tensor:
    """How many of `values: [m, c]`, a row's largest weights in descending order, are kept: [m], at least one.

    some_whole: whether a row has a top_k of V.
    """
    inside = torch.arange(values.shape[1], device=values.device) < top_k[:, None]
    each = masses(torch.where(inside, values, 0.0))
    upto = each.cumsum(-1)
    total = upto[:, -1]
    if some_whole:
        total = torch.where(top_k < weights.shape[1], total, masses(weights).sum(-1))
    # A top_p of 1 keeps all tokens, those of no mass as well.
    limit = torch.where(top_p < 1, (top_p * total).ceil().long(), EVERYTHING)
    return (inside & (upto - each < limit[:, None])).sum(-1).clamp_(min=1)


def _keep_prefix(weights: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`weights: [m, V]` with zeros outside the `kept: [m]` largest; `values: [m, c]` are these, sorted."""
    threshold = values.gather(-1, kept[:, None] - 1)
    above = weights > threshold
    room = kept[:, None] - above.sum(-1, keepdim=True)
    at_threshold = weights == threshold
    # A GPU does it always: checking would need a synchronization.
    if weights.is_cuda or bool((at_threshold.sum(-1, keepdim=True) > room).any()):
        at_threshold &= at_threshold.cumsum(-1) <= room
    return torch.where(above | at_threshold, weights, 0.0)
