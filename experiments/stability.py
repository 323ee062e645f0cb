"""
Does the recursion vanish or explode, and from which order?

    python experiments/stability.py --out out/stability
    python experiments/stability.py --quick

Orders 1 to 6, in two forms: anchored, as in model.py, h <- Attn(h, h, s), where every loop averages
the unrefined stream s once more; and free, h <- Attn(h, h, h), where it averages averages. Two
looks at each, at several depths:

- at initialisation, the norm of the gradient on W_q, W_k and W_v, per layer, relative to order 1;
- in training on English bytes at several learning rates, the last loss, the share of runs that
  diverged (not finite, or above a uniform guess), spikes (a step's loss over 0.5 nats above the
  median of the ten before), and the largest attention logit at the end.
"""

import math
import os
import statistics
import types

import torch
from tqdm import tqdm

from common import listed, mean_spread, paired, paired_text, pydocs, pyplot, save, table

from model import GPT, GPTConfig, Rotary
from nanonexus.cli import Parser, UserError, run_script
from nanonexus.data import TokenSet, batch, train_indices, windows

FORMS = ("anchored", "free")
T, BATCH = 64, 16


def free(self, s, env):
    """Attention.refine without its anchor: the values of a loop are what the last one made."""
    h = s
    for loop in range(1, self.config.nexus_order):
        h = self.attend(h, h, h, f"k{loop}", env)
    return h


def build(order, form, depth, args, seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=320, block_size=T, n_layer=depth, n_head=4, n_embd=args.width,
                          rotary_pct=1.0, parallel_residual=False, gelu="erf", nexus_order=order))
    if form == "free":
        for block in model.blocks:
            block.attn.refine = types.MethodType(free, block.attn)
    return model


def gradients(model):
    """Norms of the gradients on W_q, W_k, W_v: (layers, 3)."""
    return torch.stack([torch.stack([g.norm() for g in block.attn.qkv.weight.grad.chunk(3)])
                        for block in model.blocks])


@torch.no_grad()
def largest_logit(model, idx):
    """The largest |score| that any softmax of the model sees on idx, inner and outer."""
    sizes = []

    def recorded(attend):
        def wrapper(a, b, c, key_name, env):
            query, key = (Rotary.apply(x, *env.rope) for x in (a, b))
            sizes.append((query @ key.mT).abs().max().item() / math.sqrt(a.size(-1)))
            return attend(a, b, c, key_name, env)
        return wrapper

    for block in model.blocks:
        block.attn.attend = recorded(block.attn.attend)
    model(idx)
    for block in model.blocks:
        del block.attn.attend  # the class's own again
    return max(sizes)


def at_start(order, form, depth, args, seed, batches):
    model = build(order, form, depth, args, seed)
    model(*batches(seed, 0))[1].backward()
    return gradients(model).tolist()


def train(order, form, depth, lr, args, seed, batches):
    model = build(order, form, depth, args, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    losses, norms, spikes = [], [], 0
    for step in range(args.steps):
        for group in optimizer.param_groups:  # warm-up, then constant: nothing hides a bad rate
            group["lr"] = lr * min(1, (step + 1) / 10)
        loss = model(*batches(seed, step))[1]
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if step >= 10 and losses[-1] > statistics.median(losses[-11:-1]) + 0.5:
            spikes += 1
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    last = statistics.mean(losses[-10:])
    return dict(loss=last, diverged=not last < math.log(256), spikes=spikes,
                largest_norm=max(norms), largest_logit=largest_logit(model, batches(seed, 0)[0]))


def start_rows(starts, depth):
    yield ["", "order", "W_q", "W_k", "W_v", "W_k, first layer / last"]
    for form in FORMS:
        base = torch.tensor(starts[f"{form} 1 depth {depth}"])  # (seeds, layers, 3)
        for order in range(1, 7):
            if (key := f"{form} {order} depth {depth}") in starts:
                g = torch.tensor(starts[key])
                ratio = (g / base).log().mean(1).exp()  # over layers, geometrically; (seeds, 3)
                ends = (g[:, 0, 1] / g[:, -1, 1]).tolist()
                yield [form, order, *(mean_spread(c.tolist(), 3) for c in ratio.T),
                       mean_spread(ends, 2)]


def train_rows(runs, depth, lr, orders):
    yield ["", "order", "loss", "minus order 1 [99%]", "diverged", "spikes", "largest logit"]
    base = [run["loss"] for run in runs[f"anchored 1 depth {depth} lr {lr}"]]
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
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2))
    for i, depth in enumerate(args.depths):
        for form, style in zip(FORMS, ("-", "--"), strict=True):
            base = torch.tensor(starts[f"{form} 1 depth {depth}"])
            for part, color in ((0, f"C{2 * i}"), (1, f"C{2 * i + 1}")):
                ratio = [(torch.tensor(starts[f"{form} {m} depth {depth}"]) / base)[..., part]
                         .log().mean().exp() for m in args.orders]
                panels[0].semilogy(args.orders, ratio, style, marker=".", color=color,
                                   label=f"W_{'qk'[part]}, {depth} layers, {form}")
    for panel, name in ((panels[1], "loss"), (panels[2], "largest_logit")):
        for i, lr in enumerate(args.lrs):
            for form, style in zip(FORMS, ("-", "--"), strict=True):
                values = torch.tensor([[run[name] for run in
                                        runs[f"{form} {m} depth {args.depths[-1]} lr {lr}"]]
                                       for m in args.orders])
                panel.errorbar(args.orders, values.mean(1), values.std(1), ls=style, marker=".",
                               color=f"C{i}", capsize=2, label=f"rate {lr:g}, {form}")
    panels[0].set(title="gradient at initialisation, relative to order 1", xlabel="order")
    panels[1].set(title=f"loss after {args.steps} steps, {args.depths[-1]} layers", xlabel="order")
    panels[2].set(title="largest attention logit after training", xlabel="order", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--orders", type=listed(int), default="1,2,3,4,5,6", help="1 first (default: 1 to 6)")
    add("--depths", type=listed(int), default="2,6", help="layers (default: 2,6)")
    add("--lrs", type=listed(float), default="3e-3,3e-2", help="(default: 3e-3,3e-2)")
    add("--width", type=int, default=64, help="of the model (default: 64)")
    add("--steps", type=int, default=50, help="of training (default: 50)")
    add("--seeds", type=int, default=3, help="of every setting (default: 3)")
    add("--quick", action="store_true", help="orders 1, 2 and 6, few steps: under a minute")
    add("--out", default="out/stability", help="folder (default: out/stability)")
    args = parser.parse_args()
    if args.quick:
        args.orders, args.depths, args.lrs, args.steps, args.seeds = [1, 2, 6], [2], [1e-2], 20, 2
    if args.orders[0] != 1 or min(args.orders + args.depths + [args.steps, args.seeds]) < 1 \
            or min(args.lrs) <= 0 or args.width % 8 or args.width < 8:
        raise UserError("--orders must begin with 1, --width be a multiple of 8, the rest above 0")
    plt = pyplot()
    torch.set_num_threads(1)  # the models are small: two threads would wait for each other
    text = TokenSet(pydocs(os.path.join(args.out, "pydocs"))).train
    n = windows(text, T)

    def batches(seed, step):
        indices = train_indices(n, seed, step, BATCH, 0, 1)
        return [torch.from_numpy(part) for part in batch(text, T, indices)]

    seeds, starts, runs = range(args.seeds), {}, {}
    jobs = [(form, m, d) for d in args.depths for form in FORMS for m in args.orders]
    for form, m, d in tqdm(jobs, desc="training", disable=None, leave=False):
        key = f"{form} {m} depth {d}"
        if m <= 2 and form == "free":  # the first loop of both forms is the same
            starts[key] = starts[f"anchored {m} depth {d}"]
            runs |= {f"{key} lr {lr}": runs[f"anchored {m} depth {d} lr {lr}"] for lr in args.lrs}
            continue
        starts[key] = [at_start(m, form, d, args, seed, batches) for seed in seeds]
        for lr in args.lrs:
            runs[f"{key} lr {lr}"] = [train(m, form, d, lr, args, s, batches) for s in seeds]
    for d in args.depths:
        print(f"\n{d} layers at initialisation: gradient relative to order 1, geometric mean over "
              f"layers\n{table(start_rows(starts, d))}")
        for lr in args.lrs:
            print(f"\n{d} layers, learning rate {lr:g}, {args.steps} steps\n"
                  f"{table(train_rows(runs, d, lr, args.orders))}")
    print("± over seeds; paired by seed, * is p < 0.01")
    save(args, "stability", dict(start=starts, training=runs), plot(plt, starts, runs, args))


if __name__ == "__main__":
    run_script(main)
