"""The statistics are the textbook's."""

import math

import pytest

from nanonexus.stats import mcnemar, stderr


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar([1] * 5, [1] * 5) == 1.0
    assert mcnemar([1] * 10 + [0] * 2, [0] * 10 + [1] * 2) == pytest.approx(2 * 79 / 4096)
    assert mcnemar([1] * 8, [0] * 8) == 2 / 256
    assert mcnemar([1, 0], [0, 1]) == 1.0
    assert math.isnan(stderr([1.0]))
