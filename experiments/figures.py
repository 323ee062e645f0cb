"""
How all figures look: a colour for each variant, labels on the lines, and reproducible SVG.

A variant has one colour and one dash in every figure of this project. The colour says what the
inner map is, the dash which streams it refines: solid for queries and keys, dashed for keys alone,
dotted for queries alone, dash-dotted for a third order. The colours are mostly those of Okabe and
Ito (2008) and stay distinct under red-green colour blindness, see tests/test_figures.py. Lines are
labelled directly: a legend would have to be matched by colour.
"""

import math
import statistics

SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5))

DASHES = {"k": DASHED, "q": DOTTED, "3": DASH_DOT}  # how a name ends
ADDED = "#00dd66"  # of an inner step or a control that has no colour here
STYLES = {  # variant: its colour, its dash; others have their inner step's and their ending's
    "baseline": ("#000000", SOLID),
    "two-layers": ("#606060", DOTTED), "two-layers-small": ("#606060", (0, (5, 1, 1, 1, 1, 1))),
    "two-layers-fan-in": ("#606060", (0, (8, 2))), "key-shift-0.02": ("#cc79a7", (0, (8, 2))),
    "key-shift-0.12": ("#cc79a7", (0, (1, 4))), "key-shift-0.95": ("#cc79a7", (0, (8, 2, 1, 2))),
    "deeper": ("#606060", DASHED), "larger": ("#606060", (0, (8, 1, 1, 1))),
    "longer": ("#606060", DASH_DOT),
    "mean": ("#000000", DASHED), "bias": ("#000000", DASH_DOT),
    "self": ("#d55e00", SOLID), "past": ("#0072b2", SOLID), "cross": ("#009e73", SOLID),
    "shared": ("#e69f00", SOLID), "separate": ("#99cc33", SOLID), "tokens": ("#7f00ff", SOLID),
    "tokens-residual": ("#7f00ff", (0, (8, 2))), "mix": ("#7f00ff", (0, (1, 4))),
    "self-residual": ("#d55e00", (0, (8, 2))), "self-strict": ("#d55e00", (0, (1, 4))),
    "cross-residual": ("#009e73", (0, (8, 2))), "cross-strict": ("#009e73", (0, (1, 4))),
    "cross-plain": ("#009e73", (0, (8, 2, 1, 2))),
    "near": ("#990000", SOLID), "near-k": ("#990000", DASHED),
    "near-gated": ("#990000", DOTTED), "near-gated-k": ("#990000", DASH_DOT),
    "key-shift": ("#cc79a7", SOLID), "kv-shift": ("#cc79a7", DASHED),
    "canon": ("#cc79a7", DASH_DOT), "shift-longer": ("#cc79a7", DOTTED),
    "shift-past-k": ("#56b4e9", SOLID), "shift-past": ("#56b4e9", DASHED),
    "shift-cross-k": ("#56b4e9", DASH_DOT),
    "mlp": ("#332288", SOLID), "mlp-1.5x": ("#332288", DASHED), "mlp-4x": ("#332288", DASH_DOT),
    "free": ("#332288", DOTTED),
}
WIDTH = 7.5  # inches, 540 points: at 600 pixels a text of 9 points is 10 pixels high
STYLE = {  # matplotlib's settings
    "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text stays text: small, searchable files
    "svg.hashsalt": "nanonexus",  # ids that do not change from run to run
}


def style(variant):
    """The colour and dash of a variant, as keywords of plot."""
    inner, _, end = variant.rpartition("-")
    color, dash = STYLES.get(variant) or (STYLES.get(inner, (ADDED,))[0], DASHES.get(end, SOLID))
    return dict(color=color, ls=dash)


def name_lines(panel, ends, gap=0.065):
    """Write each variant's name to the right of its line's end, joined by a thin line.

    ends: {variant: (x, y)}, in data coordinates; a comma and more may follow a variant's name. gap:
    the least distance between two names, as a fraction of the panel's height. Call it when all is
    drawn: limits and scales must be final.
    """
    ends = {name: end for name, end in ends.items() if all(map(math.isfinite, end))}  # diverged
    panel.get_xlim(), panel.get_ylim()  # finalises the limits, which are computed lazily
    to_share = panel.transData + panel.transAxes.inverted()
    at = sorted((to_share.transform(end)[1], name) for name, end in ends.items())
    heights = [y for y, _ in at]
    for _ in range(200):  # push neighbours apart until none overlap
        for i in range(len(heights) - 1):
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 1e-6:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
        low, high = min(heights, default=0), max(heights, default=0)
        shift = max(0, -low) - max(0, high - 1)  # back into the panel, if all of them fit there
        heights = [y + shift for y in heights] if high - low <= 1 else heights
    for height, (_, name) in zip(heights, at, strict=True):
        color = style(name.split(",")[0])["color"]
        panel.annotate(name, ends[name], xytext=(1.06, height), textcoords="axes fraction",
                       color=color, va="center", fontsize=8, annotation_clip=False,
                       arrowprops=dict(arrowstyle="-", color=color, lw=0.5, alpha=0.6,
                                       shrinkA=0, shrinkB=0))


def name_rows(panel, names):
    """A row for each variant, from the top, with its name at the left in its colour."""
    panel.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    panel.set_yticklabels(names)
    for label, name in zip(panel.get_yticklabels(), names, strict=True):
        label.set_color(style(name)["color"])


def apart(y, n):
    """n heights slightly apart around y, so that equal values of n seeds stay visible."""
    return [y + 0.5 * ((i + 0.5) / n - 0.5) for i in range(n)]


def mean_bar(panel, y, variant, values):
    """A bar as long as the mean, a dot for each seed's value."""
    color = style(variant)["color"]
    panel.barh(y, statistics.mean(values), 0.6, color=color, alpha=0.35)
    panel.plot(values, [y] * len(values), "o", ms=3, color=color)


def seed_strips(panel, rows, limit, never="never"):
    """A row for each variant, a dot for each seed: where something happened, or that it never did.

    rows: {variant: a list with a number, or None for never, per seed}; limit: the largest number.
    The dots of a row are set slightly apart, so that equal ones stay visible.
    """
    names = list(rows)
    for i, (name, values) in enumerate(rows.items()):
        color = style(name)["color"]
        for value, y in zip(values, apart(i, len(values)), strict=True):
            missing = value is None
            panel.plot(1.12 * limit if missing else value, y, "o", ms=3.6, mew=0.8,
                       mec=color, mfc="none" if missing else color, clip_on=False)
    panel.axvline(1.03 * limit, color="#999999", lw=0.6)
    panel.set(xlim=(0, 1.2 * limit))
    ticks = [0, limit // 4, limit // 2, 3 * limit // 4]
    panel.set_xticks([*ticks, 1.12 * limit], [*map(str, ticks), never])
    name_rows(panel, names)


def write(figure, path):
    """Save figure as an SVG that depends on nothing but what it shows (no date, no random ids)."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
