"""
Controls for Nexus: other ways to let a query or a key know about earlier tokens.

    python train.py --control key-shift --dataset tokens/books           # of order 1
    python train.py --control key-shift --nexus_order 2 --nexus_inner past --nexus_streams k
    python train.py --control near --nexus_streams k                     # of order 2

A control is a part of the model's configuration: its checkpoints are resumed, scored, sampled and
shown like any other. Each overrides only what it changes of CausalSelfAttention: `prepare`, which
comes before the inner loops and works at every order, or `refine`, the loops themselves, which
needs order 2 or more and takes the place of --nexus_inner.

Cheap local mixing, in `prepare`:
  key-shift  k_t <- (1 - a) k_t + a k_(t-1), one a in (0, 1) per head: smeared keys (Olsson et al.
             2022, https://arxiv.org/abs/2209.11895)
  kv-shift   k_t <- a1 k_t + a2 k_(t-1), v_t <- b1 v_t + b2 v_(t-1), free scalars per head
             (https://arxiv.org/abs/2411.19574)
  canon      q, k, v each plus a causal depthwise convolution of width 4 (Canon layer B without
             activation, Allen-Zhu, https://arxiv.org/abs/2512.17351)
Inner maps that ignore the content, in `prepare`:
  mean       s_t <- s_t + the mean of all s before t, for q and k
  bias       s_t <- s_t + a weighted mean of all s before t, weights learnt per distance
Between the two, in `refine`:
  near       `cross` with a bias towards near tokens; it contains the key shift (ALiBi's bias,
             https://arxiv.org/abs/2108.12409, with a learnt slope)
  near-gated the same, but content enters through a learnt gate per head, initially 0
Other recursions, in `refine`:
  tokens-residual  `tokens` with h <- x + Attn(h W_q, h W_k, x W_v)
  mix        the same with h <- x + Attn(h W_q, h W_k, x W_v) W_o: the layer itself applied before
Whether a token sees itself, in `inner_step`. Attn_< sees earlier tokens alone:
                      own token seen                       own token unseen
    nothing is kept   Attn(h_s, h_s, s)      self          Attn_<(h_s, h_s, s)      self-strict
    s is kept         s + Attn(h_s, h_s, s)  self-residual s + Attn_<(h_s, h_s, s)  past
  and the same of h_q and h_k: cross-plain, cross-strict, cross-residual and, of model.py, cross

All in `prepare`, near and near-gated reach across documents, and refuse document masks.
"""

import math
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (
    GPT,
    CausalSelfAttention,
    GPTConfig,
    ModelError,
    apply_rotary_emb,
    attend,
    check,
    merge_heads,
)


def build(config):
    """The GPT of a GPTConfig, with its control if it names one: the one way to make a model.
    ModelError for a control that does not exist or cannot have this order."""
    if not config.control:
        return GPT(config)
    check(config.control in CONTROLS, f"no control {config.control!r}: choose from "
          f"{', '.join(CONTROLS)}")
    kind = CONTROLS[config.control]
    check(config.nexus_order > 1 or not replaces_loops(config.control), f"the control "
          f"{config.control} needs nexus_order 2 or more: order 1 has no inner loop")
    return GPT(config, attention=kind)


def replaces_loops(control):
    """Whether a control takes the place of the inner loops, and so needs order 2."""
    kind, base = CONTROLS[control], CausalSelfAttention
    return (kind.refine, kind.inner_step) != (base.refine, base.inner_step)


def describe(config):
    """What a model is, in a few words, such as "order 2, cross on k" or "order 1, key-shift"."""
    words = [f"order {config.nexus_order}", config.control]
    if config.nexus_order > 1:
        on = "" if config.nexus_streams == "qk" else f" on {config.nexus_streams}"
        own = config.control and replaces_loops(config.control)
        words[1:] = [config.control + on] if own else [config.control, config.nexus_inner + on]
    return ", ".join(word for word in words if word)


def one_document(ctx):
    """For controls that reach back without regard to documents: ModelError if there are some."""
    if ctx.docs is not None:
        raise ModelError("this control reaches across documents: drop document masks and padding")


def previous(x, ctx, name, first_stays=False):
    """x (B, H, T, D) one token earlier, same shape; the first token gets 0, or itself."""
    one_document(ctx)
    past, T = ctx.remember(name, x), x.size(2)
    before = past[:, :, :1] if first_stays else torch.zeros_like(past[:, :, :1])
    return torch.cat([before, past[:, :, :-1]], dim=2)[:, :, -T:]


def per_head(p):
    """A parameter (H,) as (H, 1, 1), to multiply (B, H, T, D)."""
    return p[:, None, None]


def distances(S, T, device):
    """t - r of each of the last T tokens t and all S tokens r: (T, S)."""
    here = torch.arange(S, device=device)
    return here[-T:, None] - here


class KeyShift(CausalSelfAttention):
    """k_t <- (1 - a) k_t + a k_(t-1) with a = sigmoid(shift), initially 1/2: half of the token's
    own key, half of the previous one (Olsson et al. give the form, not the initial value). At
    a -> 0 it is the baseline. The first token keeps its key."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.n_head))

    def prepare(self, q, k, v, ctx):
        a = per_head(self.shift.sigmoid()).to(k.dtype)
        return q, torch.lerp(k, previous(k, ctx, "k", first_stays=True), a), v


class KVShift(CausalSelfAttention):
    """k_t <- a1 k_t + a2 k_(t-1), v_t <- b1 v_t + b2 v_(t-1). As published, a1 and b1 start
    uniform in (0, 1) and a2 = 1 - a1, b2 = 1 - b1. At a1 = b1 = 1, a2 = b2 = 0 it is the baseline.
    Before the first token there are zeros."""

    def __init__(self, config):
        super().__init__(config)
        a, b = torch.rand(2, config.n_head)
        self.a1, self.a2 = nn.Parameter(a), nn.Parameter(1 - a)
        self.b1, self.b2 = nn.Parameter(b), nn.Parameter(1 - b)

    def prepare(self, q, k, v, ctx):
        a1, a2, b1, b2 = (per_head(p).to(k.dtype) for p in (self.a1, self.a2, self.b1, self.b2))
        return q, a1 * k + a2 * previous(k, ctx, "k"), b1 * v + b2 * previous(v, ctx, "v")


class Canon(CausalSelfAttention):
    """x_t <- x_t + w0 x_(t-3) + w1 x_(t-2) + w2 x_(t-1) + w3 x_t for every channel x of q, k and v,
    each with its own weights. Initially uniform in (-1/2, 1/2), as any torch convolution, and as in
    the published code; at 0 it is the baseline. They have weight decay, like matrices."""

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv1d(3 * config.n_embd, 3 * config.n_embd, 4,
                              groups=3 * config.n_embd, bias=False)

    def prepare(self, q, k, v, ctx):
        one_document(ctx)
        x = torch.cat([q, k, v], dim=1)  # (B, 3H, T, D)
        past, T = F.pad(ctx.remember("qkv", x), (0, 0, 3, 0))[:, :, -x.size(2) - 3:], x.size(2)
        channels = past.transpose(2, 3).flatten(1, 2)  # (B, 3C, T + 3)
        y = self.conv(channels).unflatten(1, (x.size(1), -1)).transpose(2, 3)[:, :, -T:]
        return (x + y).chunk(3, dim=1)


class Mean(CausalSelfAttention):
    """s_t <- s_t + the mean of s over all tokens before t, for q and for k: an inner map that
    ignores the content and has nothing to learn. The first token keeps s."""

    def prepare(self, q, k, v, ctx):
        return self.gather(q, ctx, "q"), self.gather(k, ctx, "k"), v

    def gather(self, s, ctx, name):
        one_document(ctx)
        past, T = ctx.remember(name, s).float(), s.size(2)  # sums in float32, not in bfloat16
        counts = torch.arange(past.size(2), device=s.device).clamp(min=1)
        mean = (past.cumsum(2) - past) / counts[:, None]
        return s + mean[:, :, -T:].to(s.dtype)


class Bias(CausalSelfAttention):
    """s_t <- s_t + sum over r < t of softmax_r(b[t - r]) s_r, with a learnt b per head, stream and
    distance, initially 0, which gives Mean. The first token keeps s."""

    def __init__(self, config):
        super().__init__(config)
        size = config.n_head * config.block_size
        self.q_distance = nn.Parameter(torch.zeros(size))  # 1-D: no weight decay
        self.k_distance = nn.Parameter(torch.zeros(size))

    def prepare(self, q, k, v, ctx):
        return (self.gather(q, self.q_distance, ctx, "q"),
                self.gather(k, self.k_distance, ctx, "k"), v)

    def gather(self, s, bias, ctx, name):
        one_document(ctx)
        past = ctx.remember(name, s)
        distance = distances(past.size(2), s.size(2), s.device)  # (T, S)
        scores = bias.view(self.config.n_head, -1)[:, distance.clamp(min=0)]  # (H, T, S)
        weights = scores.masked_fill(distance <= 0, -1e30).softmax(-1) * (distance > 0)
        return s + weights.to(s.dtype) @ past


class Near(CausalSelfAttention):
    """h_s <- (1 - a) s + a sum over r < t of softmax_r(h_q h_k / sqrt(D) - c (t - r)) s_r, rotary
    as in `cross`, with a in (0, 1) and c > 0 learnt per head, initially 1/2 and 4. At c ->
    infinity it is a shift of every stream. The first token keeps s."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.n_head))  # a = sigmoid(shift)
        self.slope = nn.Parameter(torch.full((config.n_head,), math.log(4)))  # log c

    def content(self, scores):
        return scores

    def refine(self, x, q, k, v, ctx):
        one_document(ctx)
        h = s = {"q": q, "k": k}
        past = {n: ctx.remember(n, s[n]) for n in self.config.nexus_streams}
        a = per_head(self.shift.sigmoid()).to(k.dtype)
        for loop in range(1, self.config.nexus_order):
            query, key = (apply_rotary_emb(h[n], *ctx.rope) for n in "qk")
            key = ctx.remember(f"keys {loop}", key)
            distance = distances(key.size(2), q.size(2), key.device)  # (T, S)
            scores = (self.content(query @ key.mT / math.sqrt(q.size(-1)))
                      - per_head(self.slope.exp()) * distance)  # (B, H, T, S), at least float32
            seen = distance > 0
            seen[:, 0] = True  # token 0 sees itself
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype)
            if ctx.maps is not None:
                ctx.maps[ctx.layer, f"h{loop}"] = weights.detach()
            h = h | {n: torch.lerp(s[n], weights @ past[n], a)
                     for n in self.config.nexus_streams}
        return h["q"], h["k"]


class NearGated(Near):
    """Near with scores g h_q h_k / sqrt(D) - c (t - r), g learnt per head, initially 0."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.n_head))

    def content(self, scores):
        return per_head(self.gate) * scores


class TokensResidual(CausalSelfAttention):
    """`tokens`, but each token keeps what it was: h <- x + Attn(h W_q, h W_k, x W_v), from h = x;
    then q, k = h W_q, h W_k."""

    def gathered(self, y):
        """What the heads have gathered, y (B, T, C), as it is added to x."""
        return y

    def refine(self, x, q, k, v, ctx):
        h, streams = {"q": q, "k": k}, self.config.nexus_streams
        for loop in range(1, self.config.nexus_order):
            y = merge_heads(attend(h["q"], h["k"], v, ctx, f"h{loop}"))
            h |= zip(streams, self.project(x + self.gathered(y), streams), strict=True)
        return h["q"], h["k"]


class Mix(TokensResidual):
    """The same with h <- x + Attn(h W_q, h W_k, x W_v) W_o: q and k are projected from what the
    layer itself, output projection included, makes of x."""

    def gathered(self, y):
        return self.proj(y)


class SelfResidual(CausalSelfAttention):
    """h_s <- s + Attn(h_s, h_s, s): `self`, but the token keeps what it was; it also sees itself,
    unlike in `past`."""

    crossed, residual, strict = False, True, False

    def inner_step(self, n, h, s, ctx, name):
        a, b = "qk" if self.crossed else (n, n)
        y = attend(h[a], h[b], s, ctx, name, strict=self.strict)
        return s + y if self.residual else y


class SelfStrict(SelfResidual):
    """h_s <- Attn_<(h_s, h_s, s): `self`, but of earlier tokens alone, and nothing is kept."""

    residual, strict = False, True


class CrossResidual(SelfResidual):
    """h_s <- s + Attn(h_q, h_k, s): `cross`, but a token sees itself too."""

    crossed = True


class CrossStrict(SelfStrict):
    """h_s <- Attn_<(h_q, h_k, s): `cross`, but nothing is kept."""

    crossed = True


class CrossPlain(CrossResidual):
    """h_s <- Attn(h_q, h_k, s): `self` with the map of `cross`."""

    residual = False


CONTROLS = {"key-shift": KeyShift, "kv-shift": KVShift, "canon": Canon, "mean": Mean, "bias": Bias,
            "near": Near, "near-gated": NearGated, "tokens-residual": TokensResidual, "mix": Mix,
            "self-residual": SelfResidual, "self-strict": SelfStrict, "cross-plain": CrossPlain,
            "cross-residual": CrossResidual, "cross-strict": CrossStrict}
assert not CONTROLS.keys() & {*get_args(GPTConfig.__annotations__["nexus_inner"])}, \
    "an inner step has the name of a control: rename it"
