"""
Can a single layer look up what goes with a key, and what goes with that in turn?

    python experiments/recall.py --out out/recall
    python experiments/recall.py --tasks two-hops
    python experiments/recall.py --quick

One hop (associative recall): n pairs of a key and a value, then the keys again in another order;
after each key the model must name its value. Two hops: pairs a b and pairs b c, mixed; asked a it
must name c (it is trained on b, c too, the first half of the way; only a, c counts). Keys and
values are drawn anew for each sequence, so nothing can be learnt by heart. Each of the two has the
sequential residual; `parallel` is one hop in Pythia's block, whose MLP never sees what its own
attention found.

Standard attention needs two layers for one hop, one to join each value with the key before it and
one to look the key up. A refined key can carry its neighbour within one layer. Every variant gets
its learning rate from the same small grid, on a seed of its own; then the seeds that are counted.
A run stops when it answers everything twice in a row, and keeps that accuracy.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import listed, mean_spread, paired, paired_text, pyplot, save, table

from model import GPT, GPTConfig
from nanonexus.cli import Parser, UserError, run_script

VARIANTS = {
    "baseline": dict(), "nexus-2": dict(nexus_order=2), "nexus-3": dict(nexus_order=3),
    "q-only": dict(nexus_order=2, nexus_streams="q"),
    "k-only": dict(nexus_order=2, nexus_streams="k"),
    "shared": dict(nexus_order=2, nexus_inner="shared"),
    "separate": dict(nexus_order=2, nexus_inner="separate"),
    "two-layers": dict(n_layer=2),  # a baseline with more parameters and more compute
}
TASKS = {"one-hop": (1, False), "parallel": (1, True), "two-hops": (2, False)}  # hops, parallel
SYMBOLS = 16  # of each kind: a, b and c never mix


def sequences(B, n, hops, generator):
    """B problems of n chains: idx (B, T) int64 and targets (B, T), -1 but where a key is asked."""
    def draw():
        return torch.rand(B, SYMBOLS, generator=generator).argsort(1)[:, :n]  # without repeats

    chain = [draw() + SYMBOLS * i for i in range(hops + 1)]  # a, b (and c), each (B, n)
    pairs = torch.cat([torch.stack(link, -1) for link in zip(chain, chain[1:], strict=False)], 1)

    def shuffle(x):
        order = torch.rand(x.shape[:2], generator=generator).argsort(1)
        return x[torch.arange(B)[:, None], order]

    facts = shuffle(pairs).flatten(1)  # (B, 2 n hops)
    # what is asked, and the answer, (B, n hops, 2): every link of the chain to its end, so that two
    # hops can be learnt from one
    asked = shuffle(torch.cat([torch.stack([key, chain[-1]], -1) for key in chain[:-1]], 1))
    idx = torch.cat([facts, asked[..., 0]], 1)
    targets = torch.cat([torch.full_like(facts, -1), asked[..., 1]], 1)
    return idx, targets


def build(task, variant, args, **overrides):
    hops, parallel = TASKS[task]
    return GPT(GPTConfig(**dict(
        vocab_size=(hops + 1) * SYMBOLS, block_size=3 * hops * args.pairs, n_layer=1,
        n_head=args.heads, n_embd=args.width, rotary_pct=1.0, parallel_residual=parallel,
        gelu="erf") | VARIANTS[variant] | overrides))


def train(task, variant, args, lr, seed, say):
    """(accuracy on fresh problems after every args.every steps, the model)"""
    hops = TASKS[task][0]
    torch.manual_seed(seed)
    model = build(task, variant, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    fresh = sequences(256, args.pairs, hops, torch.Generator().manual_seed(seed + 10**6))
    curve = []
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 20, 1)
        idx, targets = sequences(args.batch, args.pairs, hops, generator)
        asked = targets >= 0
        loss = F.cross_entropy(model(idx)[0][asked], targets[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.every == 0:
            curve.append(accuracy(model, *fresh))
            if sum(curve[-2:]) > 2 * 0.999:
                break
        say.update()
    say.update(args.steps - step + 1)
    points = args.steps // args.every
    return curve + curve[-1:] * (points - len(curve)), model


@torch.no_grad()
def accuracy(model, idx, targets):
    asked = (targets >= 0) & (idx < SYMBOLS)  # from the beginning of a chain to its end
    return (model(idx)[0].argmax(-1) == targets)[asked].float().mean().item()


def study(task, variant, args, say):
    """Choose a learning rate on one seed, then train on the others."""
    say.set_description(f"{task}: {variant}")
    tried = {lr: sum(train(task, variant, args, lr, 1000, say)[0]) for lr in args.lrs}
    lr = max(tried, key=tried.get)  # by the area under its curve: fast counts, as well as far
    curves = []
    for seed in range(args.seeds):
        curve, model = train(task, variant, args, lr, seed, say)
        curves.append(curve)
    return dict(lr=lr, accuracy=[c[-1] for c in curves], curves=curves,
                parameters=model.num_params()), model


def rows(results, every):
    base = results["baseline"]
    yield ["", "parameters", "learning rate", "accuracy", "steps to 0.9", "minus baseline [99%]"]
    for variant, r in results.items():
        gap = "" if r is base else paired_text(paired(r["accuracy"], base["accuracy"]), 3)
        steps = [next((every * (i + 1) for i, a in enumerate(c) if a >= 0.9), "-")
                 for c in r["curves"]]
        yield [variant, f"{r['parameters']:,}", r["lr"], mean_spread(r["accuracy"], 3),
               " ".join(map(str, steps)), gap]


def plot_curves(plt, all_results, every):
    figure, panels = plt.subplots(1, len(all_results), figsize=(4.6 * len(all_results), 4.2),
                                  sharey=True, squeeze=False)
    for panel, (task, results) in zip(panels[0], all_results.items(), strict=True):
        for variant, r in results.items():
            curves = torch.tensor(r["curves"])  # (seeds, points)
            steps = [every * (i + 1) for i in range(curves.size(1))]
            panel.plot(steps, curves.mean(0), label=variant,
                       ls="--" if "layers" in variant else "-")
            panel.fill_between(steps, curves.amin(0), curves.amax(0), alpha=0.12)
        panel.set(title=task, xlabel="training steps", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy (mean, and range over seeds)")
    panels[0][-1].legend(fontsize="small")
    return figure


def plot_maps(plt, model, task, args):
    """The inner loop of k and the outer attention of the head that looks up best, one problem."""
    hops = TASKS[task][0]
    idx, targets = sequences(1, args.pairs, hops, torch.Generator().manual_seed(5))
    manual = build(task, "nexus-2", args, attention="manual")
    manual.load_state_dict(model.state_dict())
    maps = []
    manual(idx, maps=maps)
    inner, outer = maps[0][0], maps[1][0]  # (2H, T, T), q's heads first; (H, T, T)
    first = 2 * hops * args.pairs  # where the questions begin
    answers = targets[0, first:]
    hits = (idx[0] == answers[:, None]).float()  # (n, T): where each answer stands
    head = int((outer[:, first:] * hits).sum((1, 2)).argmax())
    names = ["abc"[t // SYMBOLS] + str(t % SYMBOLS) for t in idx[0].tolist()]
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2))
    for panel, map_, title in zip(panels, (inner[args.heads + head], outer[head]), (
            "inner attention of k: what a key gathers", "outer attention: what a token reads"),
            strict=True):
        panel.imshow(map_, cmap="magma_r", vmin=0, vmax=1)
        panel.set(title=f"{title} (head {head + 1} of {args.heads})", xticks=range(len(names)),
                  yticks=range(len(names)))
        panel.set_xticklabels(names, rotation=90, fontsize=7)
        panel.set_yticklabels(names, fontsize=7)
        panel.axhline(first - 0.5, color="k", lw=0.6)
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=6, help="keys of a problem (default: 6)")
    add("--width", type=int, default=64, help="of the model (default: 64)")
    add("--heads", type=int, default=2, help="of the model (default: 2)")
    add("--steps", type=int, default=400, help="of training (default: 400)")
    add("--batch", type=int, default=64, help="problems a step (default: 64)")
    add("--seeds", type=int, default=5, help="that are counted (default: 5)")
    add("--lrs", type=listed(float), default="1e-3,3e-3,1e-2",
        help="the grid of learning rates (default: 1e-3,3e-3,1e-2)")
    add("--quick", action="store_true", help="fewer steps and seeds, under a minute")
    add("--tasks", default="one-hop,parallel", help=f"of {', '.join(TASKS)} "
        "(default: one-hop,parallel)")
    add("--variants", default=",".join(VARIANTS), help="a list of them, baseline first (default: "
        f"{','.join(VARIANTS)})")
    add("--out", default="out/recall", help="folder (default: out/recall)")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.steps, args.seeds, args.lrs = 3, 60, min(2, args.seeds), [1e-2]
        args.tasks = "one-hop"
    if min(args.pairs, args.width, args.heads, args.steps, args.batch, args.seeds) < 1 \
            or args.pairs > SYMBOLS or min(args.lrs) <= 0:
        raise UserError(f"every number must be above 0, and --pairs at most {SYMBOLS}")
    tasks, variants = args.tasks.split(","), args.variants.split(",")
    for name in tasks + variants:
        if name not in TASKS and name not in VARIANTS or variants[0] != "baseline":
            raise UserError(f"choose --tasks from {', '.join(TASKS)} and --variants from "
                            f"{', '.join(VARIANTS)}, the baseline first")
    args.every = max(1, args.steps // 20)
    plt = pyplot()
    torch.set_num_threads(1)  # the models are so small that two threads wait for each other
    all_results, models = {}, {}
    runs = len(tasks) * len(variants) * (len(args.lrs) + args.seeds)
    with tqdm(total=runs * args.steps, unit="step", disable=None, leave=False) as say:
        for task in tasks:
            all_results[task] = {}
            for variant in variants:
                all_results[task][variant], models[task, variant] = study(task, variant, args, say)
            say.clear()
            print(f"\n{task}, {args.pairs} keys: accuracy after {args.steps} steps, {args.seeds} "
                  f"seeds\n{table(rows(all_results[task], args.every))}", flush=True)
    print("paired by seed; * is p < 0.01")
    save(args, "recall", all_results, plot_curves(plt, all_results, args.every))
    if ("one-hop", "nexus-2") in models:
        figure = plot_maps(plt, models["one-hop", "nexus-2"], "one-hop", args)
        figure.tight_layout()
        figure.savefig(f"{args.out}/maps.png", dpi=120)


if __name__ == "__main__":
    run_script(main)
