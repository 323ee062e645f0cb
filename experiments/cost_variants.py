"""
What does each variant of compare.py, its controls included, cost in parameters, FLOPs and time?

    python experiments/cost_variants.py
    python experiments/cost_variants.py --variants baseline,key-shift,cross -- --block_size 1024
    python experiments/cost_variants.py --device cuda --batch 16 -- --preset pythia-70m

The models take turns, one training step each (on CUDA compiled, in bfloat16; see cost.py): speeds
are relative to the baseline within each round, next to what FLOPs predict. Arguments after -- are
train.py's: the model's shape.
"""

import sys
from types import SimpleNamespace

import compare
import controls
import torch
from cost import interleave, speeds, training_step

from common import table

import train
from model import GPT
from nanonexus.cli import Parser, UserError, listed, number, positive_int, run_script
from nanonexus.device import check_device, keep_freed_memory

SKIPPED = ("longer", "shift-longer", "deeper")  # steps of others, or one with a layer more


def build(variant, shape):
    """(GPT, FLOPs per token) of a variant; shape: flags of train.py."""
    control, flags = compare.read_variant(variant)
    config = train.make_config(train.build_parser().parse_args([*shape, *flags]),
                               SimpleNamespace(vocab_size=2048), torch.device("cpu"), None)
    with controls.using(control):
        made = GPT(config)
    return made, controls.flops_per_token(control, config, config.block_size)


def rows(models, flops, found):
    yield "variant", "parameters", "FLOPs/token", "speed (quartiles)", "FLOPs predict"
    for name, r in found.items():
        low, high = r["quartiles"]
        yield (name, f"{models[name].num_params():,}", f"{flops[name] / 1e6:,.2f} M",
               f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})",
               f"{flops['baseline'] / flops[name]:.2f}")


def main():
    given, extra = compare.split(sys.argv[1:])
    parser, names = Parser(__doc__), [v for v in compare.VARIANTS if v not in SKIPPED]
    add = parser.add_argument
    add("--variants", type=listed(str), default=names, help=f"of {', '.join(names)} (default: all)")
    add("--rounds", type=number(int, 2, 10**6), default=10, help="measured steps per model "
        "(default: 10)")
    add("--batch", type=positive_int, default=8, help="windows per step (default: 8)")
    add("--device", default="cpu", help="(default: cpu)")
    args = parser.parse_args(given)
    check_device(args.device)
    for name in args.variants:
        if name not in names:
            raise UserError(f"no variant {name!r}: choose from {', '.join(names)}")
    shape = ["--preset", "tiny", *extra]
    built = {name: build(name, shape) for name in dict.fromkeys(["baseline", *args.variants])}
    models, flops = ({name: pair[i] for name, pair in built.items()} for i in range(2))
    config = models["baseline"].config
    idx = torch.randint(config.vocab_size, (args.batch, config.block_size + 1), device=args.device)
    if args.device == "cpu":
        keep_freed_memory()
    args.compile = args.device == "cuda"
    jobs = {name: training_step(name, made.to(args.device), idx[:, :-1].contiguous(),
                                idx[:, 1:].contiguous(), args) for name, made in models.items()}
    found = speeds(interleave(jobs, args.rounds, "steps"), "baseline", args.batch)
    print(table(rows(models, flops, found)))


if __name__ == "__main__":
    run_script(main)
