"""Bootstrap intervals and paired comparisons: coverage, direction, infinite values."""

import math

import numpy as np
import pytest

from pipeline.evaluation.statistics import bootstrap_intervals, compare


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(30, 2, (100, 3))
    low, high = bootstrap_intervals(values)
    assert (low < values.mean(0)).all()
    assert (high > values.mean(0)).all()
    # The mean's standard error is 0.2, so the interval's width is about 4 times that.
    assert high - low == pytest.approx(3.92 * values.std(0) / 10, rel=0.1)


def test_the_interval_holds_the_true_mean_in_19_of_20_cases() -> None:
    values = np.random.default_rng(2).exponential(1.0, (60, 400))
    low, high = bootstrap_intervals(values)
    assert 0.9 <= ((low < 1.0) & (high > 1.0)).mean() <= 0.98


def test_the_interval_is_the_same_each_time_and_for_any_other_columns() -> None:
    values = np.random.default_rng(3).normal(size=(20, 4))
    together = bootstrap_intervals(values)
    assert np.array_equal(together, bootstrap_intervals(values))
    assert together[:, 2:3] == pytest.approx(bootstrap_intervals(values[:, 2:3]))


def test_a_column_with_an_infinite_value_has_no_interval() -> None:
    values = np.array([[30.0, 1.0], [math.inf, 2.0], [31.0, 3.0]])
    low, high = bootstrap_intervals(values)
    assert np.isnan([low[0], high[0]]).all()
    assert 1.0 <= low[1] < high[1] <= 3.0


def test_pairs_find_a_difference_that_the_images_spread_hides() -> None:
    draws = np.random.default_rng(4)
    first = draws.normal(30, 5, (50, 1))
    second = first + draws.normal(0.3, 0.2, (50, 1))
    low, high = bootstrap_intervals(np.hstack([first, second]))
    assert low[1] < high[0]  # the intervals of the means overlap
    result = compare(["psnr_y"], second, first)["psnr_y"]
    assert result.is_certain
    assert 0.2 < result.interval[0] < result.difference < result.interval[1] < 0.4
    assert result.wins > 40
    assert result.wins + result.losses == 50


def test_wins_follow_the_direction_of_the_metric() -> None:
    values, others = np.array([[31.0, 0.3], [32.0, 0.2], [30.0, 0.4]]), np.array([[30.0, 0.2]] * 3)
    result = compare(["psnr_y", "lpips"], values, others)
    assert (result["psnr_y"].wins, result["psnr_y"].losses) == (2, 0)
    assert (result["lpips"].wins, result["lpips"].losses) == (0, 2)
    assert result["lpips"].difference == pytest.approx(0.1)


def test_equal_infinite_values_do_not_differ() -> None:
    values = np.array([[math.inf], [30.0]])
    result = compare(["psnr_y"], values, np.array([[math.inf], [29.0]]))["psnr_y"]
    assert (result.difference, result.wins, result.losses) == (0.5, 1, 0)
    against_finite = compare(["psnr_y"], values, np.array([[28.0], [29.0]]))["psnr_y"]
    assert (against_finite.difference, against_finite.wins) == (math.inf, 2)
    assert not against_finite.is_certain
