"""
Train a GPT or its Nexus sibling, on one device or many.

    python train.py                                    # tiny, order 2, minutes on a laptop
    python train.py --nexus_order 1 --out out/base     # its baseline
    python train.py --resume --out out/base --max_steps 2000
    torchrun --standalone --nproc_per_node=8 train.py --preset pythia-70m --dataset tokens/fw

Everything lands in --out: ckpt.pt, and log.jsonl with a line for every log step. Ctrl-C finishes
the step, saves and stops; --resume goes on as if nothing had happened, bit for bit.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist

import data
from checkpoint import newest_checkpoint, save_checkpoint
from data import Parser, TokenSet, UserError, run_script
from log import Log
from loss import TrainingLoss
from model import GPT, PRESETS, GPTConfig, ModelError

# What each size trains well with. Pythia's learning rates; its batch is 2M tokens, ours a quarter.
RECIPES = {
    "tiny": dict(lr=3e-3, batch_tokens=2048, micro_batch=8, max_steps=800, warmup_steps=50,
                 eval_interval=100, save_interval=200),
    "pythia-70m": dict(lr=1e-3), "pythia-160m": dict(lr=6e-4),
    "pythia-410m": dict(lr=3e-4), "pythia-1b": dict(lr=2.5e-4),
}
# Dense bfloat16 peaks from the makers' data sheets, FLOP/s. A device not here has no MFU.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12}
# A resumed run must agree with its checkpoint on these, or it would not be the same run.
FIXED = ["batch_tokens", "doc_mask", "decay_steps", "lr", "warmup_steps", "weight_decay",
         "grad_clip", "seed"]


def build_parser():
    parser = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data and output")
    group.add_argument("--dataset", default="pydocs", metavar="DIR_OR_NAME", help="a folder that "
                       "prepare_data.py wrote, or pydocs (default), prepared on first use")
    group.add_argument("--verify", action="store_true", help="first read all of the token set, to "
                       "check its sha256 and its ids")
    group.add_argument("--out", default="out", help="folder for checkpoint and log (default: out)")
    group.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.pt; flags not "
                       "given are the checkpoint's")
    group.add_argument("--doc_mask", action=flag, default=False, help="no token attends beyond its "
                       "own document; meant for --attention flex")
    group = parser.add_argument_group("model (a field not given is the preset's)")
    group.add_argument("--preset", choices=PRESETS, default="tiny", help="size (default: tiny)")
    for f in fields(GPTConfig):
        kind = dict(action=flag) if f.type is bool else dict(type=f.type)
        group.add_argument(f"--{f.name}", default=2 if f.name == "nexus_order" else None,
                           help=HELP[f.name], **kind)
    group = parser.add_argument_group("optimisation (defaults depend on the preset)")
    group.add_argument("--batch_tokens", type=int, default=2**19, help="tokens a step, over all "
                       "processes and micro-steps")
    group.add_argument("--micro_batch", type=int, default=16, help="windows a process computes at "
                       "once; smaller needs less memory, the result is the same")
    group.add_argument("--max_steps", type=int, default=3000, help="steps in all")
    group.add_argument("--decay_steps", type=int, help="step at which the cosine reaches 10%% of "
                       "the peak (default: max_steps)")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument("--warmup_steps", type=int, help="of linear warm-up (default: 1%% of all)")
    group.add_argument("--weight_decay", type=float, default=0.1, help="on matrices and embeddings")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm")
    group.add_argument("--seed", type=int, default=0, help="of weights, data order and dropout")
    group = parser.add_argument_group("running")
    group.add_argument("--eval_interval", type=int, default=250, help="steps between validations")
    group.add_argument("--eval_windows", type=int, default=96, help="windows of validation text")
    group.add_argument("--save_interval", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--log_interval", type=int, default=10, help="steps between log lines")
    group.add_argument("--keep", type=int, default=2, help="checkpoints to keep: ckpt.pt and "
                       "the ones before, ckpt.1.pt, ... (default: 2)")
    group.add_argument("--max_minutes", type=float, default=math.inf, help="save and stop after "
                       "this long, before a time limit does (default: never)")
    group.add_argument("--on_nan", default="stop", choices=["stop", "skip"], help="if a gradient "
                       "is not finite: stop (default), or leave that step out")
    group.add_argument("--deterministic", action="store_true", help="the same bits in every run "
                       "on one device, slower on CUDA")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of the matrix products (default: bfloat16 on CUDA, else float32)")
    group.add_argument("--compile", action=flag, help="torch.compile (default: on CUDA only)")
    group.add_argument("--sample", action=flag, default=True, help="end with a sample of text")
    group.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    group.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard")
    return parser


HELP = dict(
    vocab_size="default: the token set's", block_size="context, in tokens", n_layer="blocks",
    n_head="attention heads", n_embd="width of the residual stream",
    rotary_pct="share of each head's dimensions that rotary turns",
    parallel_residual="attention and MLP side by side, as Pythia, or in turn", dropout="rate",
    gelu="tanh or erf", attention="sdpa; flex, on CUDA; or manual (slow, explicit softmax)",
    checkpoint_attention="compute inner loops again in backward: less memory, more time",
    nexus_order="1 is the baseline, 2 (default) refines once, 3 twice, ...",
    nexus_streams="qk, q or k: which streams are refined",
    nexus_inner="self, shared or separate: how",
)


def parse_args(argv=None):
    """(args, the checkpoint to resume from or None). Defaults: the recipe's, or its own."""
    parser = build_parser()
    args, _ = parser.parse_known_args(argv)
    path, saved = os.path.join(args.out, "ckpt.pt"), None
    if args.resume:
        saved = newest_checkpoint(path)
        keep = {k: v for k, v in saved["args"].items() if k not in ("resume", "out", "device")}
        parser.set_defaults(**keep)
    else:
        if os.path.exists(path):
            raise UserError(f"{path} exists: --resume goes on with it, another --out starts anew")
        parser.set_defaults(**RECIPES[args.preset])
    args = parser.parse_args(argv)
    if args.warmup_steps is None:
        args.warmup_steps = max(1, args.max_steps // 100)
    if args.decay_steps is None:
        args.decay_steps = args.max_steps
    if saved:
        agree(vars(args), saved["args"], FIXED)
    for name in ("batch_tokens", "micro_batch", "max_steps", "decay_steps", "eval_interval",
                 "eval_windows", "save_interval", "log_interval", "keep"):
        if not 1 <= getattr(args, name) <= 2**31:
            raise UserError(f"--{name} must be from 1 to 2^31, got {getattr(args, name)}")
    for name in ("lr", "warmup_steps", "weight_decay", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be a number from 0 up, got {getattr(args, name)}")
    if not args.max_minutes > 0:
        raise UserError(f"--max_minutes must be above 0, got {args.max_minutes}")
    if not args.grad_clip > 0:
        raise UserError(f"--grad_clip must be above 0 (inf: never clip), got {args.grad_clip}")
    return args, saved


def agree(given, saved, names):
    for name in names:
        if given[name] != saved.get(name, given[name]):  # an older file may lack a new name
            raise UserError(f"--{name} {given[name]} contradicts the checkpoint's {saved[name]}: "
                            "drop the flag, or start anew in another --out")


def learning_rate(step, args):
    """Linear warm-up to lr, cosine down to a tenth of it at decay_steps, and on at that tenth."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.decay_steps - args.warmup_steps)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model, args, device):
    """AdamW with Pythia's settings: decay on matrices, none on biases and LayerNorms."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


def pick_device(args, local_rank):
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() \
            else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"no CUDA device number {local_rank} here: use --device cpu, or fewer "
                        "processes a node")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device here: use --device cpu")
    if kind == "cpu":
        data.keep_freed_memory()
    return torch.device(kind, local_rank if kind == "cuda" else None)


def open_dataset(args, first):
    """The token set; pydocs is prepared on first use, by the first process while others wait."""
    if args.dataset != "pydocs":
        if not os.path.isdir(args.dataset):
            raise UserError(f"no token set {args.dataset}: use pydocs, or a folder that "
                            f"prepare_data.py --out {args.dataset} has made")
        return TokenSet(args.dataset, verify=args.verify)
    folder = os.path.join(args.out, "pydocs")
    if first and not os.path.exists(os.path.join(folder, "meta.json")):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_data.py")
        subprocess.run([sys.executable, script, "--dataset", "pydocs", "--out", folder], check=True)
    if dist.is_initialized():
        dist.barrier()
    return TokenSet(folder, verify=args.verify)


def main(argv=None):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    first, began = rank == 0, time.monotonic()
    args, saved = parse_args(argv)
    device = pick_device(args, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    os.makedirs(args.out, exist_ok=True)
    tokens = open_dataset(args, first)
    given = {f.name: getattr(args, f.name) for f in fields(GPTConfig)
             if getattr(args, f.name) is not None}
    config = GPTConfig(**{**PRESETS[args.preset], "vocab_size": tokens.vocab_size, **given})
    if config.attention == "flex" and device.type != "cuda":
        raise UserError("--attention flex trains on CUDA only: use --attention sdpa")
    if config.vocab_size < tokens.vocab_size:
        raise UserError(f"--vocab_size {config.vocab_size} is less than the token set's "
                        f"{tokens.vocab_size}")
    if saved:
        free = {"attention", "checkpoint_attention"}  # how, not what
        agree(vars(config), saved["config"], saved["config"].keys() - free)
    if saved and saved["data"] != tokens.fingerprint:
        raise UserError(f"{tokens.folder} is not the token set that the checkpoint was trained on")

    # batch_tokens = windows a step x block_size; windows = processes x micro-steps x micro_batch
    T = config.block_size
    unit = T * world * args.micro_batch
    if args.batch_tokens % unit:
        raise UserError(f"--batch_tokens {args.batch_tokens} must be a multiple of block_size x "
                        f"micro_batch x processes = {T} x {args.micro_batch} x {world} = {unit}: "
                        f"use {max(1, args.batch_tokens // unit) * unit}, or another --micro_batch")
    batch_size, accumulate = args.batch_tokens // T, args.batch_tokens // unit
    n_train, n_val = data.windows(tokens.train, T), data.windows(tokens.val, T)

    torch.manual_seed(args.seed)
    raw = GPT(config).to(device)  # `raw` is what is saved, `model` what is run
    optimizer = make_optimizer(raw, args, device)
    step = 0
    if saved:
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    run = TrainingLoss(raw, tokens.eot if args.doc_mask else None)
    if args.compile if args.compile is not None else device.type == "cuda":
        run = torch.compile(run, fullgraph=True, dynamic=False)
    model = run
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    peak = next((v for k, v in PEAK_FLOPS.items() if device.type == "cuda" and bf16
                 and k in torch.cuda.get_device_name(device)), None)

    def to_device(arrays):
        arrays = [torch.from_numpy(a) for a in arrays]
        if device.type == "cuda":  # pinned, the copy runs while the device computes
            return [a.pin_memory().to(device, non_blocking=True) for a in arrays]
        return [a.to(device) for a in arrays]

    def mean_over_processes(total, count):
        pair = torch.stack([total.float(), torch.tensor(float(count), device=device)])
        if world > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    @torch.no_grad()
    def validate():
        raw.eval()
        indices = data.val_indices(n_val, args.eval_windows, rank, world)
        total = torch.zeros((), device=device)
        for i in range(0, len(indices), args.micro_batch):
            x, y = data.batch(tokens.val, T, indices[i:i + args.micro_batch])
            short = ((0, args.micro_batch - len(x)), (0, 0))  # to one shape: one compilation
            padded = to_device([np.pad(x, short), np.pad(y, short, constant_values=-1)])
            with autocast:
                total += run(*padded) * len(x)
        raw.train()
        return mean_over_processes(total, len(indices))

    def save():
        if first:
            save_checkpoint(os.path.join(args.out, "ckpt.pt"), dict(
                format=1, model=raw.state_dict(), optimizer=optimizer.state_dict(),
                config=asdict(config), step=step, tokens=step * args.batch_tokens,
                tokenizer=tokens.tokenizer, data=tokens.fingerprint, args=vars(args),
                torch=str(torch.__version__)), args.keep)

    stop = []  # a signal to act on after the step

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # Ctrl-C, the system, Slurm before its limit
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)

    log = Log(args, step if saved else None) if first else None
    if first:
        log.say(f"{args.preset}, Nexus order {config.nexus_order}, {raw.num_params():,} weights; "
                f"{world} {device.type}, {'bfloat16' if bf16 else 'float32'}; {n_train * T:,} "
                f"tokens of {tokens.meta['dataset']}, {args.batch_tokens:,} a step"
                + (f"; resumed at step {step}" if saved else ""))
    if not saved:
        val_loss = validate()
        if first:
            log.write(dict(step=0, tokens=0, train_loss=None, val_loss=val_loss, lr=None,
                           grad_norm=None, tokens_per_sec=None, mfu=None))

    raw.train()
    timer, timed_from = time.perf_counter(), step
    while step < args.max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        # dropout too is a pure function of seed, step and rank: a resume needs no generator's state
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        indices = data.train_indices(n_train, args.seed, step, batch_size, rank, world)
        total = torch.zeros((), device=device)
        for micro in range(accumulate):
            part = indices[micro * args.micro_batch:(micro + 1) * args.micro_batch]
            x, y = to_device(data.batch(tokens.train, T, part))
            if world > 1:  # must be set before the forward pass
                model.require_backward_grad_sync = micro == accumulate - 1
            with autocast:
                loss = model(x, y)
            (loss / accumulate).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip)
        if math.isfinite(norm):
            optimizer.step()
        else:  # the weights are still good
            wrong = (f"the gradient's norm is {norm.item()} at step {step + 1}, windows "
                     f"{' '.join(map(str, indices[:8]))}{' ...' if len(indices) > 8 else ''}")
            if args.on_nan == "stop":
                raise UserError(f"{wrong}: the last checkpoint is kept; try a smaller --lr, or "
                                "--on_nan skip")
            if first:
                log.say(f"{wrong}: left out")
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if log and log.bar:
            log.bar.update(1)

        last = step == args.max_steps
        if last or step % args.log_interval == 0 or step % args.eval_interval == 0:
            train_loss = mean_over_processes(total, accumulate)  # waits for the device
            speed = (step - timed_from) * args.batch_tokens / (time.perf_counter() - timer)
            mfu = speed * raw.flops_per_token(T) / (peak * world) if peak else None
            val_loss = validate() if last or step % args.eval_interval == 0 else None
            if first:
                log.write(dict(step=step, tokens=step * args.batch_tokens, train_loss=train_loss,
                               val_loss=val_loss, lr=group["lr"], grad_norm=norm.item(),
                               tokens_per_sec=round(speed, 1), mfu=mfu))
            timer, timed_from = time.perf_counter(), step
        # processes can stop only together: several of them agree on it at log steps
        stopping = bool(stop) or time.monotonic() - began > 60 * args.max_minutes
        if world > 1:
            stopping = step % args.log_interval == 0 and mean_over_processes(
                torch.tensor(float(stopping), device=device), 1) > 0
        if last or stopping or step % args.save_interval == 0:
            save()
            timer, timed_from = time.perf_counter(), step
        if stopping:
            break

    if first:
        log.close()
        path = os.path.join(args.out, "ckpt.pt")
        if step < args.max_steps:
            print(f"stopped at step {step}, saved in {path}; go on with: "
                  f"python train.py --resume --out {args.out}")
        elif args.sample:
            show_sample(raw, tokens.tokenizer, path)
    if world > 1:
        dist.destroy_process_group()
    if stop and step < args.max_steps:
        sys.exit(128 + stop[0])


def show_sample(model, tokenizer_name, path):
    try:
        tokenizer = data.get_tokenizer(tokenizer_name)
    except UserError as error:  # trained without network on tokens made elsewhere
        print(f"no sample: {error}")
        return
    model.eval()
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode_ordinary("The ")], device=device)
    generator = torch.Generator(device).manual_seed(0)
    ids = model.generate(prompt, 200, temperature=0.8, top_k=50, vocab=tokenizer.n_vocab,
                         stop=tokenizer.eot_token, generator=generator)[0].tolist()
    print(f"---\n{tokenizer.decode(ids)}\n---\nmore: python sample.py --checkpoint {path} "
          "--prompt 'The ' --max_new_tokens 300")


def main_of_many():
    """main, with the backend's words for a lost connection put into ours."""
    try:
        main()
    except RuntimeError as error:  # gloo's are plain, NCCL's a subclass
        if not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        raise UserError("another process of this run has ended, or the network to it: the last "
                        "checkpoint is whole, the same command with --resume goes on") from error


if __name__ == "__main__":
    run_script(main_of_many, ModelError)
