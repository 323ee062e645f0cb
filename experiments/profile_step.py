"""
Where does the time of a training step go?

    python experiments/profile_step.py --preset pythia-70m --nexus_order 2 --out out/profile
    python experiments/profile_step.py --quick

The step is train.py's: compiled and in bfloat16 on CUDA. After a warm-up three steps are profiled.
Prints the ten kernels that take longest (on a CPU: operators) with their share of the time; writes
profile.json, and trace.json for chrome://tracing.
"""

import os
from dataclasses import replace

import torch
from cost import training_step
from torch.profiler import ProfilerActivity, profile

from common import table

from model import GPT, PRESETS, GPTConfig
from nanonexus.cli import Parser, positive_int, run_script
from nanonexus.device import keep_freed_memory
from nanonexus.files import output_folder, write_json

STEPS = 3


def main():
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="pythia-70m", help="(default: pythia-70m)")
    add("--nexus_order", type=positive_int, default=1, help="(default: 1)")
    add("--nexus_inner", default="cross", help="(default: cross)")
    add("--micro_batch", type=positive_int, default=32, help="windows at once (default: 32)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--quick", action="store_true", help="a tiny model, two windows")
    add("--out", default="out/profile", help="folder (default: out/profile)")
    args = parser.parse_args()
    output_folder(args.out)
    if args.quick:
        args.preset, args.micro_batch = "tiny", 2
    if args.device == "cpu":
        keep_freed_memory()
    args.compile = args.device == "cuda"
    config = replace(GPTConfig(**PRESETS[args.preset]), nexus_order=args.nexus_order,
                     nexus_inner=args.nexus_inner)
    model = GPT(config).to(args.device).train()
    idx = torch.randint(config.vocab_size, (args.micro_batch, config.block_size + 1),
                        device=args.device)
    step = training_step("", model, idx[:, :-1], idx[:, 1:], args)
    for _ in range(3):  # compiles, fills caches
        step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * args.compile
    with profile(activities=kinds) as profiler:
        for _ in range(STEPS):
            step()

    def own(event):  # microseconds
        return event.self_device_time_total if args.compile else event.self_cpu_time_total

    events = sorted((e for e in profiler.key_averages() if own(e)), key=own, reverse=True)
    busy = sum(map(own, events)) / STEPS
    rows = [dict(name=e.key, ms=own(e) / STEPS / 1e3, share=own(e) / STEPS / busy,
                 calls=e.count / STEPS) for e in events[:10]]
    print(f"{args.preset}, order {args.nexus_order}, {idx[:, 1:].numel():,} tokens per step, "
          f"{args.device}: {busy / 1e3:.2f} ms busy per step")
    print(table([["kernel", "ms per step", "share", "calls"],
                 *([r["name"][:70], f"{r['ms']:.3f}", f"{r['share']:.1%}", f"{r['calls']:g}"]
                   for r in rows)]))
    profiler.export_chrome_trace(os.path.join(args.out, "trace.json"))
    write_json(os.path.join(args.out, "profile.json"),
               dict(settings=vars(args), busy_ms=busy / 1e3, kernels=rows))
    print(f"wrote {args.out}/profile.json and trace.json")


if __name__ == "__main__":
    run_script(main)
