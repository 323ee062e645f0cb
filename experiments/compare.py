"""
Does Nexus learn more than its baseline from the same tokens, and from the same compute?

    python experiments/compare.py                                  # baseline and order 2, 3 seeds
    python experiments/compare.py --quick                          # a small model, half a minute
    python experiments/compare.py --variants baseline,nexus-2,longer,deeper --seeds 6
    python experiments/compare.py --preset pythia-70m --dataset tokens/fw -- --micro_batch 32

Each run is train.py in a folder of its own under --out; all variants of a seed read the same tokens
in the same order. Two controls spend order 2's FLOPs on a baseline instead: `longer` takes more
steps, its learning rate decayed over all of them, and `deeper` has more layers, hence parameters.
Prints a table, writes compare.json and compare.png. Interrupted, the same command continues where
it was. What follows -- goes to train.py as it is.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace

from common import ROOT, mean_spread, paired, paired_text, pydocs, pyplot, save, table

from model import GPT, PRESETS, GPTConfig
from nanonexus.checkpoint import read_checkpoint
from nanonexus.cli import Parser, UserError, run_script

VARIANTS = {  # name -> the flags of train.py that make it
    "baseline": "--nexus_order 1",
    "nexus-2": "--nexus_order 2",
    "nexus-3": "--nexus_order 3",
    "k-only": "--nexus_order 2 --nexus_streams k",
    "q-only": "--nexus_order 2 --nexus_streams q",
    "shared": "--nexus_order 2 --nexus_inner shared",
    "separate": "--nexus_order 2 --nexus_inner separate",
    # two baselines with the FLOPs of order 2: see equal_compute
    "longer": "--nexus_order 1",  # and more steps
    "deeper": "--nexus_order 1 --n_layer {deeper}",
}
QUICK = ("--n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --batch_tokens 1024 --micro_batch 16 "
         "--warmup_steps 10").split()


def train(flags, folder, max_steps, say):
    """Run train.py to max_steps in folder, from its checkpoint if it has one; return its log."""
    log = os.path.join(folder, "log.jsonl")
    if not os.path.exists(os.path.join(folder, "ckpt.pt")) or read_log(log)[-1]["step"] < max_steps:
        print(say, flush=True)
        command = [sys.executable, os.path.join(ROOT, "train.py"), "--out", folder, "--no-sample",
                   "--max_steps", str(max_steps), *flags]
        if os.path.exists(os.path.join(folder, "ckpt.pt")):
            command.append("--resume")
        process = subprocess.Popen(command)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # train.py has it too: it finishes its step, and saves
            code = process.wait()
        if code:
            raise UserError(f"train.py stopped with status {code}; the same command continues")
    return read_log(log)


def read_log(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def equal_compute(config, max_steps):
    """How long, or how deep, a baseline (a GPTConfig) must be to spend what order 2 spends:
    dict(longer=steps, deeper=layers), the whole numbers that come nearest."""
    T, base = config.block_size, replace(config, nexus_order=1)
    price = [GPT(c).flops_per_token(T)
             for c in (base, replace(base, nexus_order=2), replace(base, n_layer=base.n_layer + 1))]
    more_layers = max(1, round((price[1] - price[0]) / (price[2] - price[0])))
    return dict(longer=round(max_steps * price[1] / price[0]), deeper=base.n_layer + more_layers)


def summarise(runs, config):
    """One variant's row from its runs' logs, a list over seeds."""
    T = config.block_size
    model = GPT(config)
    points = [[event for event in log if event["val_loss"] is not None] for log in runs]
    speeds = [event["tokens_per_sec"] for log in runs for event in log if event["tokens_per_sec"]]
    return dict(parameters=model.num_params(), flops_per_token=model.flops_per_token(T),
                tokens_per_sec=statistics.median(speeds),
                val_loss=[log[-1]["val_loss"] for log in points],
                tokens=[event["tokens"] for event in points[0]],
                curves=[[event["val_loss"] for event in log] for log in points])


def rows(results):
    base = results.get("baseline")
    yield ("variant", "parameters", "FLOPs/token", "FLOPs", "tokens/s", "val loss, nats",
           "minus baseline [99% interval]")
    for name, r in results.items():
        gap = "" if base in (None, r) else paired_text(r["minus_baseline"])
        flops = r["flops_per_token"]
        yield (name, f"{r['parameters']:,}", f"{flops / 1e6:,.2f} M",
               f"{flops * r['tokens'][-1]:.2e}", f"{r['tokens_per_sec']:,.0f}",
               mean_spread(r["val_loss"]), gap)


def plot(plt, results, title):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, r in results.items():
        middle = [statistics.mean(at) for at in zip(*r["curves"], strict=True)]
        low = [min(at) for at in zip(*r["curves"], strict=True)]
        high = [max(at) for at in zip(*r["curves"], strict=True)]
        for panel, unit in zip(panels, (1, r["flops_per_token"]), strict=True):
            x = [tokens * unit for tokens in r["tokens"]]
            panel.plot(x[1:], middle[1:], label=name, marker=".")  # without the untrained point
            panel.fill_between(x[1:], low[1:], high[1:], alpha=0.2)
    panels[0].set(xlabel="tokens", ylabel="validation loss (nats per token)", title=title)
    panels[1].set(xlabel="training compute (FLOPs)", title="the same, against compute")
    panels[0].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def main():
    argv = sys.argv[1:]
    extra = argv[argv.index("--") + 1:] if "--" in argv else []
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variants", default="baseline,nexus-2", help=f"a list of {', '.join(VARIANTS)}, or all "
        "(default: baseline,nexus-2)")
    add("--seeds", type=int, default=3, help="seeds 0 to N-1, each for every variant (default: 3)")
    add("--preset", choices=PRESETS, default="tiny")
    add("--dataset", default="pydocs", help="pydocs (default), or a token set's folder")
    add("--max_steps", type=int, default=250, help="of every run (default: 250)")
    add("--eval_interval", type=int, default=50, help="steps between validations (default: 50)")
    add("--quick", action="store_true", help="a small model, 40 steps, to see that it works")
    add("--out", default="out/compare", help="folder (default: out/compare)")
    args = parser.parse_args(argv[:argv.index("--")] if "--" in argv else argv)
    if args.quick:
        args.max_steps, args.eval_interval, extra = 40, 20, QUICK + extra
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}, or all")
    if names[0] in ("longer", "deeper"):
        raise UserError(f"{names[0]} cannot come first: put baseline before it")
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    plt = pyplot()

    os.makedirs(args.out, exist_ok=True)
    settings = dict(preset=args.preset, dataset=args.dataset, max_steps=args.max_steps, extra=extra)
    path = os.path.join(args.out, "settings.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if json.load(f) != settings:
                raise UserError(f"{args.out} holds runs with other settings (settings.json): "
                                "choose another --out, or remove it")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(settings, f)
    dataset = args.dataset
    if dataset == "pydocs":  # one copy for all runs
        dataset = pydocs(os.path.join(args.out, "pydocs"))

    logs, configs, equal = {name: [] for name in names}, {}, {}
    for seed in range(args.seeds):
        for name in names:
            folder = os.path.join(args.out, f"{name}-seed{seed}")
            flags = ["--preset", args.preset, "--dataset", dataset, "--seed", str(seed),
                     "--eval_windows", "1024", "--eval_interval", str(args.eval_interval),
                     "--log_interval", str(args.eval_interval), "--save_interval", "100",
                     *extra, *VARIANTS[name].format(**equal).split()]
            done = sum(map(len, logs.values()))
            steps = equal["longer"] if name == "longer" else args.max_steps
            logs[name].append(train(flags, folder, steps, f"\n[{done + 1}/"
                                    f"{len(names) * args.seeds}] {name}, seed {seed}"))
            configs[name] = GPTConfig(**read_checkpoint(os.path.join(folder, "ckpt.pt"))["config"])
            equal = equal or equal_compute(configs[name], args.max_steps)

    results = {name: summarise(logs[name], configs[name]) for name in names}
    if "baseline" in names:
        for r in results.values():
            r["minus_baseline"] = paired(r["val_loss"], results["baseline"]["val_loss"])
    print(f"\n{table(rows(results))}\n\n± is the standard deviation over {args.seeds} seeds; "
          "differences are paired by seed, below 0 is better, * is p < 0.01")
    save(args, "compare", results, plot(plt, results, f"{args.preset}, {args.seeds} seeds"))
    print(f"Some text: python sample.py --checkpoint {args.out}/{names[-1]}-seed0/ckpt.pt "
          "--prompt 'The '")


if __name__ == "__main__":
    run_script(main)
