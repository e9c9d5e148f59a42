import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import V, one, random_logits, row, token_lists
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ulysses_infer.model.sampling import draw as draw_module
from ulysses_infer.model.sampling import sampler as sampler_module
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.model.sampling.seeds import derive_seed, uniform
from ulysses_infer.sampling_params import SamplingParams


def kept_tokens(logits: torch.Tensor, **params) -> set[int]:
    """The tokens that min_p, top_k and top_p leave."""
    weights = (logits - logits.max()).exp()[None].float()
    draw_module.truncate(weights, [SamplingParams(**params)])
    return set(weights[0].nonzero()[:, 0].tolist())


# --- truncation ---


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, V + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
)
def test_truncation_equals_transformers_warpers(seed, top_k, top_p, min_p):
    logits = random_logits(1, V, seed=seed).double()  # transformers' own sums in float32 blur the nucleus' edge
    expected = logits.clone()
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    left = set(expected[0].isfinite().nonzero()[:, 0].tolist())
    assert kept_tokens(logits[0], top_k=top_k, top_p=top_p, min_p=min_p) == left


def test_truncation_of_a_large_vocabulary_equals_a_full_sort():
    """Nuclei smaller and larger than the first probes, in one batch."""
    size = 20000
    logits = random_logits(4, size) * torch.tensor([[0.01], [0.3], [1.0], [2.0]])
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.5, top_k=2000), SamplingParams(top_p=0.2)]
    params.append(SamplingParams(top_p=0.99))
    actual = weights.clone()
    draw_module.truncate(actual, params)
    for index, p in enumerate(params):
        order = weights[index].double().argsort(descending=True, stable=True)[: p.top_k or size]
        mass = weights[index].double()[order]
        before = mass.cumsum(0) - mass
        kept = order[before < p.top_p * mass.sum()]
        assert set(actual[index].nonzero()[:, 0].tolist()) == set(kept.tolist())


def test_edges_of_truncation():
    logits = torch.tensor([1.0, 4.0, 2.0, 4.0, -math.inf, 3.0])
    assert kept_tokens(logits, top_k=1) == {1}  # ties: the lowest id, as greedy does
    assert kept_tokens(logits, top_k=2) == {1, 3}
    assert kept_tokens(logits, top_k=100) == {0, 1, 2, 3, 5}
    assert kept_tokens(logits, top_k=5) == {0, 1, 2, 3, 5}
    assert kept_tokens(logits, top_p=1e-9) == {1}
    assert kept_tokens(logits, top_p=1.0, top_k=6) == {0, 1, 2, 3, 5}
    assert kept_tokens(logits, min_p=1.0) == {1, 3}
    assert kept_tokens(torch.tensor([0.0, -46.0, -47.0, -48.0]), top_k=2) == {0, 1}  # lost in rounded sums
    assert kept_tokens(torch.zeros(8), top_p=0.5) == {0, 1, 2, 3}
    assert kept_tokens(torch.zeros(8), top_p=0.5, top_k=4) == {0, 1}


def test_top_k_one_is_greedy():
    logits = random_logits(30, V)
    assert Sampler().sample(logits, [row(seed=s, top_k=1) for s in range(30)]) == logits.argmax(-1).tolist()


# --- the draw ---


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_samples_follow_the_distribution(params):
    """Chi-square with up to 5 degrees of freedom: 25.7 is exceeded with a probability of 1e-4."""
    num, logits = 5000, torch.tensor([1.0, -1.0, 2.0, 0.0, 0.5, 2.0])
    drawn = Sampler().sample(logits.expand(num, -1), [row(seed=seed, **params) for seed in range(num)])
    scaled = logits / params.get("temperature", 1.0)
    kept = sorted(kept_tokens(scaled, **params))
    assert set(drawn) == set(kept)
    expected = scaled[kept].softmax(-1) * num
    observed = torch.bincount(torch.tensor(drawn), minlength=6)[kept]
    assert ((observed - expected) ** 2 / expected).sum() < 25.7


def test_samples_of_one_sequence_are_independent():
    numbers = torch.tensor([uniform(5, index) for index in range(20000)], dtype=torch.float64)
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20000)
    lagged = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(lagged) < 4 / math.sqrt(20000)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-52])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_extreme_random_numbers_give_no_forbidden_token(monkeypatch, number, top_p):
    monkeypatch.setattr(sampler_module, "uniform", lambda seed, index: number)
    forbidden = frozenset({0, 1, V - 1})
    logits = random_logits(20, V)
    drawn = Sampler().sample(logits, [row(eos=forbidden, min_tokens=1, top_p=top_p) for _ in range(20)])
    assert all(2 <= token < V - 1 for token in drawn)


def test_samples_are_stable_across_versions():
    """A change of the generator changes every seeded output: this must not happen unnoticed."""
    assert [uniform(0, 0), uniform(1, 0), uniform(1, 1)] == [
        0.8833108082136425,
        0.7497482413580301,
        0.37239342287916566,
    ]
    assert [derive_seed(0, 0), derive_seed(7, 3), derive_seed(-1, 0)] == [
        0,
        16616101746815609346,
        13029008266876403067,
    ]


@given(seed=st.integers(-(2**63), 2**63 - 1), a=st.integers(0, 16384), b=st.integers(0, 16384))
def test_siblings_have_different_seeds(seed, a, b):
    assert (derive_seed(seed, a) == derive_seed(seed, b)) == (a == b)
    assert 0 <= derive_seed(seed, a) < 2**64


ROWS = st.builds(
    row,
    prompt=token_lists,
    outputs=token_lists,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 0, 3]),
    top_p=st.sampled_from([1.0, 1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([None, {3: 2.0}]),
    min_tokens=st.sampled_from([0, 3]),
    eos=st.just(frozenset({1})),
)


@settings(deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), seed=st.integers(0, 1000), data=st.data())
def test_token_does_not_depend_on_the_batch(rows, seed, data):
    logits = random_logits(len(rows), V, seed=seed)
    together = Sampler().sample(logits, rows)
    assert together == [one(logits[index], sampling_row) for index, sampling_row in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    assert Sampler().sample(logits[order], [rows[index] for index in order]) == [together[i] for i in order]


def test_large_batches_are_processed_in_chunks(monkeypatch):
    logits, rows = random_logits(7, V), [row(seed=seed) for seed in range(7)]
    whole = Sampler().sample(logits, rows)
    monkeypatch.setattr(sampler_module, "MAX_ELEMENTS", 2 * V)
    assert Sampler().sample(logits, rows) == whole


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}])
def test_small_noise_in_the_logits_rarely_changes_the_token(params):
    num, size = 1000, 500
    logits = random_logits(num, size)
    rows = [row(seed=seed, **params) for seed in range(num)]
    noisy = logits + 1e-5 * random_logits(num, size, seed=1)
    changed = sum(a != b for a, b in zip(Sampler().sample(logits, rows), Sampler().sample(noisy, rows), strict=True))
    assert changed <= 1


def test_seed_and_position_determine_the_sample():
    logits = torch.zeros(20, 1000)
    by_seed = Sampler().sample(logits, [row(seed=seed) for seed in range(20)])
    by_position = Sampler().sample(logits, [row(outputs=[1] * length) for length in range(20)])
    assert len(set(by_seed)) > 15
    assert len(set(by_position)) > 15
    assert by_seed[0] == by_position[0]
