"""
A GPT, and Nexus: attention whose queries and keys are themselves outputs of attention.
Both use one primitive, causal attention with rotary position embedding in each head:

    Attn(a, b, c) = softmax(mask + rope(a) rope(b)^T / sqrt(D)) c

    GPT      out = Attn(q, k, v)                                                   order m = 1
    Nexus    h_s <- s, then m-1 times h_s <- Attn(h_s, h_s, s), for s = q, s = k   order m > 1
             out = Attn(h_q, h_k, v)

Only `separate` adds parameters. The difference is in CausalSelfAttention: one `if` in forward, and
refine, which has the other readings too. With order 1, --preset pythia-70m is Pythia's GPT.

References: Nexus https://arxiv.org/abs/2512.03377, Pythia (sizes and training recipe) 2304.01373,
GPT-NeoX-20B (architecture and initialisation) 2204.06745, rotary position embedding 2104.09864.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# Shapes in comments: B batch, T new tokens, S all tokens seen (cached and new), C n_embd,
# H n_head, D = C / H head width, V vocab_size.

class AttnContext(NamedTuple):
    """What a layer's attentions, inner and outer, share in one forward pass."""
    layer: int  # its number, from 0
    backend: str  # GPTConfig.attention
    rope: object  # cos and sin of the new tokens' positions, (2, T, rotary_dim / 2)
    mask: object  # None: causal; bool (..., T, S), True where allowed; flex: two BlockMasks
    docs: object  # each token's document, (B, S): attention stays inside; None: only one
    cache: object  # a nanonexus.generate.KVCache of the tokens before, or None
    maps: object  # a dict that manual attention fills with {(layer, name): weights}, or None

    def remember(self, name, x):
        """x (B, H, T, D) after what earlier passes gave under this name: (B, H, S, D)."""
        return x if self.cache is None else self.cache.update((self.layer, name), x)

def apply_rotary_emb(x, cos, sin):
    """Rotate the first R dimensions of each head by the token's position, dimension i paired with
    i + R/2. x (B, H, T, D), cos and sin (T, R/2) -> (B, H, T, D), in x's dtype."""
    a, b, rest = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)

def rotary_table(config):
    """cos and sin for every position of the context, (2, block_size, R / 2); the angles in
    float64, since position * rate loses precision in float32 at long contexts."""
    rates = 10000.0 ** (-torch.arange(0, config.rotary_dim, 2).double() / config.rotary_dim)
    angles = torch.arange(config.block_size).double()[:, None] * rates  # (block_size, R / 2)
    return torch.stack([angles.cos(), angles.sin()]).to(torch.get_default_dtype())

def attend(q, k, v, ctx, name="outer", strict=False):
    """Attn(q, k, v), the one primitive, all (B, H, T, D). name: what the cache and the maps call
    this attention in its layer. strict: a token sees those before it and not itself; if there are
    none, the result is 0."""
    query = apply_rotary_emb(q, *ctx.rope)
    key = query if k is q else apply_rotary_emb(k, *ctx.rope)
    key, v = ctx.remember(f"{name} keys", key), ctx.remember(f"{name} values", v)
    T, S = query.size(2), key.size(2)
    if isinstance(ctx.mask, tuple):
        return flex_attention(query, key, v, block_mask=ctx.mask[int(strict)])
    if ctx.mask is None:  # plain causal: flash attention
        if not strict:
            return F.scaled_dot_product_attention(query, key, v, is_causal=T > 1)
        i = int(T == S)  # causal without the last key is strict; row 0 may be empty
        y = F.scaled_dot_product_attention(query[:, :, i:], key[:, :, :-1], v[:, :, :-1],
                                           is_causal=T > 1)
        return F.pad(y, (0, 0, i, 0))
    mask = ctx.mask.tril(S - T - 1) if strict else ctx.mask
    blind = ~mask.any(-1, keepdim=True)  # (..., T, 1): the softmax of an empty row is NaN
    if ctx.backend != "manual":
        y = F.scaled_dot_product_attention(query, key, v, attn_mask=mask | blind)
        return y.masked_fill(blind, 0)
    scores = query @ key.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    weights = scores.masked_fill(~(mask | blind), -math.inf).softmax(-1).masked_fill(blind, 0)
    if ctx.maps is not None:
        ctx.maps[ctx.layer, name] = weights.detach()
    return weights @ v

def merge_heads(x):  # (B, H, T, D) -> (B, T, C)
    return x.transpose(1, 2).flatten(2)

class CausalSelfAttention(nn.Module):
    """Causal self-attention, of order 1 (the baseline) or higher (Nexus)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # rows: queries, keys, values
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        if config.nexus_inner == "separate" and config.nexus_order > 1:  # 3 C^2 per stream
            self.inner = nn.ModuleDict({n: nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
                                        for n in config.nexus_streams})

    def forward(self, x, ctx):
        q, k, v = self.prepare(*self.project(x), ctx)  # (B, H, T, D) each
        if self.config.nexus_order > 1:  # Nexus: all that makes it differ from a GPT
            q, k = self.refine(x, q, k, v, ctx)
        return self.proj(merge_heads(attend(q, k, v, ctx)))  # (B, T, C)

    def project(self, x, parts="qkv", linear=None):
        """x (B, T, C) -> its queries, keys and values, or only "qk" or "v": (B, H, T, D) each."""
        linear, C, first = linear or self.qkv, x.size(-1), "qkv".index(parts)
        rows = slice(first * C, (first + len(parts)) * C)
        y = F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
        heads = y.unflatten(-1, (-1, C // self.config.n_head)).transpose(1, 2)
        return heads.chunk(len(parts), dim=1)

    def prepare(self, q, k, v, ctx):
        return q, k, v  # before any inner loop: some controls change them here

    def refine(self, x, q, k, v, ctx):
        """Nexus: the queries and keys after m-1 inner loops, all (B, H, T, D); x (B, T, C)."""
        s = h = {"q": q, "k": k}  # s, the unrefined streams, are the values of every loop
        streams, inner = self.config.nexus_streams, self.config.nexus_inner
        for loop in range(1, self.config.nexus_order):
            if inner == "tokens":  # a third account: tokens gather, then are projected anew
                y = merge_heads(attend(h["q"], h["k"], v, ctx, f"h{loop}"))
                h = h | dict(zip(streams, self.project(y, streams), strict=True))
            else:
                h = h | {n: self.inner_step(n, h, s[n], ctx, f"{n}{loop}") for n in streams}
        return h["q"], h["k"]

    def inner_step(self, n, h, s, ctx, name):
        """One loop of stream n ("q" or "k"), from both streams h and its own values s."""
        match self.config.nexus_inner:
            case "self":  # the paper's formula, according to two accounts
                return attend(h[n], h[n], s, ctx, name)
            case "shared" | "separate" as inner:  # ablation: W_q, W_k, W_v again, or new ones
                linear = self.qkv if inner == "shared" else self.inner[n]
                values, = self.project(merge_heads(s), "v", linear)
                return attend(*self.project(merge_heads(h[n]), "qk", linear), values, ctx, name)
            case "past":  # ours: a token keeps itself and gathers from those before it
                return s + attend(h[n], h[n], s, ctx, name, strict=True)
            case "cross":  # ours: the same, with the map from queries to keys for both streams
                return s + attend(h["q"], h["k"], s, ctx, name, strict=True)
            case inner:
                raise ModelError(f"inner_step has no case for {inner!r}")

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))

class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = attention(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        if self.parallel:
            return x + self.dropout(self.attn(self.norm1(x), ctx) + self.mlp(self.norm2(x)))
        x = x + self.dropout(self.attn(self.norm1(x), ctx))
        return x + self.dropout(self.mlp(self.norm2(x)))

class ModelError(ValueError):
    """An error in a configuration, an input or a checkpoint, which the user can correct."""

def check(condition, message):
    if not condition:
        raise ModelError(message)

@dataclass
class GPTConfig:
    """A model's configuration; each field is a flag of train.py. Wrong values raise ModelError."""
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    block_size: int = 2048  # the longest context, in tokens
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512  # width of the residual stream
    rotary_pct: float = 0.25  # fraction of each head's dimensions that are rotated
    parallel_residual: bool = True  # attention and MLP side by side, as in Pythia, or in sequence
    dropout: float = 0.0  # probability, on the embedding and on what each block adds
    gelu: Literal["tanh", "erf"] = "tanh"  # erf is exact, and twice as fast on a CPU
    attention: Literal["sdpa", "flex", "manual"] = "sdpa"  # flex: on CUDA; manual: gives maps too
    nexus_order: int = 1  # 1 is the baseline, 2 refines once, 3 twice, ...
    nexus_streams: Literal["qk", "q", "k"] = "qk"  # which streams are refined
    nexus_inner: Literal["self", "shared", "separate", "tokens", "past", "cross"] = "self"  # how
    control: str = ""  # one of nanonexus/controls.py instead of, or besides, Nexus

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            right = value in choices if choices else type(value) is f.type
            kind = ", ".join(map(str, choices)) or getattr(f.type, "__name__", str(f.type))
            check(right and (f.type is not int or value > 0), f"{f.name} must be {kind}"
                  + ", at least 1" * (f.type is int) + f", not {value!r}")
        check(self.n_embd % self.n_head == 0, f"n_embd must be a multiple of n_head, {self.n_head}")
        check(0 < self.rotary_pct <= 1 and self.rotary_dim > 0 == self.rotary_dim % 2, "n_embd / "
              f"n_head x rotary_pct, {self.n_embd} / {self.n_head} x {self.rotary_pct}, must be an "
              "even number, 2 or more: the rotated dimensions of a head")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def rotary_dim(self):
        return int(self.n_embd // self.n_head * self.rotary_pct)

def output_layer(h, weight):
    """Logits (..., V) of hidden states h (..., C). All logits come from here: in training,
    validation, scoring, sampling and export. A plain function of h and GPT.output_weights."""
    return F.linear(h, weight)

class GPT(nn.Module):
    """A language model: tokens (B, T) in, logits (B, T, V) for each next token out. attention: the
    class of its attention; nanonexus.controls.build gives a control's."""

    def __init__(self, config, attention=CausalSelfAttention):
        super().__init__()
        check(not config.control or attention is not CausalSelfAttention,
              f"the control {config.control!r} is built by nanonexus.controls.build")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            self.embed = nn.Embedding(config.vocab_size, config.n_embd)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
            self.norm = nn.LayerNorm(config.n_embd)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("rope", rotary_table(config), persistent=False)
        self.init_weights()

    def init_weights(self):
        """GPT-NeoX's initialisation of each Linear and Embedding: wang_init for output projections,
        small_init for the rest. What all models share is drawn first: a seed gives it the same
        values whatever a model adds. Other parameters keep the values that they were made with."""
        wang = 2 / (self.config.n_layer * math.sqrt(self.config.n_embd))
        small = math.sqrt(2 / (5 * self.config.n_embd))
        outputs = [m for b in self.blocks for m in (b.attn.proj, b.mlp.down)]
        common = [self.embed, *(m for b in self.blocks for m in (
            b.attn.qkv, b.attn.proj, b.mlp.up, b.mlp.down)), self.head]
        for m in common:
            m.reset_parameters()  # overwritten below, but recorded seeds drew these numbers too
        for m in common + [m for m in self.modules() if m not in common]:
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=wang if m in outputs else small)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)

    def attention_mask(self, T, past=0, docs=None, device=None):
        """AttnContext's mask for T tokens after `past` others; docs as there."""
        if self.config.attention == "flex" and not past:
            def block_mask(strict):
                def may_look(b, h, i, j):
                    causal = i > j if strict else i >= j
                    return causal if docs is None else causal & (docs[b, i] == docs[b, j])
                B = None if docs is None else len(docs)
                return create_block_mask(may_look, B, None, T, T, device)
            return block_mask(strict=False), block_mask(strict=True)
        if docs is None and (T == 1 or not past) and self.config.attention != "manual":
            return None  # SDPA needs no mask in memory
        seen = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)
        return seen if docs is None else seen & (docs[:, None, past:, None] == docs[:, None, None])

    def hidden_states(self, idx, cache=None, maps=None, docs=None, mask=None):
        """The output layer's input, (B, T, C), for token ids idx (B, T). ModelError if too long.
        cache: a nanonexus.generate.KVCache, to continue after the tokens that it has seen.
        maps: a dict that manual attention fills with its weights, {(layer, name): (B, H, T, S)};
        name is "outer", "q1" for the first inner loop of q, "h1" if it is of both, and so on.
        docs: (B, S), the document of each token, cached ones included; attention stays inside it.
        mask: attention_mask's output, if made before."""
        c, T = self.config, idx.size(1)
        past = 0 if cache is None else cache.begin(T)
        check(past + T <= c.block_size, f"{past + T} tokens exceed the context of {c.block_size}")
        assert maps is None or c.attention == "manual", "maps need attention='manual'"
        assert docs is None or docs.shape == (len(idx), past + T), "docs: one for each token seen"
        mask = self.attention_mask(T, past, docs, idx.device) if mask is None else mask
        rope, x = self.rope[:, past:past + T], self.dropout(self.embed(idx))
        for i, block in enumerate(self.blocks):
            x = block(x, AttnContext(i, c.attention, rope, mask, docs, cache, maps))
        return self.norm(x)

    def output_weights(self):  # what output_layer takes after h
        return (self.head.weight,)

    def forward(self, idx, targets=None, **kwargs):
        """Without targets the logits (B, T, V); with targets (B, T) the training loss: the mean
        cross-entropy in nats where they are not -1, a float32 scalar. kwargs: see hidden_states."""
        h, weights = self.hidden_states(idx, **kwargs), self.output_weights()
        if targets is None:
            return output_layer(h, *weights)
        # rows per piece, in 256s (others are slow on CUDA): 2 GiB of logits there, 2 MiB elsewhere
        rows = max(512, 2**(29 if h.is_cuda else 19) // self.config.vocab_size // 256 * 256)
        total = SumCrossEntropy.apply(torch.is_grad_enabled(), rows, targets.flatten(),
                                      h.flatten(0, 1), *weights)
        return total / (targets >= 0).sum()

    def num_params(self, embeddings=True):
        """Number of parameters; embeddings=False excludes both ends, as Pythia counts."""
        ends = [] if embeddings else [self.embed.weight, self.head.weight]
        return sum(p.numel() for p in self.parameters() if all(p is not end for end in ends))

    def flops_per_token(self, T):
        """Floating-point operations to train on one token in a context of T: this model's matrix
        products, counted without computing them, and twice as many backward. Those that grow with T
        count half: causal attention needs no more."""
        from torch.utils.flop_counter import FlopCounterMode
        sizes = {n: p.to("meta") for n, p in [*self.named_parameters(), *self.named_buffers()]}
        found = []
        for n in (1, T):
            idx, mask = (torch.zeros(rows, n, dtype=int, device="meta") for rows in (1, n))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                torch.func.functional_call(self, sizes, idx, dict(mask=mask.bool()))
            found.append(counter.get_total_flops() / n)
        growth = (found[1] - found[0]) / max(1, T - 1)  # per additional token
        return 3 * (found[1] - growth * T / 2)

class SumCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(output_layer(h, *weights))[target] over the rows of h (N, C) whose
    target is not -1: a scalar, in float32 or better. For 32,768 tokens and a vocabulary of 50,304
    the logits take 6.6 GB, and their gradients as much. So only `rows` of them exist at a time, and
    each part's gradients are computed right after its loss."""

    @staticmethod
    def forward(ctx, learn, rows, targets, h, *weights):
        kind = h.device.type
        def loss(target, x, *weights):
            with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(
                    kind), cache_enabled=False):  # it would keep each part's copy of the weights
                logits = output_layer(x, *weights)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")

        learning = torch.func.grad_and_value(loss, argnums=tuple(range(1, 2 + len(weights))))
        total, dh, dw = 0, [], []
        for target, x in zip(targets.split(rows), h.split(rows), strict=True):
            if learn:
                (dx, *grads), value = learning(target, x, *weights)
                dh.append(dx)
                dw = [a + b for a, b in zip(dw, grads, strict=True)] if dw else grads
            total = total + (value if learn else loss(target, x, *weights))
        ctx.save_for_backward(*([torch.cat(dh), *dw] if learn else []))
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *(g * grad for g in ctx.saved_tensors)
