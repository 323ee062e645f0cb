"""
Can one attention head produce a given attention matrix, and what does Nexus change?

    python experiments/rank.py --out out/rank
    python experiments/rank.py --quick

T tokens of width d are fixed at random, d < T. The target is softmax(mask + U Vᵀ) with U, V of rank
r. Weights are fitted by gradient descent; what is left is the divergence KL(target, attention) in
nats a row. Standard attention's scores are X W_q W_kᵀ Xᵀ: only what lies in the span of X, so it
fails even at r far below d (the linear bottleneck). Nexus's refined streams leave that span, but
still have width d: beyond r = d (the log-rank condition) no order can be exact.

The honest control is order 1 with a head four times as wide: as many parameters as `separate` has,
and more compute in its scores than order 3. If it fails as well, width is not what is missing.
"""

import math

import torch
from tqdm import tqdm

from common import listed, pyplot, save, table

from nanonexus.cli import Parser, UserError, run_script

# name -> (order, inner reading, width of the head in units of d)
VARIANTS = {
    "order 1": (1, "self", 1), "order 1, width 4d": (1, "self", 4),
    "order 2": (2, "self", 1), "order 3": (3, "self", 1),
    "order 2, shared": (2, "shared", 1), "order 2, separate": (2, "separate", 1),
}


def scores(outer, inner, X, mask, order):
    """Masked attention scores (B, T, T) of one head from X (B, T, d).

    outer: W_q and W_k. inner: for each of the two streams the three matrices of its inner step, or
    None where it has none (the reading "self").
    """
    def attn(a, b):
        return a @ b.mT / math.sqrt(a.size(-1)) + mask

    streams = []
    for W, A in zip(outer, inner, strict=True):
        s = X @ W
        h, values = s, s @ A[2] if A else s
        for _ in range(order - 1):
            a, b = (h @ A[0], h @ A[1]) if A else (h, h)
            h = attn(a, b).softmax(-1) @ values
        streams.append(h)
    return attn(*streams)


def fit(X, log_target, mask, variant, steps, lr):
    """What KL is left, (B,), after Adam on every one of B problems side by side."""
    order, reading, width = VARIANTS[variant]
    B, _, d = X.shape
    flat = []

    def matrices(n, columns=d):
        new = [(torch.randn(B, d, columns) / math.sqrt(d)).requires_grad_() for _ in range(n)]
        flat.extend(new)
        return new

    outer, inner = matrices(2, width * d), [None, None]
    if reading == "shared":
        inner = [[*outer, *matrices(1)]] * 2  # the head's own W_q, W_k, W_v again
    if reading == "separate":
        inner = [matrices(3), matrices(3)]
    optimizer = torch.optim.Adam(flat, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = log_target.exp()
    for _ in tqdm(range(steps), desc=variant, disable=None, leave=False):
        log_attention = scores(outer, inner, X, mask, order).log_softmax(-1)
        gap = (log_target - log_attention).masked_fill(target == 0, 0)  # where the mask hides
        kl = (target * gap).sum(-1).mean(-1)  # (B,)
        optimizer.zero_grad()
        kl.sum().backward()
        torch.nn.utils.clip_grad_norm_(flat, 100.0)
        optimizer.step()
        schedule.step()
    return kl.detach()


def experiment(args, d, causal):
    """{variant: {rank: [KL of each seed's target, the best of its restarts]}}"""
    T, ranks = args.T, args.ranks_of[d]
    mask = torch.full((T, T), -math.inf).triu(1) if causal else torch.zeros(T, T)
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
        kl = fit(X, targets, mask, variant, args.steps, args.lr)
        best = kl.view(args.seeds, len(ranks), args.restarts).amin(-1)
        results[variant] = {r: best[:, i].tolist() for i, r in enumerate(ranks)}
    return results


def rows(results):
    from scipy import stats

    base = results["order 1"]
    yield ["rank of the target", *base]
    for variant, row in results.items():
        cells = []
        for r, values in row.items():
            better = row is not base and stats.ttest_rel(values, base[r], alternative="less")
            mark = "*" if better and better.pvalue < 0.005 else " "  # one-sided half of 0.01
            values = torch.tensor(values)
            cells.append(f"{values.mean():.3f} ±{values.std():.3f}{mark}")
        yield [variant, *cells]


def plot(plt, all_results):
    widths = list(next(iter(all_results.values())))
    figure, panels = plt.subplots(2, len(widths), figsize=(4.2 * len(widths), 7), sharey=True,
                                  squeeze=False)
    for line, (title, results) in zip(panels, all_results.items(), strict=True):
        for panel, d in zip(line, widths, strict=True):
            for variant, row in results[d].items():
                values = torch.tensor(list(row.values()))  # (ranks, seeds)
                panel.errorbar([r / d for r in row], values.mean(1), values.std(1), label=variant,
                               marker=".", ls="--" if "width" in variant else "-", capsize=2)
            panel.axvline(1, color="k", lw=1, ls=":")
            panel.set(title=f"{title}, d = {d}", xlabel="rank of the target's log-weights / d")
            panel.grid(alpha=0.3)
        line[0].set_ylabel("KL left (nats a row)")
    panels[0][-1].legend(fontsize="small")
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--T", type=int, default=64, help="tokens (default: 64)")
    add("--d", type=listed(int), default="8,16,32", help="their widths, and the head's "
        "(default: 8,16,32)")
    add("--ranks", type=listed(int), help="of the targets (default: d/8 to 2d)")
    add("--seeds", type=int, default=5, help="targets, and tokens, of each rank (default: 5)")
    add("--restarts", type=int, default=2, help="fits of each; the best counts (default: 2)")
    add("--steps", type=int, default=600, help="of Adam (default: 600)")
    add("--lr", type=float, default=0.02, help="peak learning rate (default: 0.02)")
    add("--quick", action="store_true", help="a small version, under a minute")
    add("--out", default="out/rank", help="folder (default: out/rank)")
    args = parser.parse_args()
    if args.quick:
        args.d, args.seeds, args.restarts, args.steps = [16], min(3, args.seeds), 1, 300
        args.ranks = args.ranks or [2, 16, 32]
    args.ranks_of = {d: args.ranks or sorted({max(1, d * n // 8) for n in (1, 2, 4, 8, 12, 16)})
                     for d in args.d}
    if not all(1 <= d < args.T for d in args.d) or min(
            args.seeds - 1, args.restarts, args.steps, *sum(args.ranks_of.values(), [])) < 1:
        raise UserError("give 1 <= d < T, two seeds or more, restarts, steps and ranks from 1 up")
    plt = pyplot()
    all_results = {title: {d: experiment(args, d, causal) for d in args.d}
                   for title, causal in (("causal", True), ("not causal", False))}
    for title, results in all_results.items():
        for d, result in results.items():
            print(f"\n{title}, d = {d}, T = {args.T}: KL left, mean over targets ± standard "
                  f"deviation\n{table(rows(result))}")
    print("* below order 1 on the same targets at p < 0.01 (paired t test)")
    save(args, "rank", all_results, plot(plt, all_results))


if __name__ == "__main__":
    run_script(main)
