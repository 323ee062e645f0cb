"""The statistics are the textbook's, and claims need p < 0.01."""

import math

import pytest

from nanonexus.stats import holm, mcnemar, mean_spread, paired, paired_text, stderr


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar([1] * 5, [1] * 5) == 1.0
    assert mcnemar([1] * 10 + [0] * 2, [0] * 10 + [1] * 2) == pytest.approx(2 * 79 / 4096)
    assert mcnemar([1] * 8, [0] * 8) == 2 / 256
    assert mcnemar([1, 0], [0, 1]) == 1.0
    assert math.isnan(stderr([1.0]))


def test_paired_is_the_textbooks_t_test():
    pytest.importorskip("scipy")
    # gaps 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.4641 on 2 degrees of freedom, where
    # p = 1 - t / sqrt(t^2 + 2) and the 99% quantile is 9.92484
    gap = paired([2, 4, 6], [1, 2, 3])
    half = 9.924843 / math.sqrt(3)
    assert gap == pytest.approx(dict(mean=2, low=2 - half, high=2 + half,
                                     p=1 - math.sqrt(12 / 14)), rel=1e-5)
    assert math.isnan(paired([2], [1])["p"])  # one seed
    assert math.isnan(paired([2, 3], [1, 2])["p"])  # no spread


def test_holm_is_the_textbooks():
    # 0.01 * 4 = 0.04; 0.02 * 3; 0.03 * 2 = 0.06; 0.04 * 1 is raised to the 0.06 before it
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    (low, nan), alone = holm([0.02, math.nan]), 0.02
    assert low == alone and math.isnan(nan)  # a single seed is no comparison


def test_a_difference_is_marked_where_the_interval_excludes_0():
    pytest.importorskip("scipy")
    close = paired([1.0, 1.1, 1.2], [1.05, 1.05, 1.2])
    far = paired([1.0, 1.1, 1.2], [2.01, 2.1, 2.19])
    assert "*" not in paired_text(close) and close["low"] < 0 < close["high"]
    assert paired_text(far).endswith("*") and far["high"] < 0
    assert paired_text(paired([1], [2])) == "-1.0000"  # one seed: no interval


def test_spread():
    assert mean_spread([1, 3], 2) == "2.00 ± 1.41"
    assert mean_spread([1]) == "1.0000 ± ?"


def test_a_diverged_run_ends_no_table():
    assert mean_spread([math.nan, 1.0]) == mean_spread([1.0, math.nan]) == "nan ± ?"
    assert mean_spread([math.inf, 1.0]) == "inf ± ?" and mean_spread([1.0]) == "1.0000 ± ?"
    pytest.importorskip("scipy")
    gap = paired([math.nan, 1.0, 2.0], [0.0, 0.5, 1.0])
    assert math.isnan(gap["mean"]) and math.isnan(gap["p"]) and paired_text(gap) == "+nan"
