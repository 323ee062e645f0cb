"""
Can a single layer look up what goes with a key?

    python experiments/recall.py --out out/recall
    python experiments/recall.py --tasks mqar-64,mqar-64-two-layers --variants baseline,self,past
    python experiments/recall.py --show --results docs/results/recall.jsonl
    python experiments/recall.py --quick

Problems give pairs of a key and a value, then the keys again in another order; after each key the
model must name its value. Keys and values are drawn afresh for each problem, so nothing can be
memorised. Standard attention needs two layers, one to join each value with its key and one to look
the key up; a refined key can carry its neighbour within one layer. The tasks:

  one-hop   the value comes right after its key, and the questions right after the pairs
  gapped    0 to 3 fillers between a key and its value, 0 to 12 before the questions: out of reach
            of a shift by any fixed number of tokens; gapped-12: 0 to 12 between key and value
  mqar-64   multi-query associative recall (Arora et al. 2023, https://arxiv.org/abs/2312.04927) in
            64 tokens with 4 pairs and 8,192 symbols; the data are as in HazyResearch/zoology,
            zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py and
            zoology/data/multiquery_ar.py, the model and its training are those of this file
  hops-K-L-layers  K hops of induction (Sanford et al. 2024, https://arxiv.org/abs/2402.09268) among
            99 random letters of four, in L layers; trained on 0 to K hops, evaluated on K, as in
            chsanford/hop-induction-heads, src/tasks.py

Blocks are sequential; with -parallel they are Pythia's, whose MLP never sees what attention
found. mqar-64-two-layers gives every variant two layers; mqar-64-v64, -v512 and -v2048 have that
many symbols instead of 8,192. The variant two-layers is a baseline with a second layer;
two-layers-small and two-layers-fan-in are the same from other initialisations, and key-shift-0.02,
-0.12 and -0.95 a key shift whose a is initially not 1/2.

The learning rate of each variant is chosen on seed 1000 from the same small grid, by the area under
its curve, unless --lrs is one rate; then the seeds that count are run. A run stops when it answers
everything twice in a row, and keeps that accuracy. Each finished run is appended to --results and
is never run again; interrupted, the same command continues. A run either solves a task or does not,
so every seed is shown, and no mean.
"""

import itertools
import os
import time
from typing import NamedTuple

import compare
import torch
import torch.nn.functional as F
from compare import LR_SEED, model_fields, read_variant
from figures import WIDTH, seed_strips, write
from puzzles import SYMBOLS, TASKS, one_hop
from runs import source
from tqdm import tqdm

from common import INNERS, parse, pyplot, save, table

from model import GPTConfig, output_layer
from nanonexus.cli import (
    Parser,
    UserError,
    listed,
    number,
    one_of,
    positive_int,
    rate,
    run_script,
)
from nanonexus.controls import build as build_model
from nanonexus.files import append_line, output_file, read_lines

VARIANTS = {  # fields of GPTConfig: compare.py's variants, of one layer
    **{name: model_fields(read_variant(name)) for name in compare.VARIANTS},
    # baselines with more parameters and more compute, from three initialisations: see initialise
    **dict.fromkeys(("two-layers", "two-layers-small", "two-layers-fan-in"), dict(n_layer=2)),
    **{f"key-shift-{a}": dict(control="key-shift") for a in (0.02, 0.12, 0.95)},
}


class RecallRun(NamedTuple):
    """What identifies a run: the key of its line in the results."""

    task: str
    variant: str
    seed: int
    lr: float
    pairs: int
    steps: int
    width: int
    heads: int
    batch: int


def build(run, **overrides):
    task = TASKS[run.task]
    length = task.problems(1, run.pairs, torch.Generator())[0].size(1)
    model = build_model(GPTConfig(**dict(
        vocab_size=task.vocab, block_size=length, n_layer=task.layers, n_head=run.heads,
        n_embd=run.width, rotary_pct=1.0, parallel_residual=task.parallel, gelu="erf")
        | VARIANTS[run.variant] | overrides))
    initialise(model, run.variant)
    return model


@torch.no_grad()
def initialise(model, variant):
    """The initialisations that are not model.py's. -small: output projections at a tenth, since
    GPT-NeoX's are made for many layers; -fan-in: embeddings of standard deviation 1, matrices of
    1 / sqrt(fan-in), output projections also / sqrt(2 layers); key-shift-A: the shift's a."""
    outputs = [m for block in model.blocks for m in (block.attn.proj, block.mlp.down)]
    if variant.endswith("-small"):
        for linear in outputs:
            linear.weight.mul_(0.1)
    elif variant.endswith("-fan-in"):
        model.embed.weight.normal_()
        for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.normal_(std=linear.in_features ** -0.5)
        for linear in outputs:
            linear.weight.mul_((2 * len(model.blocks)) ** -0.5)
    elif variant.startswith("key-shift-"):
        for block in model.blocks:
            block.attn.shift.fill_(torch.tensor(float(variant[10:])).logit())


def logits_and_answers(model, idx, targets):
    """The model's logits at the questions, (n, V), and the right answers, (n,)."""
    asked = targets >= 0
    return output_layer(model.hidden_states(idx)[asked], *model.output_weights()), targets[asked]


@torch.no_grad()
def accuracy(model, idx, targets):
    logits, answers = logits_and_answers(model, idx, targets)
    return (logits.argmax(-1) == answers).float().mean().item()


def train(run):
    """(accuracy on fresh problems after every twentieth of the steps, the model)"""
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = build(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    fresh = (task.exam or task.problems)(256, run.pairs,
                                         torch.Generator().manual_seed(run.seed + 10**6))
    curve = []
    for step in range(1, run.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(step / 20, 1)
        problems = task.problems(run.batch, run.pairs, generator)
        loss = F.cross_entropy(*logits_and_answers(model, *problems))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every(run.steps) == 0:
            curve.append(accuracy(model, *fresh))
            if sum(curve[-2:]) > 2 * 0.999:
                break
    return curve + curve[-1:] * (run.steps // every(run.steps) - len(curve)), model


def every(steps):
    return max(1, steps // 20)


class Results:
    """The lines of finished runs, in memory and in a file."""

    def __init__(self, path, show):
        self.path = path
        self.lines = {RecallRun(*(line[field] for field in RecallRun._fields)): line
                      for line in read_lines(path, *RecallRun._fields, "curve", "parameters")}
        self.source = source(() if show else self.lines.values())

    def finish(self, run):
        """Train the run if its line is missing, and append that."""
        if run in self.lines:
            return
        start = time.process_time()
        curve, model = train(run)
        line = dict(run._asdict(), curve=curve, parameters=model.num_params(), **self.source,
                    cpu_seconds=round(time.process_time() - start, 1), torch=str(torch.__version__))
        append_line(self.path, line)
        self.lines[run] = line

    def best_rate(self, runs):
        """The learning rate of the largest area under the curve: speed counts, not only the end.
        None if one of the runs is missing."""
        if any(run not in self.lines for run in runs):
            return None
        return max(runs, key=lambda run: sum(self.lines[run]["curve"])).lr


def to_try(lrs):
    """The learning rates to choose from: one is no choice."""
    return lrs if len(lrs) > 1 else []


def study(task, variant, args, results, say):
    """The lines of the seeds that count, as far as they exist; args.show makes no new ones."""
    def run(seed, lr):
        return RecallRun(task, variant, seed, lr, args.pairs or TASKS[task].pairs,
                         args.steps or TASKS[task].steps, args.width, args.heads, args.batch)

    def finish(one):
        if not args.show:
            say.set_description(f"{task}, {variant}")
            results.finish(one)
            say.update()

    grid = [run(LR_SEED, lr) for lr in to_try(args.lrs)]
    for one in grid:
        finish(one)
    rate = results.best_rate(grid) if grid else args.lrs[0]
    counted = [run(seed, rate) for seed in range(args.seeds)]
    for one in counted:
        finish(one)
    return [results.lines[one] for one in counted if one in results.lines]


def steps_to(line, level=0.9):
    """The first step at which the accuracy reached the level; None if it never did."""
    return next((every(line["steps"]) * (i + 1) for i, a in enumerate(line["curve"]) if a >= level),
                None)


def permutation_p(a, b):
    """Two-sided p of the difference of means of two lists if their labels mean nothing: the share
    of all relabellings that differ at least as much (exact; 5 and 5: at least 0.008)."""
    pooled, n = a + b, len(a)
    gap = abs(sum(a) / n - sum(b) / len(b))
    deals = [sum(deal) for deal in itertools.combinations(pooled, n)]
    far = [abs(x / n - (sum(pooled) - x) / len(b)) >= gap - 1e-9 for x in deals]
    return sum(far) / len(deals)


def rows(found):
    """found: {variant: lines}. The p are of the areas under the curves."""
    areas = {variant: [sum(line["curve"]) for line in lines] for variant, lines in found.items()}
    bases = ["baseline", "self", "key-shift"] if min(map(len, areas.values())) > 2 else []
    yield ["", "parameters", "learning rate", "accuracy by seed", "steps to 0.9",
           *(f"p: {base}" for base in bases)]
    for variant, lines in found.items():
        p = [f"{permutation_p(areas[variant], areas[base]):.3f}"
             if base in areas and base != variant else "" for base in bases]
        yield [variant, f"{lines[0]['parameters']:,}", f"{lines[0]['lr']:g}",
               " ".join(f"{line['curve'][-1]:.2f}" for line in lines),
               " ".join(str(steps_to(line) or "-") for line in lines), *p]


def plot(plt, found):
    """A panel for each task, a row for each variant, a dot for each seed."""
    n = len(found)
    columns = min(n, 2)
    lines = -(-n // columns)
    height = 0.9 + 0.15 * max(map(len, found.values()))  # room for each variant's name
    figure, panels = plt.subplots(lines, columns, figsize=(WIDTH, height * lines), squeeze=False)
    for panel, (task, variants) in itertools.zip_longest(panels.flat, found.items(),
                                                         fillvalue=(None, None)):
        if task is None:
            panel.axis("off")
            continue
        seed_strips(panel, {name: [steps_to(line) for line in seeds]
                            for name, seeds in variants.items()},
                    next(iter(variants.values()))[0]["steps"])
        panel.set(title=task, xlabel="steps to an accuracy of 0.9")
    return figure


def plot_maps(plt, run, path):
    """The last inner loop and the outer attention of the head that looks up best, one problem."""
    _, model = train(run)
    idx, targets = one_hop(1, run.pairs, torch.Generator().manual_seed(5))
    manual = build(run, attention="manual")
    manual.load_state_dict(model.state_dict())
    maps, c = {}, manual.config
    manual(idx, maps=maps)
    last = c.n_layer - 1, f"{c.nexus_streams[-1]}{c.nexus_order - 1}"
    inner, outer = maps[last][0], maps[c.n_layer - 1, "outer"][0]  # (H, T, T)
    first = 2 * run.pairs  # where the questions begin
    hits = (idx[0] == targets[0, first:, None]).float()  # (n, T): where each answer is
    head = int((outer[:, first:] * hits).sum((1, 2)).argmax())
    names = ["ab"[t // SYMBOLS] + str(t % SYMBOLS) for t in idx[0].tolist()]
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4))
    for panel, weights, title in zip(panels, (inner[head], outer[head]), (
            "inner attention: what a key gathers", "outer attention: what a token reads"),
            strict=True):
        panel.imshow(weights, cmap="Purples", vmin=0, vmax=1)
        panel.set(title=f"{title} (head {head + 1} of {run.heads})", xticks=range(len(names)),
                  yticks=range(len(names)))
        panel.set_xticklabels(names, rotation=90, fontsize=7)
        panel.set_yticklabels(names, fontsize=7)
        panel.axhline(first - 0.5, color="k", lw=0.6)
    figure.tight_layout()
    write(figure, path)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tasks", type=listed(one_of(TASKS)), help=f"of {', '.join(TASKS)} (default: the first "
        "four)", default=list(TASKS)[:4])
    add("--variants", type=listed(one_of(VARIANTS)), help=f"of {', '.join(VARIANTS)} (default: "
        f"baseline, {', '.join(INNERS)}, key-shift, two-layers-fan-in; with --show all)")
    add("--seeds", type=positive_int, default=5, help="seeds that count (default: 5)")
    add("--lrs", type=listed(rate), default="1e-3,3e-3,1e-2",
        help="the grid of learning rates (default: 1e-3,3e-3,1e-2)")
    add("--pairs", type=number(int, 1, SYMBOLS), help="per problem (default: 6; gapped 5; mqar-64 "
        "4; of hops, the letters: 99)")
    add("--steps", type=positive_int, help="steps of training (default: 400; mqar 1000; hops 1000 "
        "K)")
    add("--width", type=positive_int, default=64, help="width of the model (default: 64)")
    add("--heads", type=positive_int, default=2, help="heads of the model (default: 2)")
    add("--batch", type=positive_int, default=64, help="problems per step (default: 64)")
    add("--maps", type=one_of([name for name, c in VARIANTS.items()
                              if "control" not in c and c.get("nexus_order", 1) > 1]),
        metavar="VARIANT", help="also train this one on one-hop and draw its attention, maps.svg")
    add("--results", help="file to which each finished run appends a line (default: "
        "OUT/results.jsonl)")
    add("--show", action="store_true", help="train nothing: tables of the existing lines")
    add("--quick", action="store_true", help="five variants on one-hop at one rate, 60 steps, two "
        "seeds: half a minute")
    add("--out", default="out/recall", help="folder (default: out/recall)")
    args = parse(parser)
    if args.quick:
        args.pairs, args.steps, args.seeds, args.lrs = 3, 60, min(2, args.seeds), [1e-2]
        args.tasks = ["one-hop"]
        args.variants = args.variants or ["baseline", "self", "tokens", "cross", "key-shift"]
    args.variants = args.variants or (list(VARIANTS) if args.show else [
        "baseline", *INNERS, "key-shift", "two-layers-fan-in"])
    plt = pyplot(args.out)
    torch.set_num_threads(1)  # the models are so small that two threads wait for each other
    results = Results(args.results or os.path.join(args.out, "results.jsonl"), args.show)
    found = {}
    if not args.show:
        output_file(results.path)
    runs = len(args.tasks) * len(args.variants) * (args.seeds + len(to_try(args.lrs)))
    with tqdm(total=runs, unit="run", disable=True if args.show else None, leave=False) as say:
        for task in args.tasks:
            lines = {variant: study(task, variant, args, results, say) for variant in args.variants}
            lines = {variant: some for variant, some in lines.items() if some}
            if lines:
                found[task] = lines
                say.clear()
                pairs = lines[next(iter(lines))][0]["pairs"]
                guess = "" if task.startswith("hops") else f" (guessing: {1 / pairs:.2f})"
                print(f"\n{task}{guess}\n{table(rows(lines))}", flush=True)
    if not found:
        raise UserError(f"{results.path} has no finished run of these tasks and settings yet")
    print("accuracy at the end; steps until it first reached 0.9 (-: never); p, from three seeds "
          "on: exact\npermutation test of the areas under the curves")
    save(args, "recall", found, plot(plt, found))
    if args.maps:
        run = RecallRun("one-hop", args.maps, 0, 3e-3, args.pairs or 6, args.steps or 400,
                        args.width, args.heads, args.batch)
        plot_maps(plt, run, os.path.join(args.out, "maps.svg"))


if __name__ == "__main__":
    run_script(main)
