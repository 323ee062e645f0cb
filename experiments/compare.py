"""
Does Nexus learn more than its baseline, and than cheaper changes, from the same tokens?

    python experiments/compare.py                    # baseline, self, cross and the key shift
    python experiments/compare.py --quick            # a small model, half a minute
    python experiments/compare.py --variants baseline,self,longer,deeper --seeds 6
    python experiments/compare.py --scale text --dataset tokens/books --jobs 2 --out out/text \\
        --variants baseline,key-shift,past,cross
    python experiments/compare.py --preset pythia-70m --dataset tokens/fw -- --micro_batch 32

Each run is train.py in its own folder under --out; all variants of a seed read the same tokens in
the same order. Baselines that spend what order 2 costs: `longer` takes more steps, its learning
rate decayed over all of them, and `deeper` has more layers; `larger` has as many more layers as
it takes to reach the parameters of `separate`. `shift-longer` is a key shift with as many more
steps as order 2 on k costs. With --lrs, each variant's learning rate is first chosen by runs of a
quarter of the length on seed 1000, which is used for nothing else.

Each finished run appends one line to --results, and is never run again while that line is there; an
interrupted one continues. Prints a table, writes compare.json and compare.svg; --show does that
from the existing lines alone. Arguments after -- are passed to train.py.
"""

import math
import os
import statistics
import sys
from dataclasses import fields, replace

import figures
from runs import Study, TrainingRun, check_settings

from common import INNERS, parse, pyplot, save, table

from model import GPTConfig
from nanonexus.cli import Parser, UserError, listed, positive_int, rate, run_script
from nanonexus.controls import CONTROLS, build, replaces_loops
from nanonexus.data import Dataset, pydocs
from nanonexus.files import output_file, read_lines
from nanonexus.flags import PRESETS, build_parser, preset_config
from nanonexus.stats import holm, mean_spread, paired, paired_text

ENDS = {  # of the names of an inner step's variants
    "": "--nexus_order 2 --nexus_inner {}", "-3": "--nexus_order 3 --nexus_inner {}",
    "-k": "--nexus_order 2 --nexus_inner {} --nexus_streams k",
    "-q": "--nexus_order 2 --nexus_inner {} --nexus_streams q",
}
VARIANTS = {  # name -> flags of train.py
    "baseline": "--nexus_order 1",
    **{inner + end: flags.format(inner) for inner in INNERS for end, flags in ENDS.items()},
    **{name: f"--control {name} --nexus_order {2 if replaces_loops(name) else 1}"
       for name in CONTROLS},
    "near-k": "--control near --nexus_order 2 --nexus_streams k",
    "near-gated-k": "--control near-gated --nexus_order 2 --nexus_streams k",
    "shift-past": "--control key-shift --nexus_order 2 --nexus_inner past",
    "shift-past-k": "--control key-shift --nexus_order 2 --nexus_inner past --nexus_streams k",
    "shift-cross-k": "--control key-shift --nexus_order 2 --nexus_inner cross --nexus_streams k",
}
EQUAL = {  # see equals: to the FLOPs of order 2, of order 2 on k, to the parameters of `separate`
    "longer": "--nexus_order 1",  # with more steps
    "deeper": "--nexus_order 1 --n_layer {deeper}",
    "larger": "--nexus_order 1 --n_layer {larger}",
    "shift-longer": "--control key-shift --nexus_order 1",
}
ANY = dict.fromkeys(EQUAL, 1)  # where the name of a variant counts, not its size
SCALES = {  # defaults of flags not given
    "tiny": dict(dataset="pydocs", max_steps=100, eval_interval=50, seeds=3,
                 flags="--eval_windows 1024 --save_interval 100"),
    # 4.1M tokens per run; needs --dataset, made by prepare_data.py --tokenizer bpe:2048
    "text": dict(max_steps=2000, eval_interval=500, seeds=5, lrs=[2e-3, 4e-3, 8e-3],
                 flags="--dtype bfloat16 --warmup_steps 100 --eval_windows 512 "
                       "--save_interval 500 --keep 1"),
}
QUICK = ("--n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --batch_tokens 1024 --micro_batch 16 "
         "--warmup_steps 10").split()
LR_SEED = 1000  # for the runs that choose the learning rate
PARSER = build_parser(__doc__)  # of train.py's flags


def read_variant(name, equal=None):
    """The flags of train.py of a variant; equal: what equals() returns, without it those of EQUAL
    are unknown. UserError if there is no such variant."""
    known = VARIANTS | (EQUAL if equal else {})
    if name not in known:
        raise UserError(f"no variant {name!r}: choose from {', '.join(known)}")
    return known[name].format(**equal or {}).split()


OWN = ["preset", "dataset", "out", "seed", "max_steps", "resume", "sample"]  # set by the scripts


def check_extra(extra, variants, own=OWN):
    """UserError if flags of train.py after -- are unknown, or set by the script or a variant."""
    PARSER.parse_args(extra)
    given = {word.partition("=")[0] for word in extra if word.startswith("--")}
    if both := given & {f"--{no}{name}" for name in own for no in ("", "no-")}:
        raise UserError(f"{min(both)} cannot stand after --: this script sets it, see --help")
    for name in variants:
        if both := given & {*read_variant(name, ANY)} - {"--n_layer"}:
            raise UserError(f"the variant {name} sets {min(both)} itself: leave it out after --")


def model_fields(flags):
    """{field of GPTConfig: its value} of those that flags of train.py give."""
    given = vars(PARSER.parse_args(flags))
    return {f.name: given[f.name] for f in fields(GPTConfig) if given[f.name] is not None}


def split(argv):
    """(a script's own arguments, those after --)"""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1:]


def equals(config, max_steps):
    """How long, or how deep, order 1 of a GPTConfig must be to spend what order 2 spends:
    {"longer": steps, "deeper": layers}, for order 2 on k alone {"shift-longer": steps}, and to have
    as many parameters as `separate` {"larger": layers}; the nearest whole numbers."""
    def model(**changes):
        return build(replace(config, **dict(nexus_order=1) | changes))

    def flops(**changes):
        return model(**changes).flops_per_token(config.block_size)

    def layers(spent, base, with_one_more):
        return config.n_layer + max(1, round((spent - base) / (with_one_more - base)))

    order2, base = dict(nexus_order=2, nexus_inner="self", nexus_streams="qk"), flops()
    return {"longer": round(max_steps * flops(**order2) / base),
            "shift-longer": round(max_steps * flops(**order2 | dict(nexus_streams="k")) / base),
            "deeper": layers(flops(**order2), base, flops(n_layer=config.n_layer + 1)),
            "larger": layers(*(model(**changes).num_params() for changes in (
                order2 | dict(nexus_inner="separate"), {}, dict(n_layer=config.n_layer + 1))))}


def summarise(lines):
    """One variant's row from the lines of its runs, a list over seeds."""
    first = lines[0]
    return dict(seeds=[r["seed"] for r in lines], lr=first["lr"], parameters=first["parameters"],
                flops_per_token=first["flops_per_token"],
                tokens_per_sec=statistics.median(r["tokens_per_sec"] for r in lines),
                val_loss=[r["val_loss"] for r in lines],
                tokens=[tokens for tokens, _ in first["curve"]],
                curves=[[loss for _, loss in r["curve"]] for r in lines])


def minus(r, base):
    """The paired difference of two rows, over the seeds that both have; None if there is none."""
    a, b = (dict(zip(x["seeds"], x["val_loss"], strict=True)) for x in (r, base))
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        return None
    return dict(seeds=seeds, **paired([a[s] for s in seeds], [b[s] for s in seeds]))


def rows(results, references):
    against = [name for name in references if name in results]
    yield ("variant", "lr", "parameters", "FLOPs/token", "FLOPs", "tokens/s", "seeds",
           "val loss, nats", *(f"minus {name} [99% interval]" for name in against),
           *(f"Holm, {name}" for name in against[:1]))
    first = against[0] if against else None
    ps = holm([r.get(f"minus_{first}", {}).get("p", math.nan) for r in results.values()])
    for (name, r), p in zip(results.items(), ps, strict=True):
        gaps = [r.get(f"minus_{base}") for base in against]
        flops = r["flops_per_token"]
        yield (name, f"{r['lr']:g}", f"{r['parameters']:,}", f"{flops / 1e6:,.2f} M",
               f"{flops * r['tokens'][-1]:.2e}", f"{r['tokens_per_sec']:,.0f}", len(r["seeds"]),
               mean_spread(r["val_loss"]), *(paired_text(gap) if gap else "" for gap in gaps),
               *(["" if math.isnan(p) else f"{p:.2g}"] if first else []))


def plot(plt, results, title, unit):
    figure, panels = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.4), sharey=True)
    for name, r in results.items():
        middle = [statistics.mean(at) for at in zip(*r["curves"], strict=True)]
        low = [min(at) for at in zip(*r["curves"], strict=True)]
        high = [max(at) for at in zip(*r["curves"], strict=True)]
        for panel, factor in zip(panels, (1, r["flops_per_token"]), strict=True):
            x = [factor * tokens for tokens in r["tokens"]]
            panel.plot(x[1:], middle[1:], marker=".", **figures.style(name))  # not the untrained
            panel.fill_between(x[1:], low[1:], high[1:], alpha=0.15, lw=0,
                               color=figures.style(name)["color"])
    panels[0].set(xlabel=f"{unit}s", ylabel=f"validation loss, nats per {unit} (lower is better)",
                  title=title)
    panels[1].set(xlabel="training compute (FLOPs)", title="the same, against compute")
    figures.name_lines(panels[1], {
        name: (r["tokens"][-1] * r["flops_per_token"],
               statistics.mean(curve[-1] for curve in r["curves"]))
        for name, r in results.items()})
    return figure


def parse_args(argv):
    given, extra = split(argv)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny", help="tiny (default), minutes per run at most, "
        "or text: 4.1M tokens of a --dataset and a learning rate for each variant, hours in all")
    add("--variants", type=listed(str), default="baseline,self,cross,key-shift", help="a list of "
        f"{', '.join(VARIANTS | EQUAL)}, or all (default: baseline,self,cross,key-shift)")
    add("--against", type=listed(str), default="baseline,key-shift,self",
        help="those of --variants that the others are compared with (default: baseline,key-shift,"
        "self)")
    add("--seeds", type=positive_int, help="seeds 0 to N-1, each for every variant (default: 3; "
        "at scale text 5)")
    add("--lrs", type=listed(rate), help="learning rates to choose from for each variant "
        "(default: train.py's, no choice; at scale text 2e-3,4e-3,8e-3)")
    add("--preset", choices=PRESETS, default="tiny")
    add("--dataset", help="a dataset's folder (default: pydocs)")
    add("--max_steps", type=positive_int, help="steps per run (default: 100; at scale text 2000)")
    add("--eval_interval", type=positive_int, help="steps between validations (default: 50; at "
        "scale text 500)")
    add("--jobs", type=positive_int, default=min(2, os.cpu_count()), help="runs in parallel, each "
        "with one thread if more than 1 (default: 2, if there are two cores)")
    add("--quick", action="store_true", help="a small model, 40 steps, to see that it works")
    add("--out", default="out/compare", help="folder (default: out/compare)")
    add("--results", help="file to which each finished run appends a line (default: "
        "OUT/results.jsonl)")
    add("--show", action="store_true", help="train nothing: the table of the existing lines")
    first = parser.parse_args(given)
    parser.set_defaults(**SCALES[first.scale] | (dict(max_steps=40, eval_interval=20)
                                                 if first.quick else {}))
    args = parse(parser, given)
    if args.dataset is None and not args.show:
        raise UserError(f"--scale {args.scale} needs --dataset, a folder that prepare_data.py made")
    if args.quick:
        extra = QUICK + extra
    if args.variants == ["all"]:
        args.variants = list(VARIANTS | EQUAL)
    for name in args.variants + args.against:
        read_variant(name, ANY)  # all are known, before any of them is run
    check_extra(extra, args.variants, OWN + ["lr"] * bool(args.lrs))
    args.results = args.results or os.path.join(args.out, "results.jsonl")
    return args, extra


class Plan:
    """The runs of a comparison: names and numbers only, nothing is run here.

    extra: flags of train.py for all of them. vocab_size: the dataset's.
    """

    def __init__(self, args, extra, vocab_size):
        self.args = args
        self.flags = ["--preset", args.preset, "--eval_interval", str(args.eval_interval),
                      "--log_interval", str(args.eval_interval), *args.flags.split(), *extra]
        config = preset_config(args.preset, **dict(vocab_size=vocab_size)
                               | model_fields(self.flags))
        self.equal = equals(config, args.max_steps)

    def run(self, variant, seed, lr=None, share=1):
        """The TrainingRun of a variant, over 1 / share of the steps."""
        steps = self.equal[variant] if "longer" in variant else self.args.max_steps
        flags = [*self.flags, *read_variant(variant, self.equal), "--seed", str(seed),
                 "--max_steps", str(steps // share)]
        name = f"{variant}-seed{seed}" + (f"-lr{lr:g}" if share > 1 else "")
        return TrainingRun(name, variant, seed, steps // share,
                           flags + (["--lr", f"{lr:g}"] if lr else []))

    def grid(self, variant):
        """{learning rate: the TrainingRun that tries it}, if there is a choice."""
        lrs = self.args.lrs or ()
        return {lr: self.run(variant, LR_SEED, lr, share=4) for lr in lrs if len(lrs) > 1}

    def final(self, study, seeds):
        """{variant: [its TrainingRun of each seed]}, of variants whose learning rate is chosen."""
        chosen = {}
        for variant in self.args.variants:
            losses = {lr: study.line(run) for lr, run in self.grid(variant).items()}
            if None not in losses.values():
                lr = min(losses, key=lambda lr: losses[lr]["val_loss"]) if losses else \
                    (self.args.lrs or [None])[0]
                chosen[variant] = [self.run(variant, seed, lr) for seed in seeds]
        return chosen


def data_of(path):
    """(fingerprint, vocab_size) of the one dataset in a file of results."""
    found = {(line["data"], line["vocab_size"]) for line in read_lines(path, "data", "vocab_size")}
    if len(found) != 1:
        raise UserError(f"{path} has lines of {len(found)} datasets: one is needed" if found else
                        f"no finished run in {path}: give --results FILE")
    return found.pop()


def main():
    args, extra = parse_args(sys.argv[1:])
    plt = pyplot(args.out)
    if args.show:
        data, vocab_size = data_of(args.results)
    else:
        output_file(args.results)
        check_settings(args.out, dict(preset=args.preset, dataset=args.dataset,
                                      max_steps=args.max_steps, extra=extra))
        dataset = args.dataset
        if dataset == "pydocs":  # one copy for all runs
            dataset = pydocs(os.path.join(args.out, "pydocs"))
        tokens = Dataset(dataset)
        data, vocab_size = tokens.fingerprint, tokens.vocab_size
    study = Study(args.out, args.results, data, args.jobs)
    plan, seeds = Plan(args, extra, vocab_size), range(args.seeds)
    if not args.show:
        study.execute([run for name in args.variants for run in plan.grid(name).values()], dataset)
        final = plan.final(study, seeds)
        study.execute([final[name][i] for i in seeds for name in args.variants], dataset)

    results = {}
    for name, wanted in plan.final(study, seeds).items():
        if lines := [line for line in map(study.line, wanted) if line]:
            results[name] = summarise(lines)
    if not results:
        raise UserError(f"{args.results} has no finished run of these variants and settings yet")
    if missing := [name for name in args.variants if name not in results]:
        print(f"note: no finished run of {', '.join(missing)} with these settings",
              file=sys.stderr)
    for base in args.against:
        for name, r in results.items():
            if base in results and name != base and (gap := minus(r, results[base])):
                r[f"minus_{base}"] = gap
    unit = "byte" if vocab_size == 320 else "token"  # 256 and the end of a text, padded to 320
    print(f"\n{table(rows(results, args.against))}\n\n"
          f"Losses are in nats per {unit} on held-out text, lower is better; ± is the standard "
          "deviation over seeds.\nDifferences are paired: a seed fixes the order of "
          "the data for all variants; below 0 is better.\n* is p < 0.01 in a paired t test; Holm: "
          "p corrected for as many comparisons as the table has.")
    counts = [len(r["seeds"]) for r in results.values()]
    some = " to ".join(map(str, sorted({min(counts), max(counts)})))
    title = f"{args.preset}, {some} seeds"
    save(args, "compare", results, plot(plt, results, title, unit))
    if os.path.exists(path := os.path.join(args.out, f"{name}-seed0", "ckpt.pt")):
        print(f"Some text: python sample.py --checkpoint {path} --prompt 'The '")


if __name__ == "__main__":
    run_script(main)
