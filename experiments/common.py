"""
What the experiments share: the way to the project's modules, statistics, tables and saved results.

One rule of statistics holds in all of them. Differences are paired where seeds are shared, given
with their 99% t interval, and claimed only where that interval excludes 0, that is at p < 0.01.
No seed is dropped and no best one chosen.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # the scripts here run from any folder

from data import UserError  # noqa: E402


def listed(kind):
    """The type of a flag that takes several: listed(int)("1,2") is [1, 2]."""
    return lambda text: [kind(x) for x in text.split(",")]


def mean_spread(values, digits=4):
    """"mean ± standard deviation" over seeds."""
    spread = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "?"
    return f"{statistics.mean(values):.{digits}f} ± {spread}"


def paired(values, base):
    """values minus base, paired by seed: dict(mean, low, high, p), the bounds of the 99% t interval
    and the two-sided p of a paired t test; bounds and p are NaN with a single seed."""
    from scipy import stats

    gaps = [v - b for v, b in zip(values, base, strict=True)]
    mean = statistics.mean(gaps)
    if len(gaps) < 2 or statistics.stdev(gaps) == 0:
        return dict(mean=mean, low=math.nan, high=math.nan, p=math.nan)
    low, high = stats.t.interval(0.99, len(gaps) - 1, loc=mean, scale=stats.sem(gaps))
    return dict(mean=mean, low=low, high=high, p=stats.ttest_1samp(gaps, 0).pvalue)


def paired_text(gap, digits=4):
    """A difference, its 99% interval and p; marked * where it may be claimed."""
    if math.isnan(gap["p"]):
        return f"{gap['mean']:+.{digits}f}"
    mark = " *" if gap["p"] < 0.01 else ""
    return (f"{gap['mean']:+.{digits}f} [{gap['low']:+.{digits}f}, {gap['high']:+.{digits}f}] "
            f"p={gap['p']:.2g}{mark}")


def table(rows):
    """Rows of cells, the first the heading, as aligned text."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
                     for row in rows)


def pydocs(folder):
    """The token set of the embedded text, bytes, in folder; prepared if it is not there yet."""
    if not os.path.exists(os.path.join(folder, "meta.json")):
        subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--dataset",
                        "pydocs", "--out", folder], check=True)
    return folder


def pyplot():
    """matplotlib's pyplot, drawing to files. Ask for it before the work: it may be missing."""
    try:
        import matplotlib
        import scipy  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(args, name, results, figure):
    """Write results with their settings and versions to OUT/name.json, the figure to name.png."""
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, name)
    figure.tight_layout()
    figure.savefig(path + ".png", dpi=120)
    with open(path + ".json", "w", encoding="utf-8") as f:
        json.dump(dict(settings=vars(args), results=results, versions=dict(
            python=platform.python_version(), torch=str(torch.__version__),
            machine=platform.processor() or platform.machine(), cores=os.cpu_count())), f, indent=1)
    print(f"wrote {path}.png and {name}.json")
