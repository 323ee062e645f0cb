"""Each experiment draws its figure from a small result: every variant has its name, and its colour
and dash, in the SVG."""

import os
import re
import types

import compare
import figures
import findings
import h200
import induction
import pytest
import rank
import recall
import retrofit
import spectrum
import stability

NAMES = ["baseline", "self", "past", "key-shift"]


def of_compare(plt):
    return compare.plot(plt, {name: dict(
        seeds=[0, 1], flops_per_token=7e6, tokens=[0, 1000, 2000],
        curves=[[5, 4 - i / 9, 3 - i / 9], [5, 4.1 - i / 9, 3.1 - i / 9]])
        for i, name in enumerate(NAMES)}, "a title", "byte"), NAMES


def of_recall(plt):
    return recall.plot(plt, {task: {name: [
        dict(steps=400, curve=[0.1] * 10 + [0.95] * 10), dict(steps=400, curve=[0.1] * 20)]
        for name in NAMES} for task in ("one-hop", "gapped", "two-hops")}), NAMES


def of_rank(plt):
    names = ["baseline", "self", "past", "mlp"]
    results = {d: {name: {d // 2: [0.3 + i, 0.2 + i], 2 * d: [0.6 + i, 0.5 + i]}
                   for i, name in enumerate(names)} for d in (8, 16)}
    return rank.plot(plt, {"causal": results}), names


def of_findings(plt):
    return findings.plot(
        plt, {name: [dict(curve=[0.1, 0.9]), dict(curve=[0.1, 0.8])] for name in NAMES[1:]},
        {name: dict(seeds=[0, 1, 2][i // 3:], val_loss=[3 + i, 4 + i, 5 + i][i // 3:])
         for i, name in enumerate(NAMES)}), NAMES


def of_induction(plt):
    shares = {"all": 1.0, "repeated": 0.2, "new": 0.8}
    return induction.plot(plt, {name: [{part: (3.0, share * (3 + i / 9)) for part, share in
                                        shares.items()}] * 2 for i, name in enumerate(NAMES)},
                          shares), NAMES[1:]


def of_induction_over_time(plt):
    runs = {name: [dict(all=(3.0, 3.0 - i / 9), repeated=(2.0, 0.5), copying=(i / 9, 0.1))]
            for i, name in enumerate(NAMES)}
    return induction.plot_steps(plt, {1000: runs, 2000: runs}), NAMES


def of_spectrum(plt):
    names = ["baseline", "self", "past"]
    results = {name: [dict(spectra=[[1.0, 0.1 / i, 0.01]], rows={"effective rank": [9.0 - i, 8.0]},
                           shares={8: (0.5, 0.1 * i), 16: (0.4, 0.2)} if i > 1 else {8: None})]
               for i, name in enumerate(names, 1)}
    start = {("self", 16): {8: [(0.5, 0.1)], 16: [(0.4, 0.1)]}}
    return spectrum.plot(plt, results, start, [8, 16]), names


def of_stability(plt):
    args = types.SimpleNamespace(orders=[1, 2], depths=[2], lrs=[3e-3], steps=9)
    starts = {f"{form} {m} depth 2": [[[1.0 / m, 0.5 / m, 0.9]] * 2] * 2
              for form in stability.FORMS for m in args.orders}
    runs = {f"{form} {m} depth 2 lr 0.003": [dict(loss=2.5 + m + i, largest_logit=3.0 + i)] * 2
            for i, form in enumerate(stability.FORMS) for m in args.orders}
    return stability.plot(plt, starts, runs, args), stability.FORMS


def of_retrofit(plt):
    found = {("loss", name, None, None): dict(loss=2.0 + i) for i, name in enumerate(
        list(retrofit.CHANGES)[:3])}
    for i, name in enumerate(retrofit.VARIANTS):
        for seed in (0, 1):
            found["text", name, seed, 1e-4] = dict(
                loss=2.0 + i, gates=[[0.1 * i, 0.2]] * 3 if "gated" in name else [])
    results = types.SimpleNamespace(found=found, final=lambda part, variant: {
        key[2]: line for key, line in found.items() if key[:2] == (part, variant)})
    return retrofit.plot(plt, results), [name for name in retrofit.VARIANTS if name != "control"]


def of_h200(plt):
    found = h200.runs(h200.read())
    return h200.plot(plt, found), [variant for variant, _ in found]


@pytest.mark.parametrize("draw", [of_compare, of_recall, of_rank, of_findings, of_induction,
                                  of_induction_over_time,
                                  of_spectrum, of_stability, of_retrofit, of_h200])
def test_names_and_colours_are_in_the_figure(draw, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, names = draw(plt)
    figures.write(figure, tmp_path / "figure.svg")
    plt.close(figure)
    svg = (tmp_path / "figure.svg").read_text()
    assert "<image" not in svg  # lines and text alone
    for name in names:
        assert f">{name}<" in svg, f"no label says {name}"
        assert figures.style(name.removesuffix("-gated"))["color"] in svg, f"{name} has no line"
    for panel in figure.axes:
        if panel.axison and panel.lines:
            assert panel.get_title(), "a panel says what it shows"
            assert panel.get_xlabel() or figure._supxlabel


def test_losses_of_bytes_are_per_byte():
    figure, _ = of_compare(pytest.importorskip("matplotlib.pyplot"))
    assert "nats per byte" in figure.axes[0].get_ylabel()


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
