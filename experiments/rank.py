"""
Can one attention head produce a given attention matrix, and what does Nexus change?

    python experiments/rank.py --out out/rank
    python experiments/rank.py --quick

T tokens of width d are fixed at random, d < T. The target is softmax(mask + U Vᵀ) with U, V of rank
r. Weights are fitted by gradient descent; the measure is the remaining KL(target, attention) in
nats per row. Standard attention's scores are X W_q W_kᵀ Xᵀ: only what lies in the span of X, so it
fails even at r far below d (the linear bottleneck). Nexus's refined streams leave that span, but
still have width d: beyond r = d (the log-rank condition) no order can be exact.

A wider head is not a control: W_q W_kᵀ is a d x d matrix whatever its width, so a head of width 4d
is one of width d with other weights (test_rank.py checks the identity). The real control is order 1
with an MLP in place of each projection, q = W2 gelu(W1 x): it leaves the span of X too, but token
by token, without looking at any other. `mlp` has the baseline's parameters (hidden width d/2), as
`self`, `past` and `cross` have; mlp-1.5x those of `shared` (3d/4), mlp-4x those of `separate` (2d).

Where there is no causal mask, "strictly earlier" in `past` and `cross` becomes "any other".
"""

import math
import statistics

import torch
import torch.nn.functional as F
from figures import WIDTH, name_lines, style
from tqdm import tqdm

from common import INNERS, parse, pyplot, save, table

from nanonexus.cli import Parser, UserError, listed, number, positive_int, rate, run_script

VARIANTS = {  # name -> (order, inner map)
    "baseline": (1, None), "mlp": (1, "mlp"), "mlp-1.5x": (1, "mlp"), "mlp-4x": (1, "mlp"),
    **{inner: (2, inner) for inner in INNERS}, "self-3": (3, "self"),
}


def streams(variant, W, X):
    """The unrefined q and k, (B, T, d) each, from a variant's matrices and X (B, T, d)."""
    if VARIANTS[variant][1] == "mlp":
        return [F.gelu(X @ W[i]) @ W[i + 1] for i in (0, 2)]
    return [X @ W[0], X @ W[1]]


def scores(variant, W, X, mask, strict):
    """Masked attention scores (B, T, T) of one head from X (B, T, d).

    W: the variant's matrices as `matrices` makes them; mask, strict (T, T): 0 where a token may
    look and -inf elsewhere, strict also on the diagonal.
    """
    order, inner = VARIANTS[variant]

    def attn(a, b):
        return a @ b.mT / math.sqrt(a.size(-1)) + mask

    def others(a, b):  # (B, T, T); a token that sees no other gathers nothing
        blind = (strict == -math.inf).all(-1, keepdim=True)
        weights = (attn(a, b) + strict.masked_fill(blind, 0)).softmax(-1)
        return weights.masked_fill(blind, 0)

    h = s = streams(variant, W, X)
    for _ in range(order - 1):
        match inner:
            case "self":
                h = [attn(a, a).softmax(-1) @ v for a, v in zip(h, s, strict=True)]
            case "past":
                h = [v + others(a, a) @ v for a, v in zip(h, s, strict=True)]
            case "cross":
                weights = others(*h)
                h = [v + weights @ v for v in s]
            case "shared" | "separate":
                projections = [W[:3]] * 2 if inner == "shared" else [W[2:5], W[5:8]]
                h = [attn(a @ q, a @ k).softmax(-1) @ (b @ v)
                     for a, b, (q, k, v) in zip(h, s, projections, strict=True)]
            case "tokens":
                y = attn(*h).softmax(-1) @ (X @ W[2])
                h = [y @ W[0], y @ W[1]]
            case _:
                raise UserError(f"rank.py has no formula of the inner step {inner!r}: add a case "
                                "to scores(), or drop it from VARIANTS")
    return attn(*h)


def matrices(variant, B, d):
    """A variant's weights for B problems, a list of (B, rows, columns), drawn at random."""
    hidden = max(1, round(d / 2 * {"mlp-1.5x": 1.5, "mlp-4x": 4}.get(variant, 1)))
    shapes = {"mlp": [(d, hidden), (hidden, d)] * 2, "shared": [(d, d)] * 3,
              "tokens": [(d, d)] * 3, "separate": [(d, d)] * 8,
              }.get(VARIANTS[variant][1], [(d, d)] * 2)
    return [(torch.randn(B, *shape) / math.sqrt(shape[0])).requires_grad_() for shape in shapes]


def fit(X, log_target, mask, strict, variant, steps, lr):
    """The KL left, (B,), after Adam on each of B problems in parallel."""
    W = matrices(variant, len(X), X.size(-1))
    optimizer = torch.optim.Adam(W, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = log_target.exp()
    for _ in tqdm(range(steps), desc=variant, disable=None, leave=False):
        log_attention = scores(variant, W, X, mask, strict).log_softmax(-1)
        gap = (log_target - log_attention).masked_fill(target == 0, 0)  # where the mask hides
        kl = (target * gap).sum(-1).mean(-1)  # (B,)
        optimizer.zero_grad()
        kl.sum().backward()
        torch.nn.utils.clip_grad_norm_(W, 100.0)
        optimizer.step()
        schedule.step()
    return kl.detach()


def masks(T, causal):
    """What a token may look at, and the same without itself: (T, T) of 0 and -inf."""
    mask = torch.full((T, T), -math.inf).triu(1) if causal else torch.zeros(T, T)
    return mask, mask.clone().fill_diagonal_(-math.inf)


def experiment(args, d, causal):
    """{variant: {rank: [KL of each seed's target, the best of its restarts]}}"""
    T, ranks = args.T, args.ranks_of[d]
    mask, strict = masks(T, causal)
    X, targets = [], []
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(T, d, generator=generator)
        for r in ranks:  # scores of standard deviation 2, whatever the rank
            U, V = (torch.randn(T, r, generator=generator) for _ in "UV")
            targets.append((2 / math.sqrt(r) * U @ V.T + mask).log_softmax(-1))
            X.append(tokens)
    X, targets = (torch.stack(s).repeat_interleave(args.restarts, 0) for s in (X, targets))
    results = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        kl = fit(X, targets, mask, strict, variant, args.steps, args.lr)
        best = kl.view(args.seeds, len(ranks), args.restarts).amin(-1)
        results[variant] = {r: best[:, i].tolist() for i, r in enumerate(ranks)}
    return results


def rows(results, d):
    from scipy import stats

    base = results["baseline"]
    yield ["rank of the target", "parameters", *base]
    for variant, row in results.items():
        cells = []
        for r, values in row.items():
            better = row is not base and stats.ttest_rel(values, base[r], alternative="less")
            mark = "*" if better and better.pvalue < 0.005 else " "  # one-sided half of 0.01
            values = torch.tensor(values)
            cells.append(f"{values.mean():.3f} ±{values.std():.3f}{mark}")
        yield [variant, sum(w.numel() for w in matrices(variant, 1, d)), *cells]


def plot(plt, all_results):
    widths = list(next(iter(all_results.values())))
    figure, panels = plt.subplots(len(all_results), len(widths), figsize=(WIDTH, 6), sharey=True,
                                  squeeze=False)
    for line, (title, results) in zip(panels, all_results.items(), strict=True):
        for panel, d in zip(line, widths, strict=True):
            for variant, row in results[d].items():
                values = torch.tensor(list(row.values()))  # (ranks, seeds)
                panel.errorbar([r / d for r in row], values.mean(1), values.std(1), elinewidth=0.7,
                               **style(variant))
            panel.axvline(1, color="#999999", lw=0.6)
            panel.set(title=f"{title}, d = {d}", yscale="log")
        line[0].set_ylabel("KL left (nats per row)")
    for line, results in zip(panels, all_results.values(), strict=True):
        rank = list(results[d]["baseline"])[-1]
        name_lines(line[-1], {variant: (rank / d, statistics.mean(row[rank]))
                              for variant, row in results[d].items()})
    figure.supxlabel("rank of the target's log-weights / d", fontsize=9)
    return figure


def main():
    parser = Parser(__doc__)
    add, several = parser.add_argument, number(int, 2, 1000)
    add("--T", type=several, default=64, help="tokens (default: 64)")
    add("--d", type=listed(positive_int), default="8,16,32", help="widths of tokens and head, "
        "below T (default: 8,16,32)")
    add("--ranks", type=listed(positive_int), help="ranks of the targets (default: d/8 to 2d)")
    add("--seeds", type=several, default=5, help="targets, and tokens, per rank (default: 5)")
    add("--restarts", type=positive_int, default=2, help="fits per target; the best counts "
        "(default: 2)")
    add("--steps", type=positive_int, default=600, help="steps of Adam (default: 600)")
    add("--lr", type=rate, default=0.02, help="peak learning rate (default: 0.02)")
    add("--quick", action="store_true", help="a small version, under a minute")
    add("--out", default="out/rank", help="folder (default: out/rank)")
    args = parse(parser)
    if args.quick:
        args.d, args.seeds, args.restarts, args.steps = [16], min(2, args.seeds), 1, 300
        args.ranks = args.ranks or [2, 16, 32]
    if max(args.d) >= args.T:
        raise UserError(f"--d must be below --T, {args.T}, got {max(args.d)}")
    args.ranks_of = {d: args.ranks or sorted({max(1, d * n // 8) for n in (1, 2, 4, 8, 12, 16)})
                     for d in args.d}
    plt = pyplot(args.out)
    for variant in VARIANTS:  # a step without a formula is refused before the work
        scores(variant, matrices(variant, 1, 2), torch.zeros(1, 3, 2), *masks(3, causal=True))
    all_results = {title: {d: experiment(args, d, causal) for d in args.d}
                   for title, causal in (("causal", True), ("not causal", False))}
    for title, results in all_results.items():
        for d, result in results.items():
            print(f"\n{title}, d = {d}, T = {args.T}: KL left, mean over targets ± standard "
                  f"deviation\n{table(rows(result, d))}")
    print("* below the baseline on the same targets at p < 0.01 (paired t test)")
    save(args, "rank", all_results, plot(plt, all_results))


if __name__ == "__main__":
    run_script(main)
