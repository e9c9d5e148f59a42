"""The tokens before each token are found among a rank's own, the exchanged ends of slices, and the states."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.cache.states import StateSequences
from ulysses_infer.model.recurrent.history import places_of
from ulysses_infer.parallel.layout import Span, even_span

CPU = torch.device("cpu")


def texts(lengths, past):
    """For each sequence, `past` earlier tokens and those of the step, as distinct numbers."""
    numbers = iter(range(1, 10_000))
    return [[next(numbers) for _ in range(past + length)] for length in lengths]


def vectors_of(places, tokens, ends, states):
    return lambda index: torch.cat((tokens, ends, states))[index].tolist()


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    ranks=st.integers(1, 5),
    count=st.integers(1, 4),
)
def test_every_rank_finds_the_tokens_before_its_own_and_the_last_ones(lengths, ranks, count):
    whole = texts(lengths, count)
    rows = [(member, count + index) for member, length in enumerate(lengths) for index in range(length)]
    step = torch.tensor([whole[member][index] for member, index in rows])
    states = torch.tensor([text[:count] for text in whole]).flatten()
    sequences = StateSequences(torch.arange(len(lengths)), lengths)
    spans = tuple(even_span(len(rows), rank, ranks) for rank in range(ranks))
    found = [places_of(sequences, spans, rank, count, CPU) for rank in range(ranks)]
    slices = [step[span.start : span.stop] for span in spans]
    ends = torch.cat([own[each.own_ends] for own, each in zip(slices, found, strict=True)]) if ranks > 1 else step[:0]
    for own, span, each in zip(slices, spans, found, strict=True):
        look_up = vectors_of(each, own, ends, states)
        expected = [[whole[m][i - lag] for m, i in rows[span.start : span.stop]] for lag in range(1, count + 1)]
        assert look_up(each.before) == expected
        assert look_up(each.last) == [token for text in whole for token in text[-count:]]
        if ranks > 1:
            assert each.num_ends == [len(other.own_ends) for other in found]


def test_only_the_ends_of_slices_and_sequences_are_sent():
    sequences = StateSequences(torch.arange(2), [500, 500])
    found = places_of(sequences, (Span(0, 400), Span(400, 1000)), 0, 3, CPU)
    assert found.own_ends.tolist() == [397, 398, 399]
    assert found.num_ends == [3, 6]
    assert np.prod(found.last.shape) == 6
