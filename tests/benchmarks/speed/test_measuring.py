"""Ratios, their words, and fits."""

import pytest

from benchmarks.speed.measuring import Ratio, added, growth, ratio, spread


def test_a_ratio_is_of_pairs_and_rounds_are_resampled_whole():
    assert ratio([[1.0, 2.0], [3.0, 2.0]], [[2.0, 4.0], [6.0, 4.0]]) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio([[1.0], [1.0]], [[1.0], [3.0]])[1:] == pytest.approx((1.0, 3.0))


def test_what_one_takes_more_than_another_is_a_share_of_the_base():
    found = added([[2.0, 4.0], [2.0, 4.0]], [[3.0, 5.0], [3.0, 5.0]], [[3.1, 5.2], [3.1, 5.2]])
    assert found == pytest.approx((0.05, 0.05, 0.05)) and found.as_points == "+5.00 [+5.00, +5.00]"


def test_an_overhead_within_the_spread_is_called_so():
    assert Ratio(1.021, 1.004, 1.043).as_overhead == "1.021 [1.004, 1.043]"
    assert Ratio(0.9, 0.8, 0.99).as_overhead == "0.900 [0.800, 0.990]"
    assert Ratio(1.021, 0.998, 1.043).as_overhead == "1.021 [0.998, 1.043], not distinguishable from none"


def test_growth_is_a_power():
    assert growth([1, 10, 100], [2, 20, 200]) == pytest.approx((2.0, 1.0, 1.0))
    assert growth([4, 4], [1, 2]) is None
    assert str(growth([1, 4], [1, 2])) == "^0.50 (R2 1.00)"


def test_a_spread_is_median_least_and_largest():
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0, 3.0]"
