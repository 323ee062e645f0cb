"""
Where in a text does a variant gain: on what it can copy from earlier, or everywhere?

    python experiments/induction.py --runs out/compare --variants baseline,cross,key-shift
    python experiments/induction.py --runs out/past --steps 1000,2000,3000  # as it is learnt
    python experiments/induction.py --quick

An induction head (Olsson et al. 2022, https://arxiv.org/abs/2209.11895) looks for an earlier
occurrence of the current token and predicts what followed it. Whether that can help is a property
of the text, so the predictions of validation text are split in three, for each token x_t:

- repeated: x_t came before in the sequence, at least once followed by the token to predict:
  copying that one is right;
- changed: x_t came before, always followed by something else: copying is wrong;
- new: x_t did not come before, so there is nothing to copy.

With --match N the last N tokens take the place of x_t; for bytes, since nearly every one recurs.

A variant's loss minus the baseline's is the sum of what the three contribute: the difference within
each, times its share of the predictions. Variants are compare.py's; the first is the baseline.

Whether a head looks at what it could copy is read off its map: the share of its attention that goes
to the tokens after earlier occurrences of the current one, where there are any (prefix matching in
Olsson et al.). It is given for the head with the largest share, next to a uniform map's.

With --results each measured model appends one line to a file, and is not measured again while the
line is there; --show prints the tables of the lines without any model.
"""

import glob
import os
import statistics
import sys

import torch
import torch.nn.functional as F
from compare import ANY, read_variant
from figures import WIDTH, mean_bar, name_lines, name_rows, style
from runs import model_flags, models_and_text, source
from tqdm import tqdm

from common import parse, pyplot, save, table

from nanonexus.checkpoint import load_checkpoint, read_checkpoint
from nanonexus.cli import Parser, UserError, listed, positive_int, run_script
from nanonexus.files import append_line, output_file, read_lines, sha256
from nanonexus.stats import mean_spread, paired, paired_text

KINDS = ["repeated", "changed", "new"]


def kinds(tokens, match=1):
    """tokens (B, T + 1): for each of the T predictions the index in KINDS, (B, T); match: how many
    tokens must recur."""
    found = torch.empty(tokens.size(0), tokens.size(1) - 1, dtype=torch.long)
    for b, row in enumerate(tokens.tolist()):
        followers = {}  # of each token so far (or of the last few): the tokens that came after it
        for t, after in enumerate(row[1:]):
            earlier = followers.setdefault(tuple(row[max(0, t + 1 - match):t + 1]), set())
            found[b, t] = 0 if after in earlier else 1 if earlier else 2
            earlier.add(after)
    return found


@torch.no_grad()
def losses(model, tokens, rows=32):
    """The loss of each prediction, (B, T) nats, on tokens (B, T + 1); rows: sequences at a time."""
    return torch.cat([F.cross_entropy(model(some[:, :-1]).float().mT, some[:, 1:],
                                      reduction="none") for some in tokens.split(rows)])


@torch.no_grad()
def copying(model, idx):
    """(the largest share of attention that a head gives to tokens after earlier occurrences of the
    current one, a uniform map's), means over the positions of idx (B, T) where there are any."""
    total = uniform = count = 0
    for row in idx.split(1):  # maps of one sequence at a time: they are as large as T x T
        maps, before = {}, F.pad(row[:, :-1], (1, 0), value=-1)
        model.hidden_states(row, maps=maps)
        outer = torch.cat([maps[layer, "outer"] for layer in range(model.config.n_layer)])
        follows = (before[0] == row[0, :, None]).tril()  # (T, T)
        some = follows.any(-1)
        total += (outer * follows).sum(-1)[..., some].sum(-1)  # (L, H)
        uniform += (follows.sum(-1) / torch.arange(1, len(some) + 1, device=idx.device)
                    )[some].sum().item()
        count += some.sum().item()
    return total.max().item() / count, uniform / count


def measure(path, tokens, kind, maps=8):
    """Of a checkpoint: {"all" and each kind: (its mean loss, what it contributes to the mean loss
    of all), "copying": copying, on the first sequences}"""
    model, _ = load_checkpoint(path, attention="manual")
    loss = losses(model, tokens)
    parts = {"all": (loss.mean().item(),) * 2, "copying": copying(model, tokens[:maps, :-1])}
    for i, name in enumerate(KINDS):
        if (kind == i).any():
            parts[name] = loss[kind == i].mean().item(), (loss * (kind == i)).mean().item()
    return parts


def minus(runs, base, name, i):
    """Paired difference of two variants' runs in part `name`: of its loss (i = 0) or of what it
    contributes (i = 1)."""
    return paired([run[name][i] for run in runs], [run[name][i] for run in base])


def lines(results, shares):
    base, *_ = results
    yield ("variant", "predictions", "share", "loss, nats", f"minus {base} [99% interval]",
           "contributes")
    for variant, runs in results.items():
        for name, share in shares.items():
            cells = [variant, name, f"{share:.2f}", mean_spread([run[name][0] for run in runs], 3)]
            if variant != base:
                gap, part = (minus(runs, results[base], name, i) for i in (0, 1))
                cells += [paired_text(gap, 3), f"{part['mean']:+.4f}"]
            yield cells + [""] * (6 - len(cells))


def copying_lines(results):
    base, *_ = results
    yield "variant", "strongest copying head", f"minus {base} [99% interval]", "uniform map"
    for variant, runs in results.items():
        gap = "" if variant == base else paired_text(minus(runs, results[base], "copying", 0), 3)
        yield (variant, mean_spread([run["copying"][0] for run in runs], 3), gap,
               f"{runs[0]['copying'][1]:.3f}")


def plot(plt, results, shares):
    base, *others = results
    figure, panels = plt.subplots(1, len(shares), figsize=(WIDTH, 1 + 0.3 * len(others)),
                                  sharex=True, sharey=True)
    for panel, (name, share) in zip(panels, shares.items(), strict=True):
        for i, variant in enumerate(others):
            gaps = [run[name][1] - at[name][1]
                    for run, at in zip(results[variant], results[base], strict=True)]
            mean_bar(panel, i, variant, gaps)
        panel.axvline(0, color="#666666", lw=0.8)
        panel.set_title(name if name == "all" else f"{name}\n{share:.0%} of predictions")
    name_rows(panels[0], others)  # the other panels share its rows
    figure.supxlabel(f"contribution to the validation loss minus {base}, in nats (negative is "
                     "better)", fontsize=9)
    return figure


def plot_steps(plt, found):
    """found: {step: {variant: runs}}. The loss minus the baseline's, what repeated predictions
    contribute to that, and the strongest copying head's share, against the step; means over seeds.
    """
    last = found[max(found)]
    base, *_ = last
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 3))
    ends = {}
    for variant in last:
        steps = [step for step in sorted(found) if variant in found[step]]
        pairs = [(found[step][variant], found[step][base]) for step in steps]
        copies = [statistics.mean(run["copying"][0] for run in runs) for runs, _ in pairs]
        ends[variant] = steps[-1], copies[-1]
        for panel, y in zip(panels, ([minus(*pair, "all", 1)["mean"] for pair in pairs],
                                     [minus(*pair, "repeated", 1)["mean"] for pair in pairs],
                                     copies), strict=True):
            panel.plot(steps, y, marker=".", **style(variant))
    for panel, title in zip(panels, (f"loss minus {base}'s, nats", "... on what repeats",
                                     "strongest copying head"), strict=True):
        panel.set(title=title, xlabel="steps")
    name_lines(panels[-1], ends)
    return figure


def kept(path, earlier):
    """{step: path} of a run's checkpoint, the last; before it, if asked for, the earlier ones that
    train.py --keep left beside it."""
    others = glob.glob(glob.escape(path.removesuffix(".pt")) + ".*.pt") if earlier else []
    return {read_checkpoint(p)["step"]: p for p in others + [path]}


def identity(path):
    """What tells one checkpoint from others: the start of its sha256."""
    return sha256(path)[:12]


def measure_all(args, name, found):
    """Measure what args ask for and found, {(variant, seed, step): line}, lacks; the steps."""
    if args.results:
        output_file(args.results)
    paths, tokens = models_and_text(args)
    kind = kinds(tokens, args.match)
    shares = {"all": 1.0} | {part: (kind == i).double().mean().item()
                             for i, part in enumerate(KINDS) if (kind == i).any()}
    runs = {(variant, seed): kept(path, args.steps) for variant, some in paths.items()
            for seed, path in enumerate(some)}
    steps = args.steps or list(runs[args.variants[0], 0])[-1:]
    for (variant, seed), at in runs.items():
        for step in set(steps) - set(at):
            raise UserError(f"{variant}, seed {seed}, has no checkpoint of step {step}: choose "
                            f"from {', '.join(map(str, sorted(at)))}")
    for (variant, seed, step), line in found.items():
        if (path := runs.get((variant, seed), {}).get(step)) and "weights" in line and \
                line["weights"] != identity(path):
            raise UserError(f"{args.results} has another model's {variant}, seed {seed}, step "
                            f"{step}, not that of {path}: choose another --results")
    todo = [(*run, step) for step in steps for run in runs if (*run, step) not in found]
    made = source(found.values())
    for variant, seed, step in tqdm(todo, leave=False, disable=None):
        found[variant, seed, step] = line = dict(
            runs=name, variant=variant, seed=seed, step=step, match=args.match, shares=shares,
            sequences=args.windows, predictions=kind.numel(), length=kind.size(1),
            **measure(runs[variant, seed][step], tokens, kind),
            weights=identity(runs[variant, seed][step]), **made)
        if args.results:
            append_line(args.results, line)
    return steps


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    model_flags(add, "baseline,cross,key-shift", "the baseline first", count=256)
    add("--steps", type=listed(positive_int), help="steps of the kept checkpoints "
        "to measure (default: the newest alone)")
    add("--match", type=positive_int, default=1, help="how many tokens must recur (default: 1)")
    add("--results", help="file to which each measured model appends a line (default: none)")
    add("--show", action="store_true", help="measure nothing: tables of the lines of --results")
    add("--quick", action="store_true", help="small models, few sequences: under a minute")
    add("--out", default="out/induction", help="folder (default: out/induction)")
    args = parse(parser)
    if args.quick:
        args.windows, args.seeds = 16, min(2, args.seeds)
    if len(args.variants) < 2:
        raise UserError("--variants needs the baseline and at least one more")
    for variant in args.variants:
        read_variant(variant, ANY)  # all are known, before any of them is trained
    if args.show and not args.results:
        raise UserError("--show needs --results, a file with lines")
    plt = pyplot(args.out)
    name = os.path.basename(os.path.normpath(args.runs or "compare"))
    found = {(x["variant"], x["seed"], x["step"]): x for x in read_lines(
        args.results or "", "variant", "seed", "step", "runs", "match", "sequences", *KINDS[:1])
        if (x["runs"], x["match"], x["sequences"]) == (name, args.match, args.windows)}
    if args.show:
        steps = args.steps or sorted({step for *_, step in found})[-1:]
    else:
        steps = measure_all(args, name, found)
    if not steps:
        raise UserError(f"{args.results} has no line of {name} with these settings yet")
    tables = {}
    for step in steps:
        keys = {variant: [(variant, seed, step) for seed in range(args.seeds)]
                for variant in args.variants}
        tables[step] = results = {variant: [found[key] for key in some]
                                  for variant, some in keys.items() if found.keys() >= {*some}}
        if args.variants[0] not in results:
            raise UserError(f"{args.results} has no {args.seeds} seeds of {args.variants[0]} at "
                            f"step {step} of {name}")
        if missing := [variant for variant in args.variants if variant not in results]:
            print(f"note: no {args.seeds} seeds of {', '.join(missing)} at step {step}",
                  file=sys.stderr)
        one = results[args.variants[0]][0]
        print(f"\n{name}, step {step:,}: {one['predictions']:,} predictions in "
              f"sequences of {one['length']} tokens, ± over {args.seeds} seeds\n"
              f"{table(lines(results, one['shares']))}\n\nshare of attention on what followed the "
              f"same token before\n{table(copying_lines(results))}")
    save(args, "induction", dict(shares=one["shares"], runs=results),
         plot_steps(plt, tables) if len(tables) > 1 else plot(plt, results, one["shares"]))


if __name__ == "__main__":
    run_script(main)
