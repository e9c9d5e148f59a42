"""Least squares without negative coefficients, robust against outliers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.step_time.regression import fit_coefficients, nonnegative_least_squares

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed, unknowns=6, rows=80):
    random = np.random.default_rng(seed)
    matrix = random.uniform(0, 1, (rows, unknowns)) * 10.0 ** random.uniform(-2, 4, unknowns)
    coefficients = random.uniform(0.2, 2.0, unknowns) / matrix.mean(axis=0) * (random.random(unknowns) < 0.7)
    coefficients[0] = 1.0 / matrix[:, 0].mean()
    return random, matrix, coefficients


@given(SEEDS)
def test_nonnegative_least_squares_meets_its_optimality_conditions(seed):
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(30, 5)), random.normal(size=30)
    gram, moment = matrix.T @ matrix, matrix.T @ target
    solution = nonnegative_least_squares(gram, moment)
    gradient = moment - gram @ solution
    assert np.all(solution >= 0)
    assert np.all(gradient <= 1e-8), "raising any unknown makes it worse"
    assert np.all(np.abs(gradient[solution > 0]) <= 1e-8)


@given(SEEDS, st.lists(st.booleans(), min_size=5, max_size=5))
def test_where_it_starts_does_not_change_the_solution(seed, passive):
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(30, 5)), random.normal(size=30)
    gram, moment = matrix.T @ matrix, matrix.T @ target
    started = nonnegative_least_squares(gram, moment, np.array(passive))
    np.testing.assert_allclose(started, nonnegative_least_squares(gram, moment), atol=1e-9)


@given(SEEDS)
def test_exact_times_give_the_exact_coefficients(seed):
    _, matrix, coefficients = problem(seed)
    fitted = fit_coefficients(matrix, matrix @ coefficients, np.ones(len(matrix)))
    np.testing.assert_allclose(matrix @ fitted, matrix @ coefficients, rtol=1e-3)


@given(SEEDS)
def test_noise_and_one_row_in_ten_that_took_far_too_long_move_predictions_little(seed):
    random, matrix, coefficients = problem(seed, rows=200)
    truth = matrix @ coefficients
    seconds = truth * np.exp(random.normal(0, 0.03, len(truth)))
    seconds[random.random(len(truth)) < 0.1] *= 8
    fitted = fit_coefficients(matrix, seconds, np.ones(len(truth)))
    assert np.median(np.abs(matrix @ fitted / truth - 1)) < 0.05


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e4)), min_size=1, max_size=20))
def test_coefficients_are_finite_and_not_negative_whatever_was_measured(pairs):
    rows = np.array([[1.0, x, x] for x, _ in pairs])
    fitted = fit_coefficients(rows, np.array([y for _, y in pairs]), np.ones(len(pairs)))
    assert np.all(np.isfinite(fitted))
    assert np.all(fitted >= 0)


def test_an_optional_feature_gets_no_coefficient_from_noise():
    random = np.random.default_rng(0)
    rows = np.column_stack([np.ones(60), random.uniform(0, 1, 60)])
    seconds = np.exp(random.normal(0, 0.02, 60))
    fitted = fit_coefficients(rows, seconds, np.ones(60), proof=np.array([0.0, 0.05]))
    assert fitted[1] == 0
    seconds += rows[:, 1]
    assert fit_coefficients(rows, seconds, np.ones(60), proof=np.array([0.0, 0.05]))[1] == pytest.approx(1, abs=0.3)


def test_a_later_fit_of_the_same_rows_agrees():
    _, matrix, coefficients = problem(3)
    seconds = matrix @ coefficients
    first = fit_coefficients(matrix, seconds, np.ones(len(seconds)))
    again = fit_coefficients(matrix, seconds * 1.2, np.ones(len(seconds)), start=first)
    np.testing.assert_allclose(matrix @ again, seconds * 1.2, rtol=1e-3)
