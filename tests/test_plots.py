"""The figures that no other test draws name and colour their variants; docs/results/gpu.md has the
tables of h200.py."""

import os
import re

import figures
import findings
import h200
import induction
import pytest
from questions import drawn

NAMES = ["baseline", "self", "past", "key-shift"]


def of_findings(plt):
    return findings.plot(
        plt, {name: [dict(curve=[0.1, 0.9]), dict(curve=[0.1, 0.8])] for name in NAMES[1:]},
        {name: dict(seeds=[0, 1, 2][i // 3:], val_loss=[3 + i, 4 + i, 5 + i][i // 3:])
         for i, name in enumerate(NAMES)}), NAMES


def of_induction_over_time(plt):
    runs = {name: [dict(all=(3.0, 3.0 - i / 9), repeated=(2.0, 0.5), copying=(i / 9, 0.1))]
            for i, name in enumerate(NAMES)}
    return induction.plot_steps(plt, {1000: runs, 2000: runs}), NAMES


def of_h200(plt):
    found = h200.runs(h200.read())
    return h200.plot(plt, found), [variant for variant, _ in found]


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("draw", [of_findings, of_induction_over_time, of_h200])
def test_names_and_colours_are_in_the_figure(draw, tmp_path):
    import matplotlib.pyplot as plt

    figure, names = draw(plt)
    figures.write(figure, tmp_path / "figure.svg")
    drawn(tmp_path / "figure.svg", names)


def test_the_gpu_pages_tables_are_the_scripts():
    with open(os.path.join(h200.ROOT, "docs", "results", "gpu.md"), encoding="utf-8") as f:
        tables = re.findall(r"(?:^\|.*\n)+", f.read(), re.M)
    assert [table.rstrip() for table in tables] == h200.tables(h200.read())


def test_a_kernel_counts_once_and_all_of_a_step_is_there():
    for line in h200.read()["speed"]:
        if line["name"] in ("baseline", "self", "past", "cross"):
            groups = h200.grouped(line)
            assert sum(ms for ms, _ in groups.values()) == pytest.approx(
                sum(ms for ms, _, _ in line["kernels"]))
            assert groups["attention, forward"][1] == (6 if line["name"] == "baseline" else 18)
