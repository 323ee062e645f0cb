"""
Train a GPT or its Nexus counterpart, on one device or many.

    python train.py                                    # tiny, order 2, minutes on a laptop
    python train.py --nexus_order 1 --out out/base     # its baseline
    python train.py --resume --out out/base --max_steps 2000
    torchrun --standalone --nproc_per_node=8 train.py --preset pythia-70m --dataset tokens/fw

Everything is written to --out: ckpt.pt, and log.jsonl with a line per log step. Ctrl-C finishes the
step, saves and stops; --resume continues as if nothing had happened, bit for bit.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import fields
from typing import get_args

import torch

from model import PRESETS, GPTConfig
from nanonexus.checkpoint import newest_checkpoint
from nanonexus.cli import Parser, UserError, non_negative, positive, positive_int, run_script, whole
from nanonexus.data import TokenSet, pydocs
from nanonexus.files import output_folder
from nanonexus.generate import generate
from nanonexus.log import Log
from nanonexus.memory import check_size
from nanonexus.processes import Stop, join_processes
from nanonexus.run import Run, learning_rate
from nanonexus.tokenizer import get_tokenizer

# Good settings for each size: Pythia's learning rates, and a quarter of its batch of 2M tokens.
RECIPES = {
    "tiny": dict(lr=3e-3, batch_tokens=2048, micro_batch=8, max_steps=800, warmup_steps=50,
                 eval_interval=100, save_interval=200),
    "pythia-70m": dict(lr=1e-3), "pythia-160m": dict(lr=6e-4),
    "pythia-410m": dict(lr=3e-4), "pythia-1b": dict(lr=2.5e-4),
}
# A resumed run must agree with its checkpoint on these, or it would not be the same run.
FIXED = ["batch_tokens", "doc_mask", "decay_steps", "lr", "warmup_steps", "weight_decay",
         "grad_clip", "seed"]
HELP = dict(
    vocab_size="default: the token set's", block_size="context, in tokens", n_layer="blocks",
    n_head="attention heads", n_embd="width of the residual stream",
    rotary_pct="fraction of each head's dimensions that are rotated",
    parallel_residual="attention and MLP in parallel, as Pythia, or sequential",
    dropout="dropout rate",
    gelu="tanh or erf", attention="sdpa; flex, on CUDA; or manual (slow, explicit softmax)",
    nexus_order="1 is the baseline, 2 (default) refines once, 3 twice, ...",
    nexus_streams="which streams are refined", nexus_inner="how: cross "
    "(default), past, self (the paper's, as far as its text is known) or shared",
)


def build_parser():
    parser = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", default="pydocs", metavar="DIR_OR_NAME", help="a folder that prepare_data.py "
        "wrote, or pydocs (default), prepared on first use")
    add("--verify", action="store_true", help="first read the whole token set to check its "
        "sha256 and ids")
    add("--out", default="out", help="folder for checkpoint and log (default: out)")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt; flags not given keep "
        "the checkpoint's values")
    add("--doc_mask", action=flag, default=False, help="no token attends beyond its own document; "
        "meant for --attention flex")
    add = parser.add_argument_group("model (fields not given are the preset's)").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="size (default: tiny)")
    for f in fields(GPTConfig):
        kind = dict(choices=get_args(f.type)) if get_args(f.type) else \
            dict(action=flag) if f.type is bool else dict(type=f.type)
        add(f"--{f.name}", default=2 if f.name == "nexus_order" else None, help=HELP[f.name],
            **kind)
    add = parser.add_argument_group("optimisation (defaults depend on the preset)").add_argument
    add("--batch_tokens", type=positive_int, default=2**19, help="tokens per step, over all "
        "processes and micro-steps")
    add("--micro_batch", type=positive_int, default=16, help="windows per forward pass of a "
        "process; smaller needs less memory, the result is the same")
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
    add("--eval_windows", type=positive_int, default=96, help="windows of validation text")
    add("--save_interval", type=positive_int, default=500, help="steps between checkpoints")
    add("--log_interval", type=positive_int, default=10, help="steps between log lines")
    add("--keep", type=positive_int, default=2, help="checkpoints to keep: ckpt.pt and the "
        "previous ones, ckpt.1.pt, ... (default: 2)")
    add("--max_minutes", type=positive, default=math.inf, help="save and stop after this long, "
        "e.g. before a job's time limit (default: never)")
    add("--on_nan", default="stop", choices=["stop", "skip"], help="if a gradient is not finite: "
        "stop (default), or skip that step")
    add("--deterministic", action="store_true", help="bit-identical runs on the same device, "
        "slower on CUDA")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the matrix "
        "products (default: bfloat16 on CUDA, else float32)")
    add("--compile", action=flag, help="torch.compile (default: on CUDA only)")
    add("--checkpoint_attention", action=flag, help="recompute inner loops in the backward pass: "
        "less memory, more time")
    add("--sample", action=flag, default=True, help="end with a sample of text")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add("--tensorboard", action="store_true", help="also log to TensorBoard")
    return parser


def parse_args(argv=None):
    """(args, the checkpoint to resume from or None). Defaults: the recipe's, or the saved ones."""
    parser = build_parser()
    args, _ = parser.parse_known_args(argv)
    path, saved = os.path.join(args.out, "ckpt.pt"), None
    if args.resume:
        saved = newest_checkpoint(path)
        keep = {k: v for k, v in saved["args"].items() if k not in ("resume", "out", "device")}
        parser.set_defaults(**keep)
    else:
        if os.path.exists(path):
            raise UserError(f"{path} exists: --resume continues it, another --out starts a new run")
        parser.set_defaults(**RECIPES[args.preset])
    args = parser.parse_args(argv)
    if args.warmup_steps is None:
        args.warmup_steps = max(1, args.max_steps // 100)
    if args.decay_steps is None:
        args.decay_steps = args.max_steps
    if saved:
        agree(vars(args), saved["args"], FIXED)
    return args, saved


def agree(given, saved, names):
    for name in names:
        if given[name] != saved.get(name, given[name]):  # an older file may lack a new name
            raise UserError(f"--{name} {given[name]} contradicts the checkpoint's {saved[name]}: "
                            "drop the flag, or start a new run in another --out")


def open_dataset(args, world):
    """The token set; pydocs is prepared on first use, by the first process while others wait."""
    if args.dataset != "pydocs":
        if not os.path.isdir(args.dataset):
            raise UserError(f"no token set {args.dataset}: use pydocs, or a folder made by "
                            f"prepare_data.py --out {args.dataset}")
        return TokenSet(args.dataset, verify=args.verify)
    folder = os.path.join(args.out, "pydocs")
    if world.rank == 0:
        pydocs(folder)
    world.wait()
    return TokenSet(folder, verify=args.verify)


def make_config(args, tokens, device, saved):
    """The GPTConfig given by preset, flags and token set; a resumed run's must not change."""
    given = {f.name: getattr(args, f.name) for f in fields(GPTConfig)
             if getattr(args, f.name) is not None}
    config = GPTConfig(**{**PRESETS[args.preset], "vocab_size": tokens.vocab_size, **given})
    check_size(config)
    if config.attention == "flex" and device.type != "cuda":
        raise UserError("--attention flex trains on CUDA only: use --attention sdpa")
    if args.doc_mask and config.attention != "flex" and device.type == "cuda":
        raise UserError("--doc_mask on CUDA needs --attention flex: others would store T x T masks")
    if config.vocab_size < tokens.vocab_size:
        raise UserError(f"--vocab_size {config.vocab_size} is less than the token set's "
                        f"{tokens.vocab_size}")
    if saved:
        free = {"attention", "checkpoint_attention"}  # how, not what
        agree(vars(config), saved["config"], saved["config"].keys() - free)
        if saved["data"] != tokens.fingerprint:
            raise UserError(f"{tokens.folder} is not the token set that the checkpoint was "
                            "trained on")
    return config


def train(run, log, stop):
    """Take steps until max_steps, or until stop asks for an end."""
    args, world, batches, unread = run.args, run.world, run.micro_batches(), None
    timer, timed_from, first = None, None, run.step + 1  # the first step here is not timed
    if run.step == 0:
        val_loss = run.validate()
        if log:
            log.write(dict(step=0, tokens=0, train_loss=None, val_loss=val_loss, lr=None,
                           grad_norm=None, tokens_per_sec=None, mfu=None))
    while run.step < args.max_steps:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, args)
        # dropout too is a pure function of seed, step and rank: resuming needs no RNG state
        torch.manual_seed((args.seed * 1_000_003 + run.step) * world.size + world.rank)
        total = torch.zeros((), device=world.device)
        for micro in range(1, run.accumulate + 1):
            x, y = next(batches)
            if world.size > 1:  # must be set before the forward pass
                run.model.require_backward_grad_sync = micro == run.accumulate
            with run.precision():
                loss = run.model(*run.inputs(x, y))
            (loss / run.accumulate).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(run.gpt.parameters(), args.grad_clip)
        run.update(norm)
        if unread:  # the previous step's: by now the device has computed it
            run.check(*unread, log)
        unread = run.step, norm
        run.step += 1

        step, last = run.step, run.step == args.max_steps
        if step == first:  # compiled, caches filled
            world.synchronize()
            timer, timed_from = time.perf_counter(), step
        if log:
            log.advance()
        stopping = stop.asked()
        if world.size > 1:  # processes must stop together: they agree at log steps
            stopping = step % args.log_interval == 0 and world.any(stopping)
        logging = last or step % args.log_interval == 0 or step % args.eval_interval == 0
        saving = last or stopping or step % args.save_interval == 0
        if logging or saving:
            run.check(*unread, log)  # waits for the device
            unread = None
        if logging:
            train_loss = world.mean(total, run.accumulate)
            seconds, steps = time.perf_counter() - timer, step - timed_from
            speed = steps * args.batch_tokens / seconds if steps else None
            val_loss = run.validate() if last or step % args.eval_interval == 0 else None
            if log:
                log.write(dict(step=step, tokens=step * args.batch_tokens, train_loss=train_loss,
                               val_loss=val_loss, lr=group["lr"], grad_norm=norm.item(),
                               tokens_per_sec=speed and round(speed, 1), mfu=run.mfu(speed)))
        if saving:
            run.save()
        if logging or saving:
            timer, timed_from = time.perf_counter(), step
        if stopping:
            break
    batches.close()


def show_sample(model, tokens, path):
    try:
        tokenizer = get_tokenizer(tokens.tokenizer, tokens.tokenizer_json)
    except UserError as error:  # trained offline on tokens prepared elsewhere
        print(f"no sample: {error}")
        return
    model.eval()
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode_ordinary("The ")], device=device)
    ids = generate(model, prompt, 200, temperature=0.8, top_k=50, vocab=tokenizer.n_vocab,
                   stop=tokenizer.eot_token, generator=torch.Generator(device).manual_seed(0))
    print(f"---\n{tokenizer.decode(ids[0].tolist())}\n---\nmore: python sample.py --checkpoint "
          f"{path} --prompt 'The ' --max_new_tokens 300")


def main(argv=None):
    began = time.monotonic()
    args, saved = parse_args(argv)
    world = join_processes(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    output_folder(args.out)
    tokens = open_dataset(args, world)
    config = make_config(args, tokens, world.device, saved)
    run = Run(args, config, tokens, world)
    if saved:
        run.restore(saved)
    stop = Stop(began + 60 * args.max_minutes)
    log = Log(args, run.step if saved else None) if world.rank == 0 else None
    if log:
        log.say(f"{args.preset}, Nexus order {config.nexus_order}, {run.gpt.num_params():,} "
                f"weights; {world.size} {world.device.type}, "
                f"{'bfloat16' if run.bf16 else 'float32'}; {run.n_train * config.block_size:,} "
                f"tokens of {tokens.meta['dataset']}, {args.batch_tokens:,} per step"
                + (f"; resumed at step {run.step}" if saved else ""))
    try:
        with stop:
            train(run, log, stop)
    finally:  # in a notebook another run may follow
        if log:
            log.close()
    if log:
        path = os.path.join(args.out, "ckpt.pt")
        if run.step < args.max_steps:
            print(f"stopped at step {run.step}, saved in {path}; continue with: "
                  f"python train.py --resume --out {args.out}")
        elif args.sample:
            show_sample(run.gpt, tokens, path)
    world.leave()
    if stop.signal and run.step < args.max_steps:
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    run_script(main)
