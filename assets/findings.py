"""
The README's picture of what was found, assets/findings.svg, from two experiments' results:

    python experiments/recall.py --tasks gapped-12 --results docs/results/recall.jsonl --show \\
        --out out/findings
    python experiments/compare.py --scale text --lrs 4e-3 --results docs/results/text.jsonl \\
        --variants baseline,self,shared,past,cross,tokens,key-shift,kv-shift,near-gated-k \\
        --show --out out/findings
    python assets/findings.py out/findings
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "experiments"))
import figures  # noqa: E402

from common import pyplot  # noqa: E402

from nanonexus.cli import Parser, run_script  # noqa: E402


def plot(plt, recall, text):
    """One task of recall.py, {variant: lines}, beside the variants of compare.py that are
    in text, {variant: row}; the baseline is the first. A dot per seed."""
    base, *_ = text
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 1 + 0.28 * len(text)),
                                         sharey=True)
    start = dict(zip(text[base]["seeds"], text[base]["val_loss"], strict=True))
    for y, (name, row) in enumerate(text.items()):
        shares = [line["curve"][-1] for line in recall.get(name, ())]
        left.plot(shares, figures.apart(y, len(shares)), "o", ms=3.6, clip_on=False,
                  color=figures.style(name)["color"])
        figures.mean_bar(right, y, name, [loss - start[seed] for seed, loss in zip(
            row["seeds"], row["val_loss"], strict=True) if seed in start])
    left.set(xlim=(0, 1.02), xlabel="accuracy (guessing: 0.2), right is better",
             title="lookup in one layer, 0 to 12 tokens between")
    right.axvline(0, color="#666666", lw=0.8)
    right.set(title="text: validation loss", xlabel=f"minus {base}, nats per token, left is better")
    figures.name_rows(left, list(text))
    most = max(len(row["seeds"]) for row in text.values())
    for y, row in enumerate(text.values()):
        if len(row["seeds"]) < most:
            right.annotate(f"{len(row['seeds'])} seeds", (1.02, y), ha="left",
                           xycoords=("axes fraction", "data"), va="center", fontsize=7,
                           color="#666666")
    return figure


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", help="where both commands wrote to")
    folder, results = parser.parse_args().folder, []
    for name in ("recall.json", "compare.json"):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            results.append(json.load(f)["results"])
    figure = plot(pyplot(os.path.join(ROOT, "assets")), results[0]["gapped-12"], results[1])
    figure.tight_layout()
    path = os.path.join(ROOT, "assets", "findings.svg")
    figures.write(figure, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
