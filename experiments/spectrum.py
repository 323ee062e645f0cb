"""
What does attention look like inside trained models: what rank, what entropy, what did Nexus move?

    python experiments/spectrum.py --out out/spectrum              # of compare.py's models, 3 seeds
    python experiments/spectrum.py --runs out/compare --dataset out/compare/pydocs
    python experiments/spectrum.py --quick

On windows of validation text, for each layer and head, in float64:

- the singular values of log-attention. Taken from the block of late rows and early columns, which
  no causal mask touches, each row centred (softmax ignores a row's constant). Effective rank: the
  exponential of the entropy of the normalised squares. A head's log-attention has rank <= D + 1 by
  construction, at every order; what differs is how much of it is used.
- the log-rank condition where it can fail: the attention of a whole layer, the mean over its heads.
  Could one head of width D have produced it? Yes if the rank of its log is at most D; the rank is
  counted at the tolerance --tol, relative to the largest singular value.
- the share of log-attention outside the span of the layer's inputs, which is what X W_q W_k^T X^T
  can reach. Rotary takes the baseline out of it too, so that is the figure to compare with.
- the entropy of inner and outer attention, as a share of a uniform row's; the weight that an inner
  step leaves on its own token; the cosine between a query or key and what it was refined into.
"""

import glob
import os
import subprocess
import sys

import torch
from tqdm import tqdm

from common import ROOT, mean_spread, paired, paired_text, pyplot, save, table

from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import Parser, UserError, run_script
from nanonexus.data import TokenSet, batch, val_indices, windows

COLUMNS = ["effective rank", "outside span", "rank of layer", "rank <= D", "outer entropy",
           "inner q entropy", "inner k entropy", "own token, q", "own token, k", "cosine q",
           "cosine k"]


def watch(attention, seen):
    """Let one Attention module write its input and each refined stream into `seen`."""
    refine = attention.refine

    def recorded(s, env):
        h = refine(s, env)
        seen["refined"].append((s, h))
        return h

    attention.refine = recorded
    attention.register_forward_pre_hook(lambda module, inputs: seen["x"].append(inputs[0]))


def block(weights):
    """Row-centred log-attention of the late half's rows, the early half's columns: (..., t, t)."""
    half = weights.size(-1) // 2
    log = weights[..., half:, :half].log()
    return log - log.mean(-1, keepdim=True)


def effective_rank(singular):
    """exp of the entropy of sigma_i^2 / sum sigma^2 (Roy and Vetterli 2007); singular (..., n)."""
    p = singular.square() / singular.square().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def outside_span(log, x):
    """Share of log's squared norm that no x_late M x_early^T reaches; log (B, H, t, t)."""
    half = x.size(1) // 2

    def basis(rows):  # with a constant column: the biases of W_q and W_k
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        U, S, _ = torch.linalg.svd(rows, full_matrices=False)
        return (U * (S > 1e-10 * S[..., :1])[..., None, :])[:, None]  # (B, 1, t, rank)

    left, right = basis(x[:, half:]), basis(x[:, :half])
    reached = left.mT @ log @ right
    return 1 - reached.square().sum((-2, -1)) / log.square().sum((-2, -1))


def entropy(weights):
    """Mean entropy of the rows of (..., T, T), relative to uniform; the first row has no choice."""
    T = weights.size(-1)
    uniform = torch.arange(1, T + 1, dtype=weights.dtype).log()
    return (torch.special.entr(weights).sum(-1)[..., 1:] / uniform[1:]).mean(-1)


@torch.no_grad()
def measure(path, idx, tol):
    """{column: (layers,) list}, and the mean normalised spectrum per layer, of one checkpoint."""
    model, _ = load_checkpoint(path, attention="manual")
    c, model = model.config, model.double()
    H, D, loops = c.n_head, c.n_embd // c.n_head, c.nexus_order - 1
    seen, rows, maps = dict(x=[], refined=[]), {name: [] for name in COLUMNS}, []
    for layer in model.blocks:
        watch(layer.attn, seen)
    model(idx, maps=maps)
    spectra = []
    for layer in range(c.n_layer):
        *inner, outer = maps[layer * (loops + 1):(layer + 1) * (loops + 1)]  # (B, H or 2H, T, T)
        log, mean_log = block(outer), block(outer.mean(1))
        singular = torch.linalg.svdvals(log)  # (B, H, T/2)
        of_layer = torch.linalg.svdvals(mean_log)
        rank = (of_layer > tol * of_layer[..., :1]).sum(-1).double()
        spectra.append((singular / singular[..., :1]).mean((0, 1)).tolist())
        row = {"effective rank": effective_rank(singular), "rank of layer": rank,
               "outside span": outside_span(log, seen["x"][layer]),
               "rank <= D": (rank <= D).double(), "outer entropy": entropy(outer)}
        if loops:
            s, h = seen["refined"][layer]
            cosine = torch.cosine_similarity(s, h, dim=-1)
            own = torch.stack([m.diagonal(dim1=-2, dim2=-1)[..., 1:] for m in inner])
            bits = torch.stack([entropy(m) for m in inner])  # (loops, B, heads)
            for i, stream in enumerate(c.nexus_streams):
                heads = slice(i * H, (i + 1) * H)
                row |= {f"inner {stream} entropy": bits[..., heads],
                        f"own token, {stream}": own[:, :, heads],
                        f"cosine {stream}": cosine[:, heads]}
        for name in COLUMNS:
            rows[name].append(row[name].mean().item() if name in row else None)
    return dict(D=D, rows=rows, spectra=spectra)


def lines(results):
    yield ["", "layer", "D", *COLUMNS]
    for variant, runs in results.items():
        for layer in range(len(runs[0]["spectra"])):
            cells = [[run["rows"][name][layer] for run in runs] for name in COLUMNS]
            yield [variant, layer + 1, runs[0]["D"],
                   *("" if cell[0] is None else mean_spread(cell, 2) for cell in cells)]


def plot(plt, results):
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2))
    for i, (variant, runs) in enumerate(results.items()):
        values = torch.tensor([run["spectra"] for run in runs]).mean(0)  # (layers, T/2)
        for layer, spectrum in enumerate(values):
            panels[0].semilogy(range(1, len(spectrum) + 1), spectrum, color=f"C{i}", alpha=0.7,
                               label=variant if layer == 0 else None)
        at = range(1, len(values) + 1)
        for panel, name, style in ((panels[1], "effective rank", "o-"),
                                   (panels[2], "own token, q", "o-"),
                                   (panels[2], "own token, k", "s--")):
            column = [run["rows"][name] for run in runs]
            if column[0][0] is not None:
                column = torch.tensor(column)
                panel.errorbar(at, column.mean(0), column.std(0), fmt=style, color=f"C{i}",
                               capsize=2, label=f"{variant}{name[-3:] if 'own' in name else ''}")
        panels[0].set_xlim(0, 1.5 * runs[0]["D"])
    panels[0].set(ylim=(1e-4, 1.2), xlabel="singular value of a head's log-attention",
                  title="spectrum, a line a layer")
    panels[1].set(xlabel="layer", title="effective rank of a head's log-attention", xticks=at)
    panels[2].set(xlabel="layer", title="weight an inner step leaves on its own token", xticks=at)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--runs", metavar="DIR", help="what compare.py --out DIR has made (default: OUT/compare, "
        "made by compare.py if it is not there)")
    add("--variants", default="baseline,nexus-2", help="of compare.py (default: baseline,nexus-2)")
    add("--dataset", metavar="DIR", help="token set to look at (default: pydocs in --runs)")
    add("--seeds", type=int, default=3, help="models of each variant (default: 3)")
    add("--windows", type=int, default=8, help="of validation text (default: 8)")
    add("--tol", type=float, default=0.01, help="singular values below this times the largest "
        "do not count for a rank (default: 0.01)")
    add("--quick", action="store_true", help="small models, two windows: under a minute")
    add("--out", default="out/spectrum", help="folder (default: out/spectrum)")
    args = parser.parse_args()
    if args.quick:
        args.windows, args.seeds = 2, min(2, args.seeds)
    if min(args.windows, args.seeds) < 1 or not 0 < args.tol < 1:
        raise UserError("--windows and --seeds must be at least 1, --tol between 0 and 1")
    plt, runs = pyplot(), args.runs or os.path.join(args.out, "compare")
    if not args.runs:  # continues, or finds everything done
        done = subprocess.run([sys.executable, os.path.join(ROOT, "experiments", "compare.py"),
                               "--variants", args.variants, "--seeds", str(args.seeds), "--out",
                               runs, *(["--quick"] if args.quick else [])])
        if done.returncode:
            raise UserError(f"compare.py stopped with status {done.returncode}")
    paths = {name: sorted(glob.glob(os.path.join(runs, f"{name}-seed*", "ckpt.pt")))[:args.seeds]
             for name in args.variants.split(",")}
    for name, found in paths.items():
        if len(found) < args.seeds:
            raise UserError(f"{runs} has {len(found)} checkpoints of {name}, not {args.seeds}: "
                            "lower --seeds, or let compare.py make them")
    T = load_checkpoint(found[0])[0].config.block_size // 2 * 2
    text = TokenSet(args.dataset or os.path.join(runs, "pydocs")).val
    idx = torch.from_numpy(batch(text, T, val_indices(windows(text, T), args.windows, 0, 1))[0])
    results = {name: [measure(path, idx, args.tol) for path in tqdm(found, desc=name, leave=False,
                                                                    disable=None)]
               for name, found in paths.items()}
    print(f"\nmean over heads and {len(idx)} windows of {T} tokens, ± over {args.seeds} seeds; "
          f"ranks at tolerance {args.tol}\n{table(lines(results))}\n")
    base, *others = results.items()
    for name, others_runs in others:
        for column in ("effective rank", "outside span", "rank of layer", "outer entropy"):
            a, b = ([sum(run["rows"][column]) / len(run["spectra"]) for run in group]
                    for group in (others_runs, base[1]))
            print(f"{name} minus {base[0]}, {column}: {paired_text(paired(a, b), 3)}")
    save(args, "spectrum", results, plot(plt, results))


if __name__ == "__main__":
    run_script(main)
