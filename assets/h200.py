"""
What two H200 measured: the tables of docs/results/gpu.md, printed, and assets/h200.svg, both from
docs/results/h200.jsonl.

    python assets/h200.py
"""

import json
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "experiments"))
import figures  # noqa: E402

from common import pyplot  # noqa: E402

from nanonexus.cli import Parser, run_script  # noqa: E402

RESULTS = os.path.join(ROOT, "docs", "results", "h200.jsonl")
NAMES = {"key-shift": "key shift", "nanogpt": "nanoGPT's model", "neox": "transformers' GPT-NeoX",
         "self": "`self`", "past": "`past`", "cross": "`cross`", "shared": "`shared`",
         "separate": "`separate`",
         "cross,documents": "`cross`, FlexAttention with document masks"}
# Row of the time table: a part of the names of its kernels. The first that matches counts.
KERNELS = {"attention, backward": "_bprop_", "attention, forward": "_fprop_",
           "attention, row sums of its gradient": "compute_dot_do_o",
           "matrix products": "nvjet", "softmax of the loss and its gradient": "log_softmax",
           "GELU and its gradient": "gelu", "rotary embedding and sums": "triton_"}


def read(path=RESULTS):
    """{kind: the lines of that kind} of this file, or one of experiments/gpu.py."""
    kinds = {}
    with open(path, encoding="utf-8") as f:
        for line in map(json.loads, f):
            kinds.setdefault(line["kind"], []).append(line)
    return kinds


def runs(kinds):
    """{(variant, seed): {kind: its lines}} of the trained models, copying in order of tokens."""
    found = {}
    for kind in ("curve", "copying", "scores"):
        for line in sorted(kinds.get(kind, []), key=lambda line: line.get("tokens", 0)):
            variant, _, seed = line["run"].rpartition("-")
            run = found.setdefault((variant, int(seed)), dict(copying=[], scores=[]))
            run.setdefault(kind, []).append(line)
    return found


def difference(found, run):
    """{tokens: validation loss minus that of the baseline with the same seed} of a run."""
    (one,), (other,) = found[run]["curve"], found["baseline", run[1]]["curve"]
    base = dict(other["val"])
    return {step * one["tokens_per_step"]: loss - base[step] for step, loss in one["val"]}


def row_of(run, *cells):
    """A row of a table: the variant, the seed, the cells."""
    return [NAMES.get(run[0], run[0]), str(run[1]), *cells]


def markdown(rows):
    """Rows of cells, the first the heading, as a Markdown table."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def correct(found):
    """The largest relative error of each kind."""
    def worst(*parts):
        values = [v for name, v in found.items() if all(part in name for part in parts)]
        return f"{max(values):.1e}"

    return [["largest relative error", "float32", "bfloat16"],
            ["attention's output", "", worst("attend", "output")],
            ["attention's gradient", "", worst("attend", "gradient")],
            *([f"the model's {name}", worst(key, "bf16=False"), worst(key, "bf16=True")]
              for name, key in (("loss", "loss order"), ("gradients", "gradients order")))]


def rates(found):
    """TFLOP/s of each attention kernel from its times: 32 windows of 2,048, 8 heads of 64."""
    flops = 4 * 32 * 8 * 2048**2 * 64 / 2  # forward, of the causal half; backward is 2.5 times that
    rows = [["TFLOP/s", "forward", "backward", "strict, forward", "strict, backward"]]
    for kernel in ("cudnn", "flash", "efficient"):
        times = [found[f"{kernel} strict={strict} ms"] for strict in (0, 1)]
        rows.append([kernel, *(f"{flops * more / ms / 1e9:.0f}" for pair in times
                               for ms, more in zip(pair, (1, 2.5), strict=True))])
    return rows


def grouped(line):
    """{row of the time table: (ms, calls)} of a model's kernels."""
    groups = dict.fromkeys(KERNELS, (0.0, 0.0))
    for ms, calls, name in line["kernels"]:
        row = next(row for row, part in KERNELS.items() if part in name)
        groups[row] = groups[row][0] + ms, groups[row][1] + calls
    return groups


def attention_ms(line):
    """Milliseconds of a step in attention kernels, FlexAttention's among them."""
    return sum(ms for ms, _, name in line["kernels"]
               if any(part in name for part in ("_bprop_", "_fprop_", "dot_do_o", "flex_att")))


def speed(lines):
    base = next(line for line in lines if line["name"] == "baseline")
    rows = [["model", "ms (quartiles)", "speed", "first quartiles", "by FLOPs", "MFU",
             "peak GiB", "attention ms"]]
    for line in sorted(lines, key=lambda line: line["ms_quartiles"][0]):
        low, high = line["ms_quartiles"]
        rows.append([NAMES.get(line["name"], line["name"]), f"{line['ms']:.1f} ({low:.1f} to "
                     f"{high:.1f})", f"{base['ms'] / line['ms']:.3f}",
                     f"{base['ms_quartiles'][0] / low:.3f}",
                     f"{base['flops_per_token'] / line['flops_per_token']:.3f}",
                     f"{100 * line['mfu']:.1f}%", f"{line['peak_gib']:.1f}",
                     f"{attention_ms(line):.1f}"])
    return rows


def time_of(lines):
    """Where a step's time goes: ms (calls) of the kernels in the file, then what is left."""
    lines = {line["name"]: line for line in lines}
    names = ["baseline", "self", "past", "cross"]
    groups = {name: grouped(lines[name]) for name in names}
    rows = [["ms of a step (kernel calls)", *(NAMES.get(name, name) for name in names)]]
    for row in KERNELS:
        cells = (groups[name][row] for name in names)
        rows.append([row, *(f"{ms:.1f} ({calls:.0f})" if calls else "" for ms, calls in cells)])
    listed = {name: sum(ms for ms, _ in groups[name].values()) for name in names}
    rows.append(["the 17th to 25th longest kernel",
                 *(f"{lines[name]['busy_ms'] - listed[name]:.1f}" for name in names)])
    rows.append(["shorter kernels, and the GPU waiting",
                 *(f"{lines[name]['ms'] - lines[name]['busy_ms']:.1f}" for name in names)])
    return rows + [["a step", *(f"{lines[name]['ms']:.1f}" for name in names)]]


def trained(found):
    rows = [["", "seed", "steps", "validation loss", "minus baseline", "repeated", "changed", "new",
             "copying head", "random, repeated"]]
    for run, lines in found.items():
        step, loss = lines["curve"][0]["val"][-1]
        gap = [*difference(found, run).values()][-1]
        last = lines["copying"][-1] if lines["copying"] else None
        rows.append(row_of(
            run, f"{step:,}", f"{loss:.4f}", "" if run[0] == "baseline" else f"{gap:+.3f}",
            *(f"{last[part]:.3f}" if last else "" for part in ("repeated", "changed", "new")),
            f"{last['head']:.2f}" if last else "", f"{last['twice']:.1f}" if last else ""))
    return rows


def scored(found):
    tasks = {"sciq": "SciQ", "arc_easy": "ARC-Easy", "piqa": "PIQA"}
    rows = [["accuracy, normalised, in %", "seed", *tasks.values()]]
    for run, lines in found.items():
        for of in (line["tasks"] for line in lines["scores"]):
            rows.append(row_of(run, *(f"{100 * of[t]['acc']:.1f}, {100 * of[t]['acc_norm']:.1f}"
                                      if t in of else "" for t in tasks)))
    of = found["baseline", 1]["scores"][0]["tasks"]
    return rows + [["questions (standard error of an accuracy)", "",
                    *(f"{of[t]['n']:,} ({100 * of[t]['se']:.1f})" for t in tasks)]]


def over_tokens(found):
    """The copying head, the differences in loss, the norms of the gradient, over tokens."""
    heads = {run: [(line["tokens"], line["head"]) for line in lines["copying"]]
             for run, lines in found.items() if lines["copying"]}
    yield [["copying head after", "seed", *(f"{n / 1e6:.0f}M" for n, _ in heads["baseline", 0])],
           *(row_of(run, *(f"{y:.2f}" for _, y in points)) for run, points in heads.items())]
    curves = {run: difference(found, run) for run in found if run[0] != "baseline"}
    at = [step * 65536 for step in (100, 300, 500, 700, 1000, 1400, 1700)]
    yield [["loss minus baseline after", "seed", *(f"{n / 1e6:.0f}M" for n in at)],
           *(row_of(run, *(f"{points[n]:+.3f}" for n in at)) for run, points in curves.items())]
    norms = {run: dict(lines["curve"][0].get("norms", ())) for run, lines in found.items()}
    at = [20, 100, 200, 300, 400, 600, 1000, 1400, 1740]
    yield [["norm of the gradient at step", "seed", *(f"{step:,}" for step in at)],
           *(row_of(run, *(f"{points[step]:,.2f}" for step in at))
             for run, points in norms.items() if points)]


def tables(kinds):
    """Every table of the page, as Markdown, in its order."""
    found, checks = runs(kinds), kinds["parity"][0]["found"]["found"]
    return [markdown(rows) for rows in (
        correct(checks), speed(kinds["speed"]), time_of(kinds["speed"]), rates(checks),
        trained(found), scored(found), *over_tokens(found))]


def plot(plt, found):
    """The validation loss minus the baseline's with each seed, the strongest copying head, and the
    norms of the gradients, over tokens; found: as runs gives it."""
    figure, panels = plt.subplots(2, 2, figsize=(figures.WIDTH, 5.6))
    (seed0, seed1), (copying, gradient) = panels
    ends = {panel: {} for panel in panels.flat}

    def draw(panel, run, points, name, **how):
        x, y = zip(*((tokens / 1e6, value) for tokens, value in points), strict=True)
        panel.plot(x, y, **figures.style(run[0]), **how)
        high = panel.get_ylim()[1] if panel is seed1 else math.inf
        if y[-1] > high:  # where it is, beyond the panel
            name += f", {y[-1]:+.2f}"
        ends[panel][name] = x[-1], min(y[-1], high)

    seed0.set(title="validation loss minus the baseline's, seed 0", ylim=(-0.16, 0.16),
              ylabel="nats per token (lower is better)")
    seed1.set(title="the same, seed 1", ylim=(-0.16, 0.16))
    copying.set(title="strongest copying head, seed 0", ylabel="share of its attention")
    gradient.set(title="norm of the gradient, seed 1", yscale="log", ylabel="before clipping to 1")
    for run, lines in found.items():
        name, one = run[0], lines["curve"][0]
        draw(seed1 if run[1] else seed0, run, [*difference(found, run).items()][1:], name)
        if run[1] == 0:
            draw(copying, run, [(line["tokens"], line["head"]) for line in lines["copying"]], name,
                 marker="o", ms=3)
        if "norms" in one:
            draw(gradient, run, [(step * one["tokens_per_step"], norm)
                                 for step, norm in one["norms"]], name)
    uniform = found["baseline", 0]["copying"][0]["uniform"]
    copying.axhline(uniform, color="#666666", lw=0.8, ls=figures.DASHED)
    copying.annotate("uniform attention", (1, uniform), xytext=(3, 3), textcoords="offset points",
                     fontsize=8, color="#666666")
    copying.set(ylim=(0, None))
    for panel, end in ends.items():
        panel.set(xlabel="million tokens", xlim=(0, None), xticks=range(0, 101, 25))
        figures.name_lines(panel, end)
    return figure


def main():
    Parser(__doc__).parse_args()
    kinds = read()
    print("\n\n".join(tables(kinds)))
    figure = plot(pyplot(os.path.dirname(os.path.abspath(__file__))), runs(kinds))
    figure.tight_layout()
    figures.write(figure, os.path.join(ROOT, "assets", "h200.svg"))


if __name__ == "__main__":
    run_script(main)
