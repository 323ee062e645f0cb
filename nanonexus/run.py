"""
A training run: its model, optimizer and step, which a checkpoint saves and restores, and its data.
"""

import contextlib
import itertools
import math
import os
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F

from model import GPT
from nanonexus import data
from nanonexus.checkpoint import save_checkpoint
from nanonexus.cli import UserError
from nanonexus.device import fast_attention, peak_flops
from nanonexus.loss import TrainingLoss
from nanonexus.schedule import warmup_cosine


def learning_rate(step, args):
    return warmup_cosine(step, args.lr, args.warmup_steps, args.decay_steps)


def make_optimizer(model, args, device):
    """AdamW with Pythia's settings: decay on matrices, none on biases and LayerNorms."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


class Run:
    """A run: its model, optimizer and step, which a checkpoint saves and restores, its data, and
    the function that it trains."""

    def __init__(self, args, config, tokens, world):
        T = config.block_size
        # batch_tokens = windows x T; windows = processes x micro-steps x micro_batch
        unit = T * world.size * args.micro_batch
        if args.batch_tokens % unit:
            raise UserError(
                f"--batch_tokens {args.batch_tokens} must be a multiple of block_size x "
                f"micro_batch x processes = {T} x {args.micro_batch} x {world.size} = {unit}: use "
                f"{max(1, args.batch_tokens // unit) * unit}, or another --micro_batch")
        self.batch_size, self.accumulate = args.batch_tokens // T, args.batch_tokens // unit
        self.n_train, self.n_val = data.windows(tokens.train, T), data.windows(tokens.val, T)
        self.args, self.config, self.tokens, self.world = args, config, tokens, world

        device, cuda = world.device, world.device.type == "cuda"
        self.bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and cuda)
        torch.manual_seed(args.seed)
        self.gpt, self.step = GPT(config).to(device), 0
        self.optimizer = make_optimizer(self.gpt, args, device)
        self.loss = TrainingLoss(self.gpt, tokens.eot if args.doc_mask else None,
                                 args.checkpoint_attention)
        self.documents, self.masks = self.loss.documents, self.gpt.attention_masks
        if cuda if args.compile is None else args.compile:
            self.loss = torch.compile(self.loss, fullgraph=True, dynamic=False)
            self.masks = torch.compile(self.masks, fullgraph=True, dynamic=False)
        self.model = self.loss if world.size == 1 else torch.nn.parallel.DistributedDataParallel(
            self.loss, device_ids=[device.index] if cuda else None, broadcast_buffers=False,
            gradient_as_bucket_view=True)
        self.peak = peak_flops() if cuda and self.bf16 else None

    def mfu(self, speed):
        """Model FLOPs utilisation at a speed in tokens/s; None if the peak is unknown."""
        flops = self.gpt.flops_per_token(self.config.block_size)
        return speed * flops / (self.peak * self.world.size) if speed and self.peak else None

    def restore(self, saved):
        self.gpt.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def save(self):
        if self.world.rank == 0:
            save_checkpoint(os.path.join(self.args.out, "ckpt.pt"), dict(
                format=1, model=self.gpt.state_dict(), optimizer=self.optimizer.state_dict(),
                config=asdict(self.config), step=self.step,
                tokens=self.step * self.args.batch_tokens, tokenizer=self.tokens.tokenizer,
                tokenizer_json=self.tokens.tokenizer_json,
                data=self.tokens.fingerprint, args=vars(self.args),
                torch=str(torch.__version__)), self.args.keep)

    def load(self, tokens, windows):
        """idx and targets (len(windows), T) on the device, from tokens.train or tokens.val."""
        rows = torch.from_numpy(data.read_windows(tokens, self.config.block_size, windows))
        if (top := int(rows.max())) >= self.config.vocab_size:  # opening a set checks its beginning
            raise UserError(f"{self.tokens.folder} holds the id {top}, beyond the vocabulary of "
                            f"{self.config.vocab_size}: prepare it again")
        if self.world.device.type == "cuda":  # pinned, the copy runs while the device computes
            rows = rows.pin_memory()
        rows = rows.to(self.world.device, non_blocking=True)  # one copy, split there
        return rows[:, :-1], rows[:, 1:]

    def windows(self, step):
        """The windows of a step's batch that this process trains on."""
        return data.train_indices(self.n_train, self.args.seed, step, self.batch_size,
                                  self.world.rank, self.world.size)

    def inputs(self, idx, targets):
        """What self.loss takes: with flex the masks too, made once per batch outside its graph."""
        if self.config.attention != "flex":
            return idx, targets
        return idx, targets, self.masks(idx.size(1), 0, self.documents(idx), idx.device)

    def micro_batches(self):
        """idx and targets of every micro-step from here on, prepared one ahead."""
        size, steps = self.args.micro_batch, itertools.count(self.step)
        parts = (windows[i:i + size] for windows in map(self.windows, steps)
                 for i in range(0, len(windows), size))
        return data.ahead(partial(self.load, self.tokens.train), parts)

    @torch.no_grad()
    def validate(self):
        """The mean loss on a fixed list of windows, in nats per token."""
        self.gpt.eval()
        size, rank, world = self.args.micro_batch, self.world.rank, self.world.size
        windows = data.val_indices(self.n_val, self.args.eval_windows, rank, world)
        total = torch.zeros((), device=self.world.device)
        for i in range(0, len(windows), size):
            x, y = self.load(self.tokens.val, windows[i:i + size])
            short = (0, 0, 0, size - len(x))  # one shape, one compilation
            inputs = self.inputs(F.pad(x, short), F.pad(y, short, value=-1))
            with self.precision():
                total += self.loss(*inputs) * len(x)
        self.gpt.train()
        return self.world.mean(total, len(windows))

    @contextlib.contextmanager
    def precision(self):
        """How to compute: bfloat16 products if requested, the fastest attention available."""
        with torch.autocast(self.world.device.type, torch.bfloat16, self.bf16), \
                fast_attention(self.world.device):
            yield

    def update(self, norm):
        """The optimizer's step, unless the gradient is not finite. The fused optimizer decides
        that on the device, so that nobody waits for it."""
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
        elif math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, step, norm, log):
        """Report a step whose gradient was not finite; a UserError unless it is to be skipped."""
        if math.isfinite(norm):
            return
        windows = self.windows(step)
        wrong = (f"the gradient's norm is {norm.item()} at step {step + 1}, windows "
                 f"{' '.join(map(str, windows[:8]))}{' ...' if len(windows) > 8 else ''}")
        if self.args.on_nan == "stop":
            raise UserError(f"{wrong}: the last checkpoint is kept; try a smaller --lr, or "
                            "--on_nan skip")
        if log:
            log.say(f"{wrong}: skipped")
