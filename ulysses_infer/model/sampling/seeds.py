"""Seeds of outputs, and the random number of each of their tokens: pure functions, equal on every machine."""

from __future__ import annotations

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ACCEPTANCE = 2**40  # no request has as many outputs


def _splitmix64_finalizer(value: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit integers (Steele et al. doi 10.1145/2714064.2660195)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def derive_seed(seed: int, index: int) -> int:
    """The seed of output `index` of a request with seed `seed`."""
    return _splitmix64_finalizer(seed + index * _GOLDEN)


def uniform(seed: int, index: int) -> float:
    """Number `index` of SplitMix64's stream for `seed`, in [0, 1): 52 bits, so that `uniform * x < x`."""
    return (_splitmix64_finalizer(_splitmix64_finalizer(seed) + (index + 1) * _GOLDEN) >> 12) * 2.0**-52


def acceptance_number(seed: int, index: int) -> float:
    """The random number, in [0, 1), that accepts or rejects a drafted token at `index`; independent of `uniform`."""
    return uniform(derive_seed(seed, _ACCEPTANCE), index)


def draft_number(seed: int, index: int) -> float:
    """The random number, in [0, 1), that draws a drafted token for `index`; independent of the others."""
    return uniform(derive_seed(seed, _ACCEPTANCE + 1), index)
