"""
What one H200 measured: the tables of docs/results/gpu.md, printed, and assets/h200.svg, both from
docs/results/h200.jsonl.

    python assets/h200.py
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "experiments"))
import figures  # noqa: E402

from common import pyplot  # noqa: E402

from nanonexus.cli import Parser, run_script  # noqa: E402

RESULTS = os.path.join(ROOT, "docs", "results", "h200.jsonl")
NAMES = {"key-shift": "key shift", "nanogpt": "nanoGPT's model", "neox": "transformers' GPT-NeoX",
         "self": "`self`", "past": "`past`", "cross": "`cross`",
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
    """{variant: {kind: its lines}} of the training runs, the copying ones in order of tokens."""
    found = {}
    for kind in ("curve", "copying", "scores"):
        for line in sorted(kinds[kind], key=lambda line: line.get("tokens", 0)):
            variant = line["run"].rpartition("-")[0]
            found.setdefault(variant, {}).setdefault(kind, []).append(line)
    return found


def difference(run, base):
    """[(tokens, validation loss minus the baseline's)] at every validation of two runs."""
    (one,), (other,) = run["curve"], base["curve"]
    return [(step * one["tokens_per_step"], loss - start) for (step, loss), (_, start)
            in zip(one["val"], other["val"], strict=True)]


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
    rows = [["", "validation loss", "minus baseline", "repeated", "changed", "new",
             "copying head", "random, repeated"]]
    for name, run in found.items():
        last = run["copying"][-1]
        rows.append([NAMES.get(name, name), f"{run['curve'][0]['val'][-1][1]:.4f}",
                     f"{difference(run, found['baseline'])[-1][1]:+.3f}"
                     if name != "baseline" else "",
                     *(f"{last[part]:.3f}" for part in ("repeated", "changed", "new")),
                     f"{last['head']:.2f}", f"{last['twice']:.1f}"])
    return rows


def scored(found):
    tasks = {"sciq": "SciQ", "arc_easy": "ARC-Easy", "piqa": "PIQA"}
    rows = [["accuracy, normalised, in %", *tasks.values()]]
    for name, run in found.items():
        of = run["scores"][0]["tasks"]
        rows.append([NAMES.get(name, name), *(
            f"{100 * of[t]['acc']:.1f}, {100 * of[t]['acc_norm']:.1f}" for t in tasks)])
    of = found["baseline"]["scores"][0]["tasks"]
    return rows + [["questions (standard error of an accuracy)",
                    *(f"{of[t]['n']:,} ({100 * of[t]['se']:.1f})" for t in tasks)]]


def over_tokens(found):
    """The copying head, then the differences in loss, after so many million tokens."""
    heads = {name: [(line["tokens"], line["head"]) for line in run["copying"]]
             for name, run in found.items()}
    yield [["copying head after", *(f"{n / 1e6:.0f}M" for n, _ in heads["baseline"])],
           *([NAMES.get(name, name), *(f"{y:.2f}" for _, y in points)]
             for name, points in heads.items())]
    curves = {name: [difference(run, found["baseline"])[i] for i in (1, 3, 5, 7, 10, 14, -1)]
              for name, run in found.items() if name != "baseline"}
    yield [["loss minus baseline after", *(f"{n / 1e6:.0f}M" for n, _ in curves["self"])],
           *([NAMES.get(name, name), *(f"{y:+.3f}" for _, y in points)]
             for name, points in curves.items())]


def tables(kinds):
    """Every table of the page, as Markdown, in its order."""
    found, checks = runs(kinds), kinds["parity"][0]["found"]["found"]
    return [markdown(rows) for rows in (
        correct(checks), speed(kinds["speed"]), time_of(kinds["speed"]), rates(checks),
        trained(found), scored(found), *over_tokens(found))]


def plot(plt, found):
    """Left the validation loss minus the baseline's, right the strongest copying head, over tokens;
    found: as runs gives it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.9))
    ends = [{}, {}]
    for name, run in found.items():
        heads = [(line["tokens"], line["head"]) for line in run["copying"]]
        for panel, points, end, marker in ((left, difference(run, found["baseline"])[1:], ends[0],
                                            None), (right, heads, ends[1], "o")):
            x, y = zip(*((tokens / 1e6, value) for tokens, value in points), strict=True)
            panel.plot(x, y, marker=marker, ms=3, **figures.style(name))
            end[name] = x[-1], y[-1]
    uniform = found["baseline"]["copying"][0]["uniform"]
    right.axhline(uniform, color="#666666", lw=0.8, ls=figures.DASHED)
    right.annotate("uniform attention", (1, uniform), xytext=(3, 3), textcoords="offset points",
                   fontsize=8, color="#666666")
    left.set(title="validation loss minus the baseline's (lower is better)",
             ylabel="nats per token", yticks=[-0.15, -0.1, -0.05, 0, 0.05])
    right.set(title="strongest copying head", ylabel="share of its attention", ylim=(0, None))
    for panel, end in zip((left, right), ends, strict=True):
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
