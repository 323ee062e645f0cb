"""
Statistics of comparisons, all of them paired.

Means are compared by one rule: differences are paired where seeds (or documents) are shared, and
given with their 99% t interval, which excludes 0 if p < 0.01. No seed is dropped, and no best one
is chosen. RESULTS.md says what is claimed, and how lookups and accuracies are compared.
"""

import math
import statistics


def stdev(values):
    """The sample standard deviation; nan for a single value, or if one has diverged."""
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if finite else math.nan


def stderr(values):
    """Standard error of the mean, from the sample standard deviation."""
    return stdev(values) / math.sqrt(len(values))


def mcnemar(a, b):
    """Two-sided exact p-value that two lists of hits differ by chance: the documents that one model
    alone got right are, if the models are equal, coin tosses (McNemar 1947)."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def mean_spread(values, digits=4):
    """"mean ± standard deviation" over seeds."""
    deviation = stdev(values)
    spread = "?" if math.isnan(deviation) else f"{deviation:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {spread}"


def paired(values, base):
    """values minus base, paired by seed: dict(mean, low, high, p), the bounds of the 99% t interval
    and the two-sided p of a paired t test; bounds and p are NaN with fewer than three seeds, as
    --quick has, or if a run has diverged."""
    from scipy import stats

    gaps = [v - b for v, b in zip(values, base, strict=True)]
    mean = statistics.mean(gaps)
    if len(gaps) < 3 or not stdev(gaps) > 0:
        return dict(mean=mean, low=math.nan, high=math.nan, p=math.nan)
    low, high = stats.t.interval(0.99, len(gaps) - 1, loc=mean, scale=stats.sem(gaps))
    return dict(mean=mean, low=low, high=high, p=stats.ttest_1samp(gaps, 0).pvalue)


def holm(ps):
    """p-values corrected for how many they are (Holm 1979): of n, the i-th smallest times n - i,
    counted from 0, and none below a smaller one's. NaN stays NaN and is not counted."""
    corrected, largest = list(ps), 0.0
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        corrected[i] = largest = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected


def paired_text(gap, digits=4):
    """A difference, its 99% interval and p; marked * where it may be claimed."""
    if math.isnan(gap["p"]):
        return f"{gap['mean']:+.{digits}f}"
    mark = " *" if gap["p"] < 0.01 else ""
    return (f"{gap['mean']:+.{digits}f} [{gap['low']:+.{digits}f}, {gap['high']:+.{digits}f}] "
            f"p={gap['p']:.2g}{mark}")
