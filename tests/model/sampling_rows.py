"""Rows and logits for the sampler's tests."""

import torch
from hypothesis import strategies as st

from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.bad_words import BadWords

V = 40  # vocabulary

token_lists = st.lists(st.integers(0, V - 1), max_size=12)


def row(prompt=(1, 2, 3), outputs=(), seed=0, eos=frozenset(), bad_words=(), **params) -> SamplingRow:
    words = BadWords(bad_words) if bad_words else None
    return SamplingRow(SamplingParams(**params), seed, list(prompt), list(outputs), eos, words)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def one(logits: torch.Tensor, sampling_row: SamplingRow) -> int:
    return Sampler().sample(logits[None], [sampling_row])[0]
