"""
Controls for Nexus: other ways to let a query or a key know about earlier tokens.

    python experiments/controls.py key-shift --nexus_order 1 --dataset tokens/books
    python experiments/controls.py key-shift --nexus_order 2 --nexus_inner past --nexus_streams k
    python experiments/controls.py key-shift eval_sciq.py --checkpoint out/shift/ckpt.pt
    python experiments/controls.py key-shift sample.py --checkpoint out/shift/ckpt.pt --prompt The

The first argument names the control, the others are train.py's flags: the run, its log and its
checkpoints are train.py's. A script's name before the flags runs that script instead. Those that
change q, k and v do so before rotary and before any inner loop, so that each works with Nexus or,
at --nexus_order 1, without.

Cheap local mixing:
  key-shift  k_t <- (1 - a) k_t + a k_(t-1), one a in (0, 1) per head: smeared keys (Olsson et al.
             2022, https://arxiv.org/abs/2209.11895)
  kv-shift   k_t <- a1 k_t + a2 k_(t-1), v_t <- b1 v_t + b2 v_(t-1), free scalars per head
             (https://arxiv.org/abs/2411.19574)
  canon      q, k, v each plus a causal depthwise convolution of width 4 (Canon layer B without
             activation, Allen-Zhu, https://arxiv.org/abs/2512.17351)
Inner maps that ignore the content:
  mean       s_t <- s_t + the mean of all s before t, for q and k
  bias       s_t <- s_t + a weighted mean of all s before t, weights learnt per distance
Between the two:
  near       `cross` with a bias towards near tokens; it contains the key shift; needs
             --nexus_order 2 (ALiBi's bias, https://arxiv.org/abs/2108.12409, with a learnt slope)
  near-gated the same, but a learnt gate per head lets the content in, from nothing at the start
More computation, or more weights, for the same purpose:
  mix        q, k = W x', x' = x + Attn_W(x): projected from a representation refined once
  twice      the attention sublayer of each block applied twice, with the same weights
  separate   inner loops with separate projections, 3 C^2 per stream; needs --nexus_order 2
Another reading of the paper, without new weights; needs --nexus_order 2:
  tokens     h <- Attn(h W_q, h W_k, x W_v), from h = x; then q, k = h W_q, h W_k
  tokens-residual  the same with h <- x + Attn(h W_q, h W_k, x W_v)

Each class gives the forward FLOPs that it adds, per token and layer, in flops(config, T); as in
GPT.flops_per_token, matrix products count and elementwise operations do not. No control respects
document boundaries: with --doc_mask a shift still reaches the last token of the previous document.
"""

import importlib
import math
import sys
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import ROOT  # noqa: F401  makes the modules below importable

import model
from model import Block, CausalSelfAttention, apply_rotary_emb, attend
from nanonexus.cli import UserError, run_script


def with_past(x, ctx):
    """x (B, H, T, D) with all earlier tokens, (B, H, S, D): from the KV cache if there is one."""
    return x if ctx.cache is None else ctx.cache.update(x)


def previous(x, ctx, first_stays=False):
    """x (B, H, T, D) one token earlier, same shape; the first token gets 0, or itself."""
    past, T = with_past(x, ctx), x.size(2)
    before = past[:, :, :1] if first_stays else torch.zeros_like(past[:, :, :1])
    return torch.cat([before, past[:, :, :-1]], dim=2)[:, :, -T:]


def per_head(p):
    """A parameter (H,) as (H, 1, 1), to multiply (B, H, T, D)."""
    return p[:, None, None]


def distances(S, T, device):
    """t - r of each of the last T tokens t and all S tokens r: (T, S)."""
    here = torch.arange(S, device=device)
    return here[-T:, None] - here


def need_loops(control):
    if control.config.nexus_order < 2:
        name = next(name for name, kind in CONTROLS.items() if kind is type(control))
        raise UserError(f"{name} needs --nexus_order 2 or more: order 1 has no inner loop")


class Change(CausalSelfAttention):
    """The model's attention with change(q, k, v, ctx) before its loops and its outer attention."""

    def forward(self, x, ctx):
        q, k, v = self.change(*self.heads(self.qkv(x)).chunk(3, dim=1), ctx)
        if self.config.nexus_order > 1:
            q, k = self.refine(q, k, ctx)
        return self.proj(attend(q, k, v, ctx).transpose(1, 2).flatten(2))

    @staticmethod
    def flops(config, T):
        return 0


class KeyShift(Change):
    """k_t <- (1 - a) k_t + a k_(t-1) with a = sigmoid(shift), which starts at 1/2: half of the
    token's own key, half of the previous one (Olsson et al. give the form and not the start). At
    a -> 0 it is the baseline. The first token keeps its key."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.n_head))

    def change(self, q, k, v, ctx):
        a = per_head(self.shift.sigmoid()).to(k.dtype)
        return q, torch.lerp(k, previous(k, ctx, first_stays=True), a), v


class KVShift(Change):
    """k_t <- a1 k_t + a2 k_(t-1), v_t <- b1 v_t + b2 v_(t-1). As published, a1 and b1 start
    uniform in (0, 1) and a2 = 1 - a1, b2 = 1 - b1. At a1 = b1 = 1, a2 = b2 = 0 it is the baseline.
    Before the first token there are zeros."""

    def __init__(self, config):
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # all else starts as in the baseline
            a, b = torch.rand(2, config.n_head)
        self.a1, self.a2 = nn.Parameter(a), nn.Parameter(1 - a)
        self.b1, self.b2 = nn.Parameter(b), nn.Parameter(1 - b)

    def change(self, q, k, v, ctx):
        a1, a2, b1, b2 = (per_head(p).to(k.dtype) for p in (self.a1, self.a2, self.b1, self.b2))
        return q, a1 * k + a2 * previous(k, ctx), b1 * v + b2 * previous(v, ctx)


class Canon(Change):
    """x_t <- x_t + w0 x_(t-3) + w1 x_(t-2) + w2 x_(t-1) + w3 x_t for every channel x of q, k and v,
    each with its own weights. They start as in any torch convolution, uniform in (-1/2, 1/2), as in
    the published code; at 0 it is the baseline. They have weight decay, like matrices."""

    def __init__(self, config):
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # all else starts as in the baseline
            self.conv = nn.Conv1d(3 * config.n_embd, 3 * config.n_embd, 4,
                                  groups=3 * config.n_embd, bias=False)

    def change(self, q, k, v, ctx):
        x = torch.cat([q, k, v], dim=1)  # (B, 3H, T, D)
        past, T = F.pad(with_past(x, ctx), (0, 0, 3, 0))[:, :, -x.size(2) - 3:], x.size(2)
        channels = past.transpose(2, 3).flatten(1, 2)  # (B, 3C, T + 3)
        y = self.conv(channels).unflatten(1, (x.size(1), -1)).transpose(2, 3)[:, :, -T:]
        return (x + y).chunk(3, dim=1)

    @staticmethod
    def flops(config, T):
        return 2 * 4 * 3 * config.n_embd


class Mean(Change):
    """s_t <- s_t + the mean of s over all tokens before t, for q and for k: an inner map that
    ignores the content and has nothing to learn. The first token keeps s."""

    def change(self, q, k, v, ctx):
        return self.gather(q, ctx), self.gather(k, ctx), v

    def gather(self, s, ctx):
        past, T = with_past(s, ctx).float(), s.size(2)  # sums in float32, not in bfloat16
        counts = torch.arange(past.size(2), device=s.device).clamp(min=1)
        mean = (past.cumsum(2) - past) / counts[:, None]
        return s + mean[:, :, -T:].to(s.dtype)


class Bias(Change):
    """s_t <- s_t + sum over r < t of softmax_r(b[t - r]) s_r, with a learnt b per head, stream and
    distance, 0 at the start: there it is Mean. The first token keeps s."""

    def __init__(self, config):
        super().__init__(config)
        size = config.n_head * config.block_size
        self.q_distance = nn.Parameter(torch.zeros(size))  # 1-D: no weight decay
        self.k_distance = nn.Parameter(torch.zeros(size))

    def change(self, q, k, v, ctx):
        return (self.gather(q, self.q_distance, ctx), self.gather(k, self.k_distance, ctx), v)

    def gather(self, s, bias, ctx):
        past = with_past(s, ctx)
        distance = distances(past.size(2), s.size(2), s.device)  # (T, S)
        scores = bias.view(self.config.n_head, -1)[:, distance.clamp(min=0)]  # (H, T, S)
        weights = scores.masked_fill(distance <= 0, -1e30).softmax(-1) * (distance > 0)
        return s + weights.to(s.dtype) @ past

    @staticmethod
    def flops(config, T):
        return 2 * config.n_embd * T  # two streams, one product each, half of it masked


class Near(CausalSelfAttention):
    """h_s <- (1 - a) s + a sum over r < t of softmax_r(h_q h_k / sqrt(D) - c (t - r)) s_r, rotary
    as in `cross`, with a in (0, 1) and c > 0 learnt per head, 1/2 and 4 at the start. At c ->
    infinity it is a shift of every stream. The first token keeps s."""

    def __init__(self, config):
        super().__init__(config)
        need_loops(self)
        self.shift = nn.Parameter(torch.zeros(config.n_head))  # a = sigmoid(shift)
        self.slope = nn.Parameter(torch.full((config.n_head,), math.log(4)))  # log c

    def content(self, scores):
        return scores

    def refine(self, q, k, ctx):
        h = s = {"q": q, "k": k}
        a = per_head(self.shift.sigmoid()).to(k.dtype)
        for _ in range(self.config.nexus_order - 1):
            query, key = (apply_rotary_emb(h[n], *ctx.rope) for n in "qk")
            key = with_past(key, ctx)
            distance = distances(key.size(2), q.size(2), key.device)  # (T, S)
            scores = (self.content(query @ key.mT / math.sqrt(q.size(-1)))
                      - per_head(self.slope.exp()) * distance)  # (B, H, T, S), at least float32
            seen = distance > 0
            seen[:, 0] = True  # token 0 sees itself
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype)
            h = h | {n: torch.lerp(s[n], weights @ with_past(s[n], ctx), a)
                     for n in self.config.nexus_streams}
        return h["q"], h["k"]

    @staticmethod
    def flops(config, T):  # one map for all streams, where `cross` is counted with one for each
        streams, loops = len(config.nexus_streams), config.nexus_order - 1
        return -(streams - 1) * loops * config.n_embd * T


class NearGated(Near):
    """Near with scores g h_q h_k / sqrt(D) - c (t - r), g learnt per head, 0 at the start."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.n_head))

    def content(self, scores):
        return per_head(self.gate) * scores


class Mix(CausalSelfAttention):
    """q, k = W x' with x' = x + Attn_W(x), the layer's own attention, output projection included,
    applied once before; v is that of x. It adds no parameter."""

    def forward(self, x, ctx):
        q, k, v = self.heads(self.qkv(x)).chunk(3, dim=1)
        refined = x + self.proj(attend(q, k, v, ctx).transpose(1, 2).flatten(2))
        rows = 2 * self.config.n_embd
        q, k = self.heads(F.linear(refined, self.qkv.weight[:rows], self.qkv.bias[:rows])
                          ).chunk(2, dim=1)
        return self.proj(attend(q, k, v, ctx).transpose(1, 2).flatten(2))

    @staticmethod
    def flops(config, T):  # W_q, W_k and the output's once more, and one attention
        return 2 * 3 * config.n_embd**2 + 2 * config.n_embd * T


class Twice(Block):
    """x <- x + attn(norm(x)) before the block, with the block's own norm and weights: its attention
    sublayer is applied twice. It adds no parameter."""

    def forward(self, x, ctx):
        return super().forward(x + self.dropout(self.attn(self.norm1(x), ctx)), ctx)

    @staticmethod
    def flops(config, T):  # a second attention sublayer
        return 2 * 4 * config.n_embd**2 + 2 * config.n_embd * T


class Separate(CausalSelfAttention):
    """h_s <- Attn(h_s A, h_s B, s C) with separate A, B, C per stream, the same in all loops, that
    start like every other matrix."""

    def __init__(self, config):
        super().__init__(config)
        need_loops(self)
        C = config.n_embd
        self.inner = nn.ModuleDict({n: nn.Linear(C, 3 * C, bias=False)
                                    for n in config.nexus_streams})

    def refine(self, q, k, ctx):
        streams = {"q": q, "k": k}
        for n, linear in self.inner.items():
            h, project = streams[n], linear.weight.chunk(3)
            values = self.through(project[2], h)
            for _ in range(self.config.nexus_order - 1):
                h = attend(self.through(project[0], h), self.through(project[1], h), values, ctx)
            streams[n] = h
        return streams["q"], streams["k"]

    def through(self, weight, x):
        """x (B, H, T, D), heads joined, times weight (C, C), the same shape."""
        return self.heads(F.linear(x.transpose(1, 2).flatten(2), weight))

    @staticmethod
    def flops(config, T):  # its attention is counted with the loops
        loops = config.nexus_order - 1
        return 2 * (2 * loops + 1) * len(config.nexus_streams) * config.n_embd**2


class Tokens(CausalSelfAttention):
    """The tokens gather, and what they have gathered gives the queries and keys: from h = x,
    order - 1 times h <- Attn(h W_q, h W_k, x W_v), heads joined, no output projection; then q and k
    (or the refined one of them) are those of h, and v is that of x. It adds no parameter."""

    def __init__(self, config):
        super().__init__(config)
        need_loops(self)

    def keep(self, x):
        return 0

    def forward(self, x, ctx):
        q, k, v = self.heads(self.qkv(x)).chunk(3, dim=1)  # (B, H, T, D) each
        h_q, h_k = q, k
        rows = 2 * self.config.n_embd
        for _ in range(self.config.nexus_order - 1):
            h = self.keep(x) + attend(h_q, h_k, v, ctx).transpose(1, 2).flatten(2)  # (B, T, C)
            h_q, h_k = self.heads(F.linear(h, self.qkv.weight[:rows], self.qkv.bias[:rows])
                                  ).chunk(2, dim=1)
        streams = self.config.nexus_streams
        q, k = h_q if "q" in streams else q, h_k if "k" in streams else k
        return self.proj(attend(q, k, v, ctx).transpose(1, 2).flatten(2))

    @staticmethod
    def flops(config, T):  # one attention a loop, not one per stream; W_q and W_k once more
        loops = config.nexus_order - 1
        return loops * (2 * 2 * config.n_embd**2
                        - 2 * (len(config.nexus_streams) - 1) * config.n_embd * T)


class TokensResidual(Tokens):
    """Tokens with h <- x + Attn(h W_q, h W_k, x W_v): each token keeps what it was."""

    def keep(self, x):
        return x


CONTROLS = {"key-shift": KeyShift, "kv-shift": KVShift, "canon": Canon, "mean": Mean, "bias": Bias,
            "near": Near, "near-gated": NearGated, "mix": Mix, "twice": Twice, "separate": Separate,
            "tokens": Tokens, "tokens-residual": TokensResidual}
SCRIPTS = "train.py", "eval_sciq.py", "sample.py"  # that run with a control


@contextmanager
def using(name):
    """Inside, models are built with the control `name`; None: as they are. UserError if there is no
    such control."""
    if name not in (None, *CONTROLS):
        raise UserError(f"no control {name!r}: choose from {', '.join(CONTROLS)}")
    if name and issubclass(CONTROLS[name], Block):
        model.Block = CONTROLS[name]
    elif name:
        model.CausalSelfAttention = CONTROLS[name]
    try:
        yield
    finally:
        model.Block, model.CausalSelfAttention = Block, CausalSelfAttention


def flops_per_token(name, config, T):
    """GPT.flops_per_token with what the control `name` (None: none) adds, forward and backward."""
    extra = CONTROLS[name].flops(config, T) if name else 0
    return model.GPT(config).flops_per_token(T) + 3 * config.n_layer * extra


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    name, *rest = sys.argv[1:]
    script = rest.pop(0) if rest[:1] and rest[0] in SCRIPTS else "train.py"
    script = importlib.import_module(script.removesuffix(".py"))
    sys.argv[1:] = rest
    with using(name):
        script.main()


if __name__ == "__main__":
    run_script(main)
