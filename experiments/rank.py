"""
Can one attention head produce a given attention matrix, and what does Nexus change?

    python experiments/rank.py --out out/rank
    python experiments/rank.py --quick

T tokens of width d are fixed at random, d < T. The target is softmax(mask + U Vᵀ) with U, V of rank
r. Weights are fitted by gradient descent; what is left is the divergence KL(target, attention) in
nats a row. Standard attention's scores are X W_q W_kᵀ Xᵀ: only what lies in the span of X, so it
fails even at r far below d (the linear bottleneck). Nexus's refined streams leave that span, but
still have width d: beyond r = d (the log-rank condition) it must fail too.

The honest controls are order 1 with wider heads: as many parameters as `separate` has (width 4d),
and more compute than order 3. A head's width is not what is missing, if these fail as well.
"""

import json
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import Parser, UserError, run_script  # noqa: E402

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


def experiment(args, causal):
    """{variant: {rank: [KL of each target, the best of its restarts]}}"""
    T, d, ranks = args.T, args.d, args.ranks
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


def show(results, d, title):
    ranks = list(next(iter(results.values())))
    print(f"\n{title}: KL left, mean over targets (± standard deviation); d = {d}\n"
          f"{'rank of the target':20}" + "".join(f"{r:>15}" for r in ranks))
    for variant, row in results.items():
        cells = (torch.tensor(row[r]) for r in ranks)
        print(f"{variant:20}" + "".join(f"{c.mean():8.3f} ±{c.std():6.3f}" for c in cells))


def plot(all_results, d, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, squeeze=False)
    for panel, (title, results) in zip(panels[0], all_results.items(), strict=True):
        for variant, row in results.items():
            values = torch.tensor(list(row.values()))  # (ranks, seeds)
            panel.errorbar(list(row), values.mean(1), values.std(1), label=variant, marker=".",
                           ls="--" if "width" in variant else "-", capsize=2)
        panel.axvline(d, color="k", lw=1, ls=":")
        panel.text(d, panel.get_ylim()[1] * 0.95, " rank = d", va="top")
        panel.set(xlabel="rank of the target's log-weights", title=title)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("KL left (nats a row)")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--T", type=int, default=64, help="tokens (default: 64)")
    add("--d", type=int, default=16, help="their width, and the head's (default: 16)")
    add("--ranks", type=lambda s: [int(r) for r in s.split(",")], help="default: 1 to 2d")
    add("--seeds", type=int, default=5, help="targets, and tokens, of each rank (default: 5)")
    add("--restarts", type=int, default=3, help="fits of each; the best counts (default: 3)")
    add("--steps", type=int, default=1000, help="of Adam (default: 1000)")
    add("--lr", type=float, default=0.02, help="peak learning rate (default: 0.02)")
    add("--quick", action="store_true", help="a small version, under a minute")
    add("--out", default="out/rank", help="folder (default: out/rank)")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.restarts, args.steps = 3, 1, 300
        args.ranks = args.ranks or [2, args.d, 2 * args.d]
    d = args.d
    args.ranks = args.ranks or [1, 2, 4, d // 2, 3 * d // 4, d, 5 * d // 4, 3 * d // 2, 2 * d]
    if not 1 <= d < args.T or min(args.seeds - 1, args.restarts, args.steps, *args.ranks) < 1:
        raise UserError("give 1 <= d < T, two seeds or more, restarts, steps and ranks from 1 up")
    all_results = {title: experiment(args, causal)
                   for title, causal in (("causal", True), ("not causal", False))}
    for title, results in all_results.items():
        show(results, d, title)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "rank.json"), "w", encoding="utf-8") as f:
        json.dump(dict(args=vars(args), torch=str(torch.__version__), kl=all_results), f, indent=1)
    plot(all_results, d, os.path.join(args.out, "rank.png"))
    print(f"wrote {args.out}/rank.png and rank.json")


if __name__ == "__main__":
    run_script(main)
