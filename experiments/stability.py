"""
Do gradients vanish or explode through the recursion, and from which order?

    python experiments/stability.py --out out/stability
    python experiments/stability.py --quick

Orders 1 to 6, in several forms: each inner step of model.py, where every loop averages the
unrefined stream s once more; and `free`, h <- Attn(h, h, h), where it averages averages. Each is
measured in two ways, at several depths:

- at initialisation, the norm of the gradient on W_q, W_k and W_v, per layer, relative to order 1;
- in training on English bytes at several learning rates, the last loss, the share of runs that
  diverged (not finite, or above a uniform guess), spikes (a step's loss over 0.5 nats above the
  median of the previous ten), and the largest attention logit at the end.
"""

import math
import os
import statistics

import torch
import torch.nn.functional as F
from figures import WIDTH, name_lines, style
from runs import source
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common import INNERS, parse, pyplot, save, table

from model import GPT, CausalSelfAttention, GPTConfig, attend
from nanonexus.cli import Parser, UserError, listed, number, positive_int, rate, run_script
from nanonexus.data import Dataset, count_sequences, pydocs, train_indices
from nanonexus.files import append_line, output_file, read_lines
from nanonexus.stats import mean_spread, paired, paired_text

FORMS = (*INNERS, "free")
T, BATCH = 64, 16
KEY = ("form", "order", "depth", "lr", "seed", "width", "steps")  # identifies a run


class Free(CausalSelfAttention):
    """`self` without its anchor s: a loop averages the last output."""

    def inner_step(self, n, h, s, ctx, name):
        return attend(h[n], h[n], h[n], ctx, name)


def build(order, form, depth, args, seed):
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=320, block_size=T, n_layer=depth, n_head=4, n_embd=args.width, rotary_pct=1.0,
        parallel_residual=False, gelu="erf", nexus_order=order,
        nexus_inner="self" if form == "free" else form)
    return GPT(config, attention=Free) if form == "free" else GPT(config)


def gradients(model):
    """Norms of the gradients on W_q, W_k, W_v: (layers, 3)."""
    return torch.stack([torch.stack([g.norm() for g in block.attn.qkv.weight.grad.chunk(3)])
                        for block in model.blocks])


class Scores(TorchFunctionMode):
    """Inside, collects the largest |score| that each causal scaled_dot_product_attention sees."""

    def __init__(self):
        super().__init__()
        self.largest = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            assert kwargs["is_causal"] and q.size(2) == k.size(2)
            self.largest.append((q @ k.mT).tril().abs().max().item() / math.sqrt(q.size(-1)))
        return func(*args, **kwargs or {})


@torch.no_grad()
def largest_logit(model, idx):
    """The largest |score| that any softmax of the model sees on idx, inner and outer."""
    with Scores() as scores:
        model(idx)
    return max(scores.largest)


def train(order, form, depth, lr, args, seed, batches):
    model = build(order, form, depth, args, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    losses, norms, spikes, start = [], [], 0, None
    for step in range(args.steps):
        for group in optimizer.param_groups:  # warm-up, then constant: nothing hides a bad rate
            group["lr"] = lr * min(1, (step + 1) / 10)
        loss = model(*batches(seed, step))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if step >= 10 and losses[-1] > statistics.median(losses[-11:-1]) + 0.5:
            spikes += 1
        optimizer.zero_grad()
        loss.backward()
        start = start or gradients(model).tolist()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    last = statistics.mean(losses[-10:])
    return dict(start=start, loss=last, diverged=not last < math.log(256), spikes=spikes,
                largest_norm=max(norms), largest_logit=largest_logit(model, batches(seed, 0)[0]))


def start_rows(starts, depth):
    yield ["", "order", "W_q", "W_k", "W_v", "W_k, first layer / last"]
    base = torch.tensor(starts[f"{FORMS[0]} 1 depth {depth}"])  # (seeds, layers, 3)
    for form in FORMS:
        for order in range(1, 7):
            if (key := f"{form} {order} depth {depth}") in starts:
                g = torch.tensor(starts[key])
                ratio = (g / base).log().mean(1).exp()  # over layers, geometrically; (seeds, 3)
                ends = (g[:, 0, 1] / g[:, -1, 1]).tolist()
                yield [form, order, *(mean_spread(c.tolist(), 3) for c in ratio.T),
                       mean_spread(ends, 2)]


def train_rows(runs, depth, lr, orders):
    yield ["", "order", "loss", "minus order 1 [99%]", "diverged", "spikes", "largest logit"]
    base = [run["loss"] for run in runs[f"{FORMS[0]} 1 depth {depth} lr {lr}"]]
    for form in FORMS:
        for order in orders:
            group = runs[f"{form} {order} depth {depth} lr {lr}"]
            losses = [run["loss"] for run in group]
            yield [form, order, mean_spread(losses, 3),
                   "" if order == 1 else paired_text(paired(losses, base), 3),
                   f"{sum(run['diverged'] for run in group)}/{len(group)}",
                   sum(run["spikes"] for run in group),
                   mean_spread([run["largest_logit"] for run in group], 1)]


def plot(plt, starts, runs, args):
    """Above: gradients by depth; below: losses and logits of the deepest, by learning rate."""
    columns = max(len(args.depths), len(args.lrs) + 1)
    figure, panels = plt.subplots(2, columns, figsize=(WIDTH, 5.4), squeeze=False)
    deepest = args.depths[-1]

    def draw(panel, values, title, **settings):
        ends = {}
        for form in FORMS:
            y = torch.tensor([values(form, m) for m in args.orders])  # (orders, seeds)
            panel.errorbar(args.orders, y.mean(1), y.std(1), elinewidth=0.7, **style(form))
            ends[form] = args.orders[-1], y[-1].mean().item()
        panel.set(title=title, xlabel="order", **settings)
        if settings["yscale"] == "log":
            panel.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(plt.NullLocator())
        name_lines(panel, ends)

    for panel, depth in zip(panels[0], args.depths, strict=False):
        base = torch.tensor(starts[f"{FORMS[0]} 1 depth {depth}"])
        draw(panel, lambda form, m, base=base, depth=depth: (torch.tensor(
            starts[f"{form} {m} depth {depth}"]) / base)[..., 1].log().mean(1).exp().tolist(),
            f"gradient on W_k, {depth} layers", yscale="log")
    for i, name in enumerate((*args.lrs, "largest_logit")):
        lr, key = (name, "loss") if i < len(args.lrs) else (args.lrs[-1], name)
        title = f"loss after {args.steps} steps, rate {lr:g}" if key == "loss" \
            else f"largest logit, rate {lr:g}"
        draw(panels[1][i], lambda form, m, lr=lr, key=key: [
            run[key] for run in runs[f"{form} {m} depth {deepest} lr {lr}"]],
            title, yscale="linear" if key == "loss" else "log")
    for panel in [*panels[0][len(args.depths):], *panels[1][len(args.lrs) + 1:]]:
        panel.axis("off")
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--orders", type=listed(positive_int), default="1,2,3,4,5,6",
        help="1 first (default: 1 to 6)")
    add("--depths", type=listed(positive_int), default="2,6", help="layers (default: 2,6)")
    add("--lrs", type=listed(rate), default="3e-3,3e-2", help="(default: 3e-3,3e-2)")
    add("--width", type=positive_int, default=64, help="width of the model, a multiple of 8 "
        "(default: 64)")
    add("--steps", type=positive_int, default=50, help="steps of training (default: 50)")
    add("--seeds", type=number(int, 2, 1000), default=3, help="seeds of each setting (default: 3)")
    add("--results", help="file to which each finished run appends a line, and whose runs are not "
        "repeated (default: OUT/results.jsonl)")
    add("--quick", action="store_true", help="orders 1, 2 and 6, few steps: under a minute")
    add("--out", default="out/stability", help="folder (default: out/stability)")
    args = parse(parser)
    if args.quick:
        args.orders, args.depths, args.lrs, args.steps, args.seeds = [1, 2, 6], [2], [1e-2], 20, 2
    if args.orders[0] != 1:
        raise UserError("--orders must begin with 1, with which the others are compared")
    if args.width % 8:
        raise UserError(f"--width must be a multiple of 8, got {args.width}")
    plt, path = pyplot(args.out), args.results or os.path.join(args.out, "results.jsonl")
    output_file(path)
    torch.set_num_threads(1)  # the models are small: two threads would wait for each other
    tokens = Dataset(pydocs(os.path.join(args.out, "pydocs")))
    n = count_sequences(tokens.train, T)

    def batches(seed, step):
        indices = train_indices(n, seed, step, BATCH, 0, 1)
        return tokens.load("train", T, indices, torch.device("cpu"))

    lines = {tuple(line[k] for k in KEY): line for line in read_lines(path, *KEY, "start")}
    made = source(lines.values())

    def measured(form, order, depth, lr, seed):
        """The line of a run; at order 1 all forms are one model."""
        key = FORMS[0] if order == 1 else form, order, depth, lr, seed, args.width, args.steps
        if key not in lines:
            lines[key] = dict(zip(KEY, key, strict=True)) | made | train(
                order, form, depth, lr, args, seed, batches)
            append_line(path, lines[key])
        return lines[key]

    starts, runs = {}, {}
    jobs = [(form, m, d) for d in args.depths for form in FORMS for m in args.orders]
    for form, m, d in tqdm(jobs, desc="training", disable=None, leave=False):
        for lr in args.lrs:
            runs[f"{form} {m} depth {d} lr {lr}"] = found = [
                measured(form, m, d, lr, seed) for seed in range(args.seeds)]
        starts[f"{form} {m} depth {d}"] = [line["start"] for line in found]
    for d in args.depths:
        print(f"\n{d} layers at initialisation: gradient relative to order 1, geometric mean over "
              f"layers\n{table(start_rows(starts, d))}")
        for lr in args.lrs:
            print(f"\n{d} layers, learning rate {lr:g}, {args.steps} steps\n"
                  f"{table(train_rows(runs, d, lr, args.orders))}")
    print("± over seeds; paired by seed, * is p < 0.01")
    save(args, "stability", runs, plot(plt, starts, runs, args))


if __name__ == "__main__":
    run_script(main)
