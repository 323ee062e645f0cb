"""
Train a GPT or its Nexus counterpart, on one device or many.

    python train.py                                    # tiny, order 2, minutes on a laptop
    python train.py --nexus_order 1 --out out/base     # its baseline
    python train.py --control key-shift --out out/shift
    python train.py --resume --out out/base --max_steps 2000
    torchrun --standalone --nproc_per_node=8 train.py --preset pythia-70m --dataset tokens/fw

Everything is written to --out: ckpt.pt, and log.jsonl with a line per log step. Ctrl-C finishes the
step, saves and stops; --resume continues as if nothing had happened, on one CPU bit for bit.
"""

import math
import os
import sys
import time
from dataclasses import asdict

import torch

from nanonexus import data
from nanonexus.checkpoint import check_new, probe, restore_weights, save_checkpoint
from nanonexus.cli import UserError, run_script
from nanonexus.controls import build, describe
from nanonexus.device import peak_flops
from nanonexus.files import output_folder, reading
from nanonexus.flags import make_config, parse_args, split_batch
from nanonexus.generate import generate
from nanonexus.log import Log
from nanonexus.processes import Stop, join_processes
from nanonexus.tokenizer import get_tokenizer


def make_optimizers(model, args):
    """AdamW with Pythia's settings: decay on matrices, none on biases and LayerNorms. Any torch
    optimizers will do, on any groups of parameters: each group's own lr is its peak."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8,
                              fused=params[0].device.type in ("cuda", "cpu"))]


def layout(gpt, optimizers):
    """[(class, its groups' parameter names and settings)]: what a checkpoint's optimizers are. lr
    follows from initial_lr, its peak, and how a step is computed depends on the device."""
    names = {id(p): name for name, p in gpt.named_parameters(remove_duplicate=False)}
    return [[type(optimizer).__name__, [
        {key: [names[id(p)] for p in value] if key == "params" else value
         for key, value in group.items() if key not in ("lr", "fused", "foreach", "capturable")}
        for group in optimizer.param_groups]] for optimizer in optimizers]


def warmup_cosine(step, warmup, decay, floor=0.1):
    """The fraction of the peak learning rate at a step: a linear rise over `warmup` steps, a cosine
    down to `floor` at step `decay`, constant from there on."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, decay - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def pick_dtype(name, device):
    """The torch dtype of the matrix products; "auto": bfloat16 on CUDA devices that compute in it
    (compute capability 8.0: a T4 does not), float16 on others, float32 elsewhere."""
    if name == "auto":
        name = "float32" if device.type != "cuda" else \
            "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return getattr(torch, name)


def train(args, config, tokens, world, saved, stop, log):
    """Train until max_steps, or until stop asks for an end; returns the GPT and the last step."""
    device, T = world.device, config.block_size
    micro_batch, micro_steps = split_batch(args, T, world)
    n_train, n_val = data.count_sequences(tokens.train, T), data.count_sequences(tokens.val, T)
    torch.manual_seed(args.seed)
    gpt = build(config).to(device)
    check_loss(gpt)
    optimizers, step = make_optimizers(gpt, args), 0
    dtype = pick_dtype(args.dtype, device)
    # float16's small gradients vanish unless the loss is scaled; otherwise this scaler is idle
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    if saved:
        step, path = saved["step"], os.path.join(args.out, "ckpt.pt")
        restore_weights(gpt, saved, path)
        if saved["layout"] != layout(gpt, optimizers):
            raise UserError("make_optimizers has changed since: the checkpoint's optimizers have "
                            "other classes, parameters or settings; start a new run in another "
                            "--out")
        with reading(path, "start a new run"):
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                # the groups are this run's own: some of their settings depend on the device
                optimizer.load_state_dict(state | dict(
                    param_groups=optimizer.state_dict()["param_groups"]))
            scaler.load_state_dict(saved["scaler"])
    else:
        check_new(gpt, args.doc_mask)

    model, block_masks = gpt, gpt.attention_mask
    if device.type == "cuda" if args.compile is None else args.compile:
        model = torch.compile(gpt, fullgraph=True, dynamic=False)
        block_masks = torch.compile(block_masks, fullgraph=True, dynamic=False)
    if world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)

    def masks(x):
        """Arguments of the model: with --doc_mask each token's document; with flex the masks, made
        once for all layers."""
        docs = (x == tokens.eot).cumsum(1) if args.doc_mask else None
        flex = config.attention == "flex"
        return dict(docs=docs, mask=block_masks(T, 0, docs, device)) if flex else dict(docs=docs)

    def loss_of(x, y):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(x, y, **masks(x))

    @torch.no_grad()
    def validate():
        """The mean loss on a fixed list of sequences, in nats per token."""
        model.eval()
        sequences = data.val_indices(n_val, args.eval_windows, world.rank, world.size)
        total = torch.zeros((), device=device)
        for part in data.split(sequences, micro_batch):
            x, y = tokens.load("val", T, part, device)
            short = (0, 0, 0, micro_batch - len(x))  # one shape, one compilation
            pad = torch.nn.functional.pad
            total += loss_of(pad(x, short), pad(y, short, value=-1)) * len(x)
        model.train()
        return world.mean(total, len(sequences))

    def sequences_of(step):
        return data.train_indices(n_train, args.seed, step, args.batch_tokens // T, world.rank,
                                  world.size)

    def save():
        save_checkpoint(os.path.join(args.out, "ckpt.pt"), dict(
            model=gpt.state_dict(), probe=probe(gpt), config=asdict(config),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            layout=layout(gpt, optimizers), scaler=scaler.state_dict(), step=step,
            tokens=step * args.batch_tokens,
            tokenizer=tokens.tokenizer, tokenizer_json=tokens.tokenizer_json,
            data=tokens.fingerprint, args=vars(args), torch=str(torch.__version__)), args.keep)

    if log:
        log.say(f"{args.preset}, {describe(config)}, {gpt.num_params():,} parameters; {world.size} "
                f"{device.type}, {str(dtype).removeprefix('torch.')}; {n_train * T:,} tokens of "
                f"{tokens.meta['dataset']}, {args.batch_tokens:,} per step; validation on "
                f"{min(n_val, args.eval_windows):,} of {n_val:,} sequences of {T}"
                + (f"; resumed at step {step}" if saved else ""))
    if not saved and (val_loss := validate()) and log:
        log.write(dict(step=0, tokens=0, train_loss=None, val_loss=val_loss, lr=None,
                       grad_norm=None, tokens_per_sec=None, mfu=None))
    peak = peak_flops() if device.type == "cuda" and dtype != torch.float32 else None
    flops = gpt.flops_per_token(T) if peak else None
    first, norms, timer, timed_from = step + 1, [], None, None  # the first step is not timed
    agree_every = 1  # steps between processes' agreements on stopping
    while step < args.max_steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * warmup_cosine(step, args.warmup_steps,
                                                                  args.decay_steps)
        # dropout too is a pure function of seed, step and rank: resuming needs no RNG state
        torch.manual_seed((args.seed * 1_000_003 + step) * world.size + world.rank)
        total = torch.zeros((), device=device)
        for micro_step, part in enumerate(data.split(sequences_of(step), micro_batch), 1):
            x, y = tokens.load("train", T, part, device)
            if world.size > 1:  # must be set before the forward pass
                model.require_backward_grad_sync = micro_step == micro_steps
            loss = loss_of(x, y)
            scaler.scale(loss / micro_steps).backward()
            total += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if step + 1 == first:
            check_all_learn(gpt)
        norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), args.grad_clip)
        for optimizer in optimizers:
            fused = optimizer.defaults.get("fused")
            if fused and not scaler.is_enabled():  # it skips a bad update, as the scaler would
                optimizer.found_inf = (~norm.isfinite()).float()
            if fused or scaler.is_enabled() or norm.isfinite():  # isfinite waits for the device
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        norms.append(norm)
        step += 1

        last = step == args.max_steps
        if step == first:  # compiled, caches filled
            world.synchronize()
            timer, timed_from = time.perf_counter(), step
        if log:
            log.advance()
        stopping = stop.asked()
        if world.size > 1:  # processes must stop together: they agree every few seconds
            if step == first + 2:
                took = torch.tensor((time.perf_counter() - timer) / 2, device=device)
                agree_every = max(1, int(3 / world.mean(took, 1)))
            stopping = step % agree_every == 0 and world.any(stopping)
        logging = last or step % args.log_interval == 0 or step % args.eval_interval == 0
        saving = last or stopping or step % args.save_interval == 0
        if logging or saving:  # waits for the device
            check_gradients(gpt, norms, step, sequences_of, args, scaler, log)
            norms = []
        if logging:
            train_loss = world.mean(total, micro_steps)
            seconds, steps = time.perf_counter() - timer, step - timed_from
            speed = steps * args.batch_tokens / seconds if steps else None
            val_loss = validate() if last or step % args.eval_interval == 0 else None
            if log:
                log.write(dict(step=step, tokens=step * args.batch_tokens, train_loss=train_loss,
                               val_loss=val_loss, lr=group["lr"], grad_norm=norm.item(),
                               tokens_per_sec=speed and round(speed, 1),
                               mfu=speed * flops / (peak * world.size) if speed and peak else None))
        if saving and log:
            save()
        if logging or saving:
            timer, timed_from = time.perf_counter(), step
        if stopping:
            break
    return gpt, step


def check_all_learn(gpt):
    """UserError if no gradient reached a parameter: it would stay as it is, in silence."""
    unused = [name for name, p in gpt.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise UserError(f"no gradient reaches {', '.join(unused[:4])}: the loss does not use "
                        "it (a weight of the output layer belongs into GPT.output_weights)")


def check_loss(gpt):
    """UserError if what trains is not what is scored and sampled."""
    idx = torch.arange(min(8, gpt.config.block_size), device=gpt.rope.device)[None]
    idx = idx % gpt.config.vocab_size
    with torch.no_grad():
        loss, logits = gpt.eval()(idx, idx), gpt(idx)
    gpt.train()
    want = torch.nn.functional.cross_entropy(logits.mT, idx)
    if not (loss - want).abs() <= 1e-5 * want:
        raise UserError(f"model(idx, targets) gives {loss:.4f}, the cross-entropy of model(idx) is "
                        f"{want:.4f}: what changes the logits belongs into output_layer")


def check_gradients(gpt, norms, step, sequences_of, args, scaler, log):
    """Report those of the last steps whose gradient was not finite, which changed nothing; a
    UserError unless they are to be skipped, or if the weights are not finite either."""
    bad = [i for i, norm in enumerate(torch.stack(norms).tolist(), step - len(norms))
           if not math.isfinite(norm)]
    if not bad:
        return
    if scaler.is_enabled() and scaler.get_scale() >= 1:  # float16's range was exceeded, not ours
        if log:
            log.say(f"{len(bad)} steps skipped up to step {step}: gradients beyond float16, whose "
                    f"scale is now {scaler.get_scale():g}")
        return
    sequences = sequences_of(bad[0])
    wrong = (f"the gradient's norm is {norms[bad[0] - step].item()} at step {bad[0] + 1}, "
             f"sequences {' '.join(map(str, sequences[:8]))}{' ...' if len(sequences) > 8 else ''}")
    if not all(p.isfinite().all() for p in gpt.parameters()):
        raise UserError(f"{wrong}, and so are weights: the last checkpoint is kept")
    if args.on_nan == "stop":
        raise UserError(f"{wrong}: the last checkpoint is kept; try a smaller --lr, or --on_nan "
                        "skip")
    if log:
        log.say(f"{wrong}: skipped" + f", and {len(bad) - 1} more" * (len(bad) > 1))


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


def open_dataset(args, world):
    """The dataset; pydocs is prepared on first use, by the first process while others wait."""
    if args.dataset != "pydocs":
        if os.path.isfile(args.dataset):
            name = os.path.basename(args.dataset).split(".")[0]
            raise UserError(f"--dataset {args.dataset} is a file: first make a dataset of it, "
                            f"python prepare_data.py --dataset text --input {args.dataset} --out "
                            f"tokens/{name}, then use --dataset tokens/{name}")
        if not os.path.isdir(args.dataset):
            raise UserError(f"no dataset {args.dataset}: use pydocs, or a folder made by "
                            f"prepare_data.py --out {args.dataset}")
        return data.Dataset(args.dataset, verify=args.verify)
    folder = os.path.join(args.out, "pydocs")
    if world.rank == 0:
        data.pydocs(folder)
    world.wait()
    return data.Dataset(folder, verify=args.verify)


def main(argv=None):
    began = time.monotonic()
    args, saved = parse_args(__doc__, argv)
    world = join_processes(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    output_folder(args.out)
    tokens = open_dataset(args, world)
    config = make_config(args, tokens, world.device, saved)
    stop = Stop(began + 60 * args.max_minutes)
    log = Log(args, saved) if world.rank == 0 else None
    try:
        with stop:
            gpt, step = train(args, config, tokens, world, saved, stop, log)
    finally:  # in a notebook another run may follow
        if log:
            log.close()
    if world.rank == 0:
        path = os.path.join(args.out, "ckpt.pt")
        if step < args.max_steps:
            print(f"stopped at step {step}, saved in {path}; continue with: "
                  f"python train.py --resume --out {args.out}")
        elif args.sample:
            show_sample(gpt, tokens, path)
    world.leave()
    if stop.signal and step < args.max_steps:
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    run_script(main)
