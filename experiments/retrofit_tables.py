"""
The tables and the figure of retrofit.py.

results: its Results. changes: the names of the retrofits without training, the original first.
variants: those of fine-tuning, the control among them.
"""

import statistics

import figures

from nanonexus.stats import mcnemar, mean_spread, paired, paired_text


def accuracies(line, base):
    """Of each task the accuracy; if there is a base line, minus its accuracy, and McNemar's p."""
    for task, hits in line.get("scores", {}).items():
        right = list(map(int, hits))
        text = f"{task} {statistics.mean(right):.3f}"
        if base and base is not line:
            other = list(map(int, base["scores"][task]))
            gap = statistics.mean(right) - statistics.mean(other)
            text += f" ({gap:+.3f}, p={mcnemar(other, right):.2g})"
        yield text


def change_rows(results, changes):
    """The table of the parts without training; differences in loss are paired by piece."""
    yield "at once", "loss", "minus the original [99% interval]", "accuracy"
    loss, scores = ({name: results.found[part, name, None, None] for name in changes
                     if (part, name, None, None) in results.found} for part in ("loss", "scores"))
    original = next(iter(changes))
    for name in changes:
        cells, line, base = ["", ""], loss.get(name), loss.get(original)
        if line:
            cells = [f"{line['loss']:.3f}",
                     paired_text(paired(line["losses"], base["losses"]), 3)
                     if base and line is not base else ""]
        if line or name in scores:
            yield (name, *cells, ", ".join(accuracies(scores.get(name, {}), scores.get(original))))


def run_rows(results, part, variants):
    """A row for each run, then the mean over the seeds; losses are paired by held-out example."""
    yield part, "seed", "lr", "loss", "minus control [99%]", "mean |gate|", "accuracy"
    control = results.final(part, "control")
    for variant in variants:
        means = []
        for seed, line in sorted(results.final(part, variant).items()):
            means.append(line["loss"])
            base = control.get(seed)
            gates = [abs(g) for layer in line["gates"] for g in layer]
            yield (variant, seed, f"{line['lr']:g}", f"{means[-1]:.4f}",
                   paired_text(paired(line["losses"], base["losses"]), 4)
                   if base and base is not line else "",
                   f"{statistics.mean(gates):.3f}" if gates else "",
                   ", ".join(accuracies(line, base)))
        if len(means) > 1:
            yield variant, "mean", "", mean_spread(means), "", "", ""


def plot(plt, results, changes, variants):
    """Loss at once, loss after training on text minus the control's, and the gates by layer."""
    figure, (at_once, after, layers) = plt.subplots(1, 3, figsize=(figures.WIDTH, 3.6))

    def rows(panel, names, **labels):
        panel.set(yticks=range(len(names)), ylim=(max(1, len(names)) - 0.5, -0.5), **labels)
        panel.set_yticklabels(names)

    shown = {name: line for name in changes if "gate" not in name and "order 3" not in name
             and (line := results.found.get(("loss", name, None, None)))}
    for y, (name, line) in enumerate(shown.items()):
        at_once.barh(y, line["loss"], 0.6, alpha=0.6,
                     color=figures.style(name.split()[0])["color"])
    rows(at_once, shown, title="at once", xlabel="loss (nats per token), lower is better")
    control = results.final("text", "control")
    names = [name for name in variants if name != "control" and results.final("text", name)]
    for y, name in enumerate(names):
        lines, look = results.final("text", name), figures.style(name.removesuffix("-gated"))
        gaps = [statistics.mean(line["losses"]) - statistics.mean(control[seed]["losses"])
                for seed, line in lines.items() if seed in control]
        after.plot(gaps, [y] * len(gaps), "o", ms=4, color=look["color"])
        by_layer = [[statistics.mean(layer) for layer in line["gates"]] for line in lines.values()]
        if by_layer[0]:
            layers.plot([statistics.mean(at) for at in zip(*by_layer, strict=True)], label=name,
                        **look)
    after.axvline(0, color="#666666", lw=0.8)
    rows(after, names, title="after training on text", xlabel="loss minus the control's")
    layers.set(title="learnt gates", xlabel="layer")
    if layers.lines:
        layers.legend(fontsize=7)
    return figure
