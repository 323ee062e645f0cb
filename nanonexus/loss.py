"""
The training loss: cross-entropy of the output layer, without all of its logits in memory.

At a vocabulary of 50,304 the logits of 32,768 tokens are 6.6 GB in float32, their gradient as much
again: more than everything else in a 70M model. Here they exist for some rows at a time. The
gradients are computed right in the forward pass, so nothing is computed twice.
"""

from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

# Logits at once. On a CPU 256 MiB in float32, which suits its caches; on CUDA 2 GiB, as every part
# adds to the head's whole gradient in float32.
CHUNK = {"cpu": 2**26, "cuda": 2**29}


def rows_at_once(h, vocab_size):
    """How many rows of h (N, C) have their logits in memory at once: a multiple of 256, if that
    many fit, since odd sizes are slow on CUDA."""
    rows = max(1, CHUNK.get(h.device.type, CHUNK["cpu"]) // vocab_size)
    return rows if rows < 256 or h.device.type == "cpu" else rows // 256 * 256


class LinearCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h Wᵀ)[target] over the rows whose target is not -1.

    h (N, C), weight (V, C), targets (N,) -> a float32 scalar. Products are in `dtype`, the softmax
    and all sums in float32 or better. learn=False computes no gradients.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, dtype, learn):
        w, count = weight.to(dtype), (targets >= 0).sum()
        total = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        dh, dw = (torch.empty_like(h), torch.zeros_like(weight)) if learn else (None, None)
        rows, ids = rows_at_once(h, weight.size(0)), torch.arange(weight.size(0), device=h.device)
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            x, target = h[part].to(dtype), targets[part, None]
            log_p = (x @ w.T).to(total.dtype).log_softmax(-1)  # (rows, V)
            known = target >= 0
            target = target.clamp(min=0)
            total -= (log_p.gather(1, target) * known).sum()
            if learn:  # of each row's logits: softmax - onehot(target), compiled into one kernel
                p = log_p.exp_().add_(ids == target, alpha=-1)
                p = p.mul_(known.to(p.dtype) / count).to(dtype)
                dh[part] = p @ w
                dw += p.T @ x
        ctx.save_for_backward(dh, dw)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None, None, None


class TrainingLoss(nn.Module):
    """What a training step runs, compiles and wraps for DDP: tokens in, the mean loss out.

    eot: the id that opens a document; if given, no token attends beyond its own document.
    recompute: inner loops are recomputed in the backward pass, for less memory and more time.
    """

    def __init__(self, gpt, eot=None, recompute=False):
        super().__init__()
        self.gpt, self.eot = gpt, eot
        for block in gpt.blocks if recompute else ():
            block.attn.refine = partial(checkpoint, block.attn.refine, use_reentrant=False,
                                        preserve_rng_state=False)  # no dropout inside

    def documents(self, idx):
        """(B, T), the index of each token's document in idx; None if a row is all one."""
        return None if self.eot is None else (idx == self.eot).cumsum(1)

    def forward(self, idx, targets, masks=None):
        """The loss of GPT.forward, in nats. idx, targets (B, T); targets of -1 are ignored.
        masks: what gpt.attention_masks gives for documents(idx), if made elsewhere."""
        docs = self.documents(idx) if masks is None else None
        h = self.gpt.hidden_states(idx, docs=docs, masks=masks).flatten(0, 1)
        weight = self.gpt.head.weight
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        with torch.autocast(kind, enabled=False):
            return LinearCrossEntropy.apply(h, weight, targets.flatten(), dtype,
                                            torch.is_grad_enabled())
