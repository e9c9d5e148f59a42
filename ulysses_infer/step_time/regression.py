"""Robust least squares with non-negative coefficients."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-10  # relative to the scaled problem: coefficients that no measurement separates still get a unique answer
HUBER = 1.5  # residuals beyond this multiple of the typical one get less weight
LEAST_SPREAD = 0.01  # a fit this close to all measurements has no outliers
TOLERANCE = 1e-12


def nonnegative_least_squares(gram: np.ndarray, moment: np.ndarray, passive: np.ndarray | None = None) -> np.ndarray:
    """The x >= 0 that minimises |A x - b|^2, from gram = A'A [F, F] and moment = A'b [F].

    passive: [F] bool, unknowns that are likely positive, to start from.

    Source: the active-set method of Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23, on the
    normal equations, which are accurate enough for a dozen unknowns and make thousands of rows cheap.
    """
    passive = np.zeros(len(moment), dtype=bool) if passive is None else passive.copy()
    solution = _solve_passive(gram, moment, passive, np.ones(len(moment)))
    for _ in range(5 * len(moment)):
        gradient = np.where(passive, -np.inf, moment - gram @ solution)
        best = int(np.argmax(gradient))
        if gradient[best] <= TOLERANCE * max(1.0, abs(float(moment[best]))):
            break
        passive[best] = True
        solution = _solve_passive(gram, moment, passive, solution)
    return solution


def _solve_passive(gram: np.ndarray, moment: np.ndarray, passive: np.ndarray, solution: np.ndarray) -> np.ndarray:
    """Least squares of the passive unknowns; those that would be negative leave (`passive` changes)."""
    while passive.any():
        wanted = np.zeros(len(moment))
        wanted[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], moment[passive])
        negative = passive & (wanted <= 0)
        if not negative.any():
            return wanted
        step = float(np.min(solution[negative] / (solution[negative] - wanted[negative])))
        solution = np.maximum(solution + step * (wanted - solution), 0.0)
        passive &= solution > TOLERANCE * float(solution.max(initial=0.0))
        solution[~passive] = 0.0
    return np.zeros(len(moment))


def fit_coefficients(
    rows: np.ndarray,
    seconds: np.ndarray,
    weights: np.ndarray,
    proof: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Prices [F] >= 0 with rows [n, F] @ coefficients close to seconds [n] > 0, in relative terms and for most rows.

    Relative, since a millisecond matters to a step of ten and not to one of a thousand. Iteratively reweighted: first
    towards the least absolute error, which a minority of wild rows cannot move far, then by Huber's weights. `proof`
    [F]: the share of the time, in rows that have it, which a feature must explain beyond what the others do, to be
    given a coefficient at all (as in the relaxed lasso of Meinshausen, 2007).
    `start` [F]: coefficients of an earlier fit of much the same rows, from where fewer iterations will do.
    """
    relative = rows / seconds[:, None]
    scales = np.sqrt((relative**2).mean(axis=0))
    scales[scales == 0] = 1.0
    scaled = relative / scales
    trust, passive = np.ones(len(seconds)), None
    if start is not None:
        trust, passive = _trust(np.abs(rows @ start / seconds - 1.0), absolute=False), start > 0
    coefficients = np.zeros(rows.shape[1])
    iterations = 9 if start is None else 4
    for iteration in range(iterations):
        weighted = scaled * (weights * trust)[:, None]
        gram = weighted.T @ scaled
        gram.flat[:: len(gram) + 1] += RIDGE * max(float(np.trace(gram)), 1.0)
        moment = weighted.sum(axis=0)
        if proof is not None and iteration < iterations - 1:
            moment *= 1 - proof
        elif proof is not None:  # what has proved itself gets its full coefficient, the others none
            moment[(proof > 0) & (coefficients <= 0)] = -np.inf
        coefficients = nonnegative_least_squares(gram, moment, passive)
        passive = coefficients > 0
        trust = _trust(np.abs(scaled @ coefficients - 1.0), absolute=start is None and iteration < 4)
    return coefficients / scales


def _trust(errors: np.ndarray, absolute: bool) -> np.ndarray:
    """The weight each row deserves for its relative error."""
    spread = max(1.4826 * float(np.median(errors)), LEAST_SPREAD)
    limit = LEAST_SPREAD if absolute else HUBER * spread
    return limit / np.maximum(errors, limit)
