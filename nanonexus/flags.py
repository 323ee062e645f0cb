"""
train.py's flags: presets, defaults, what a resumed run must agree with, and the model's
configuration and batch that follow from them.
"""

import argparse
import glob
import inspect
import math
import os
import re
from dataclasses import asdict, fields
from typing import get_args

from model import GPTConfig
from nanonexus.checkpoint import check_size, newest_checkpoint, older
from nanonexus.cli import Parser, UserError, non_negative, positive, positive_int, whole
from nanonexus.controls import CONTROLS, replaces_loops

# Defaults of the flags below, for each size. tiny learns most in a few minutes on a laptop. The
# others are Pythia's models, parameter for parameter, with its learning rates and a quarter of its
# batch of 2M tokens.
PRESETS = {
    "tiny": dict(vocab_size=320, block_size=256, n_layer=4, n_head=4, n_embd=128, rotary_pct=1.0,
                 parallel_residual=False, gelu="erf", lr=3e-3, batch_tokens=2048, micro_batch=8,
                 max_steps=800, warmup_steps=50, eval_interval=100, save_interval=200),
    "pythia-70m": dict(n_layer=6, n_head=8, n_embd=512, lr=1e-3),
    "pythia-160m": dict(n_layer=12, n_head=12, n_embd=768, lr=6e-4),
    "pythia-410m": dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4),
    "pythia-1b": dict(n_layer=16, n_head=8, n_embd=2048, lr=2.5e-4),
}
# A resumed run must agree with its checkpoint on all flags but these, or it would be another run.
FREE = {"dataset", "verify", "out", "resume", "micro_batch", "max_steps", "eval_interval",
        "save_interval", "log_interval", "keep", "max_minutes", "on_nan", "deterministic", "device",
        "dtype", "compile", "sample", "wandb", "tensorboard", *(f.name for f in fields(GPTConfig))}


def preset_config(name, **changes):
    """The GPTConfig of a preset, with changes."""
    names = {f.name for f in fields(GPTConfig)}
    return GPTConfig(**{k: v for k, v in PRESETS[name].items() if k in names} | changes)


def build_parser(doc):
    parser = Parser(doc)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", default="pydocs", metavar="DIR_OR_NAME", help="a folder that prepare_data.py "
        "wrote, or pydocs (default), prepared on first use")
    add("--verify", action="store_true", help="first read the whole dataset to check its "
        "sha256 and ids")
    add("--out", default="out", help="folder for checkpoint and log (default: out)")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt; flags not given keep "
        "the checkpoint's values")
    add("--doc_mask", action=flag, default=False, help="no token attends beyond its own document; "
        "meant for --attention flex")
    add = parser.add_argument_group("model (fields not given are the preset's)").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="size (default: tiny)")
    # the help of these is the comment next to each field in model.py
    comments = dict(re.findall(r"^    (\w+):.*  # (.+)$", inspect.getsource(GPTConfig), re.M))
    comments |= dict(vocab_size="default: the dataset's", nexus_order="1 is the baseline, 2 "
                     "refines once, 3 twice, ... (default: 2; with a control that has no inner "
                     "loop 1)", nexus_inner="how they are refined, see inner_step (default: self, "
                     "the formula that two accounts of the paper give)",
                     control="instead of, or besides, Nexus: " + ", ".join(CONTROLS))
    for f in fields(GPTConfig):
        choices = CONTROLS if f.name == "control" else get_args(f.type)
        assert choices or f.type in (bool, int, float, str), (
            f"{f.name}: a field is a flag too: a bool, an int, a float, a str or a Literal")
        kind = dict(choices=choices, metavar="NAME") if f.name == "control" else dict(
            choices=choices) if choices else dict(action=flag) if f.type is bool else \
            dict(type=positive_int if f.type is int else f.type)
        add(f"--{f.name}", help=(comments.get(f.name) or "").replace("%", "%%"), **kind)
    add = parser.add_argument_group("optimisation (defaults depend on the preset)").add_argument
    add("--batch_tokens", type=positive_int, default=2**19, help="tokens per step, over all "
        "processes and micro-steps")
    add("--micro_batch", type=positive_int, help="sequences per forward pass of a process; lower "
        "it if you run out of memory (default: 16 at most, 8 for tiny)")
    add("--max_steps", type=positive_int, default=3000, help="total number of steps")
    add("--decay_steps", type=positive_int, help="step at which the cosine reaches 10%% of the "
        "peak (default: max_steps)")
    add("--lr", type=non_negative, default=1e-3, help="peak learning rate")
    add("--warmup_steps", type=whole, help="linear warm-up (default: 1%% of max_steps)")
    add("--weight_decay", type=non_negative, default=0.1, help="on matrices and embeddings")
    add("--grad_clip", type=positive, default=1.0, help="maximum gradient norm (inf: no clipping)")
    add("--seed", type=whole, default=0, help="for weights, data order and dropout")
    add = parser.add_argument_group("running").add_argument
    add("--eval_interval", type=positive_int, default=250, help="steps between validations")
    add("--eval_windows", type=positive_int, default=96, help="sequences of validation text")
    add("--save_interval", type=positive_int, default=500, help="steps between checkpoints")
    add("--log_interval", type=positive_int, default=10, help="steps between log lines")
    add("--keep", type=positive_int, default=2, help="checkpoints to keep: ckpt.pt and the "
        "previous ones, ckpt.1.pt, ... (default: 2)")
    add("--max_minutes", type=positive, default=math.inf, help="save and stop after this long, "
        "e.g. before a job's time limit (default: never)")
    add("--on_nan", default="stop", choices=["stop", "skip"], help="if a gradient is not finite: "
        "stop (default), or skip that step")
    add("--deterministic", action="store_true", help="bit-identical runs on the same device; "
        "may be slower on CUDA")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of "
        "the matrix products (default: bfloat16 on CUDA, float16 on a GPU without it, else "
        "float32)")
    add("--compile", action=flag, help="torch.compile (default: on CUDA only)")
    add("--sample", action=flag, default=True, help="end with a sample of text")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add("--tensorboard", action="store_true", help="also log to TensorBoard")
    return parser


def parse_args(doc, argv=None):
    """(args, the checkpoint to resume from or None). Defaults: the preset's, or the saved ones."""
    parser = build_parser(doc)
    args, _ = parser.parse_known_args(argv)
    path, saved = os.path.join(args.out, "ckpt.pt"), None
    if args.resume:
        saved = newest_checkpoint(path)
        if not {"optimizers", "layout", "scaler", "args", "data"} <= saved.keys():
            raise UserError(f"{path} was written by an earlier version, which cannot be resumed: "
                            "it can be scored, sampled and exported")
        keep = {k: v for k, v in saved["args"].items() if k not in ("resume", "out", "device")}
        parser.set_defaults(**keep)
    else:
        if found := [path] * os.path.exists(path) + glob.glob(older(glob.escape(path), "*")):
            raise UserError(f"{found[0]} exists: --resume continues it, another --out starts a new "
                            "run")
        parser.set_defaults(**{k: v for k, v in PRESETS[args.preset].items()
                               if k not in ("vocab_size", "micro_batch")})
    if not saved and args.nexus_inner and args.control and replaces_loops(args.control):
        raise UserError(f"--control {args.control} takes the place of --nexus_inner: drop one")
    given, args = args, parser.parse_args(argv)
    if args.nexus_order is None:  # flags of the loops imply order 2
        wanted = args.nexus_inner or args.nexus_streams
        args.nexus_order = 1 if args.control and not (wanted or replaces_loops(args.control)) else 2
    if args.decay_steps is None:
        args.decay_steps = args.max_steps
    if args.warmup_steps is None:
        args.warmup_steps = max(1, args.max_steps // 100)
    if not saved and given.warmup_steps is None:  # a short run, too, must reach its peak and decay
        args.warmup_steps = min(args.warmup_steps, max(1, args.decay_steps // 2))
    if saved:
        agree(vars(args), saved["args"], saved["args"].keys() - FREE)  # make_config has the model's
        if args.max_steps < saved["step"]:
            raise UserError(f"{path} is at step {saved['step']}: give a larger --max_steps than "
                            f"{args.max_steps}")
    elif args.decay_steps < args.warmup_steps < args.max_steps:
        raise UserError(f"--warmup_steps {args.warmup_steps} ends after --decay_steps "
                        f"{args.decay_steps}: lower it")
    return args, saved


def agree(given, saved, names):
    for name in sorted(names):
        value = given.get(name)  # None: a field of another version
        if value != saved.get(name, value):
            raise UserError(f"--{name} {value} contradicts the checkpoint's {saved[name]}: drop "
                            "the flag (or the change of its default), or start a new run in "
                            "another --out")


def make_config(args, tokens, device, saved):
    """The GPTConfig given by the flags and the dataset; a resumed run's must not change."""
    given = {f.name: getattr(args, f.name) for f in fields(GPTConfig)
             if getattr(args, f.name) is not None}
    config = GPTConfig(**{"vocab_size": tokens.vocab_size, **given})
    check_size(config)
    if config.attention == "flex" and device.type != "cuda":
        raise UserError("--attention flex trains on CUDA only: use --attention sdpa")
    if args.doc_mask and config.attention != "flex" and device.type == "cuda":
        raise UserError("--doc_mask on CUDA needs --attention flex: others would store T x T masks")
    if config.vocab_size < tokens.vocab_size:
        raise UserError(f"--vocab_size {config.vocab_size} is less than the dataset's "
                        f"{tokens.vocab_size}")
    if saved:
        if unknown := saved["config"].keys() - asdict(config):
            raise UserError(f"the checkpoint has {', '.join(sorted(unknown))}, which GPTConfig "
                            "lacks: it was trained with another model.py")
        agree(asdict(config), saved["config"], saved["config"].keys() - {"attention"})
        if saved["data"] != tokens.fingerprint:
            raise UserError(f"{tokens.folder} is not the dataset that the checkpoint was "
                            "trained on")
    return config


def split_batch(args, T, world):
    """(micro_batch, micro-steps per step): batch_tokens = processes x micro-steps x micro_batch x
    T. The largest micro-batch that divides the batch, unless one is given."""
    sequences, rest = divmod(args.batch_tokens, T * world.size)
    most = args.micro_batch or PRESETS[args.preset].get("micro_batch", 16)
    fits = [n for n in range(1, min(most, sequences) + 1) if sequences % n == 0]
    if rest or (args.micro_batch and args.micro_batch not in fits):
        unit = T * world.size * (args.micro_batch or 1)
        raise UserError(
            f"--batch_tokens {args.batch_tokens} must be a multiple of block_size x processes"
            + " x micro_batch" * bool(args.micro_batch) + f" = {unit}: use "
            f"{max(1, args.batch_tokens // unit) * unit}"
            + ", or another --micro_batch" * bool(args.micro_batch))
    return fits[-1], sequences // fits[-1]
