"""
A GPT, and Nexus: attention whose queries and keys are themselves outputs of attention.
Both use one primitive, causal attention with rotary position embedding in each head:

    Attn(a, b, c) = softmax(mask + rope(a) rope(b)^T / sqrt(D)) c

    GPT      out = Attn(q, k, v)                                                   order m = 1
    Nexus    h_s <- s, then m-1 times h_s <- Attn(h_s, h_s, s), for s = q, s = k   order m > 1
             out = Attn(h_q, h_k, v)

No parameter is added. The difference is in CausalSelfAttention: one `if` in forward, and refine.
The GPT is Pythia's (GPT-NeoX); nexus_order=1 is that GPT, bit for bit.

References: Nexus https://arxiv.org/abs/2512.03377, Pythia (sizes and training recipe) 2304.01373,
GPT-NeoX-20B (architecture and initialisation) 2204.06745, rotary position embedding 2104.09864.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Shapes in comments: B batch, T new tokens, S all tokens seen (cached and new), C n_embd,
# H n_head, D = C / H head width, V vocab_size.


class ModelError(ValueError):
    """An error in a configuration, an input or a checkpoint, which the user can correct."""


@dataclass
class GPTConfig:
    """A model's configuration; each field is a flag of train.py. ModelError names a wrong one."""

    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    block_size: int = 2048  # the longest context, in tokens
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512
    rotary_pct: float = 0.25  # fraction of each head's dimensions that are rotated
    parallel_residual: bool = True  # x + attn(ln1 x) + mlp(ln2 x); False: sequential
    dropout: float = 0.0  # on the embedding and on what each block adds
    gelu: Literal["tanh", "erf"] = "tanh"  # erf is exact, and twice as fast on a CPU
    attention: Literal["sdpa", "flex", "manual"] = "sdpa"  # flex trains on CUDA, manual shows maps
    nexus_order: int = 1  # m: 1 is standard attention, m > 1 adds m-1 inner loops
    nexus_streams: Literal["qk", "q", "k"] = "qk"  # which streams are refined
    nexus_inner: Literal["self", "past", "cross", "shared"] = "cross"  # how, see inner_step

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if choices and value not in choices:
                raise ModelError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and type(value) not in (f.type, {float: int}.get(f.type)):
                raise ModelError(f"{f.name} must be {f.type.__name__}, got {value!r}")
            if f.type is int and value < 1:
                raise ModelError(f"{f.name} must be at least 1, got {value}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 < self.rotary_pct <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ModelError(f"rotary_pct ({self.rotary_pct}) must give an even number, 2 or more, "
                             f"of a head's {self.n_embd // self.n_head} dimensions")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def rotary_dim(self):
        return int(self.n_embd // self.n_head * self.rotary_pct)


PRESETS = {
    # bytes; learns most in a few minutes on a laptop. The others: Pythia's, parameter for parameter
    "tiny": dict(vocab_size=320, block_size=256, n_layer=4, n_head=4, n_embd=128,
                 rotary_pct=1.0, parallel_residual=False, gelu="erf"),
    "pythia-70m": dict(n_layer=6, n_head=8, n_embd=512),
    "pythia-160m": dict(n_layer=12, n_head=12, n_embd=768),
    "pythia-410m": dict(n_layer=24, n_head=16, n_embd=1024),
    "pythia-1b": dict(n_layer=16, n_head=8, n_embd=2048),
}


class AttnContext(NamedTuple):
    """What all layers, and all loops of the recursion, share in one forward pass."""

    backend: str  # GPTConfig.attention
    rope: tuple  # cos (T, D), sin (T, rotary_dim / 2)
    mask: object  # None: causal; a bool tensor (..., T, S), True where allowed; or a BlockMask
    strict_mask: object  # the same, without the token's own position
    cache: object  # None, or this layer's keys and values so far (nanonexus/generate.py)
    maps: list | None  # manual attention appends its weights to it, (B, H, T, S)


class RotaryEmbedding(torch.autograd.Function):
    """Rotate the first rotary_dim dimensions of each head by the token's position, i paired with
    i + rotary_dim/2. The gradient is the inverse rotation, twice as fast as autograd's."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = sin.size(-1)
        y = x * cos  # cos is 1 on the dimensions that are not rotated
        y[..., :half].addcmul_(x[..., half:2 * half], sin, value=-1)
        y[..., half:2 * half].addcmul_(x[..., :half], sin)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 miscompiles an idle to()

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return RotaryEmbedding.apply(grad, cos, -sin), None, None


apply_rotary_emb = RotaryEmbedding.apply  # x (B, H, T, D), cos, sin -> (B, H, T, D)


def attend(q, k, v, ctx, strict=False):
    """Attn(q, k, v) = softmax(mask + rope(q) rope(k)^T / sqrt(D)) v, the one primitive of the
    baseline and of every inner loop. q, k, v (B, H, T, D) -> (B, H, T, D).

    strict: a token sees those before it and not itself; if there are none, the result is 0.
    """
    query = apply_rotary_emb(q, *ctx.rope)
    key = query if k is q else apply_rotary_emb(k, *ctx.rope)
    if ctx.cache is not None:  # (B, H, T, D) -> (B, H, S, D)
        key, v = ctx.cache.update(key), ctx.cache.update(v)
    T, S, mask = query.size(2), key.size(2), ctx.strict_mask if strict else ctx.mask
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, v, block_mask=mask)
    if mask is None:  # plain causal: flash attention
        if not strict:
            return F.scaled_dot_product_attention(query, key, v, is_causal=T > 1)
        i = int(T == S)  # drop the last key, and the first query if it has no other
        y = F.scaled_dot_product_attention(query[:, :, i:], key[:, :, :-1], v[:, :, :-1],
                                           is_causal=T > 1)
        return F.pad(y, (0, 0, i, 0))
    blind = ~mask.any(-1, keepdim=True)  # (..., T, 1): the softmax of an empty row is NaN
    if ctx.backend != "manual":
        y = F.scaled_dot_product_attention(query, key, v, attn_mask=mask | blind)
        return y.masked_fill(blind, 0)
    scores = query @ key.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    weights = scores.masked_fill(~(mask | blind), -math.inf).softmax(-1).masked_fill(blind, 0)
    if ctx.maps is not None:
        ctx.maps.append(weights.detach())
    return weights @ v


class CausalSelfAttention(nn.Module):
    """Causal self-attention, of order 1 (the baseline) or higher (Nexus)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # rows: queries, keys, values
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, ctx):
        q, k, v = self.heads(self.qkv(x)).chunk(3, dim=1)  # (B, H, T, D) each
        if self.config.nexus_order > 1:  # Nexus: all that makes it differ from a GPT
            q, k = self.refine(q, k, ctx)
        y = attend(q, k, v, ctx)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def refine(self, q, k, ctx):
        """Nexus: the queries and keys after m-1 inner loops, all (B, H, T, D)."""
        h = {"q": q, "k": k}
        s = dict(h)  # the values of every loop: the unrefined streams, which anchor the recursion
        if self.config.nexus_inner == "shared":
            s = {n: self.project(h[n], 2) for n in self.config.nexus_streams}
        for _ in range(self.config.nexus_order - 1):
            h |= {n: self.inner_step(n, h, s[n], ctx) for n in self.config.nexus_streams}
        return h["q"], h["k"]

    def inner_step(self, n, h, s, ctx):
        """One loop of stream n ("q" or "k"), from both streams h and its own values s."""
        match self.config.nexus_inner:
            case "self":  # the paper's, as far as its text is known
                return attend(h[n], h[n], s, ctx)
            case "past":  # ours: a token keeps itself and gathers from those before it
                return s + attend(h[n], h[n], s, ctx, strict=True)
            case "cross":  # ours: the same, with the map from queries to keys for both streams
                return s + attend(h["q"], h["k"], s, ctx, strict=True)
            case "shared":  # the layer's own W_q, W_k, W_v once more
                return attend(self.project(h[n], 0), self.project(h[n], 1), s, ctx)

    def project(self, x, part):
        """x (B, H, T, D), heads merged, through W_q, W_k or W_v (part 0, 1, 2); same shape."""
        weight, bias = self.qkv.weight.chunk(3)[part], self.qkv.bias.chunk(3)[part]
        return self.heads(F.linear(x.transpose(1, 2).flatten(2), weight, bias))

    def heads(self, x):
        """(B, T, n D) -> (B, n, T, D)"""
        return x.unflatten(-1, (-1, self.config.n_embd // self.config.n_head)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = CausalSelfAttention(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        if self.parallel:
            return x + self.dropout(self.attn(self.norm1(x), ctx) + self.mlp(self.norm2(x)))
        x = x + self.dropout(self.attn(self.norm1(x), ctx))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A language model: tokens (B, T) in, logits (B, T, V) for each next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # angles in float64: position * rate loses precision in float32 at long contexts
        R, D = config.rotary_dim, config.n_embd // config.n_head
        rates = 10000.0 ** (-torch.arange(0, R, 2).double() / R)
        angles = torch.arange(config.block_size).double()[:, None] * rates  # (block_size, R / 2)
        cos = torch.cat([angles.cos(), angles.cos(), angles.new_ones(len(angles), D - R)], dim=-1)
        self.register_buffer("cos", cos.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)
        # GPT-NeoX's: small_init, and wang_init for what writes into the residual stream
        small = math.sqrt(2 / (5 * config.n_embd))
        wang = 2 / (config.n_layer * math.sqrt(config.n_embd))
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("attn.proj.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=wang if writes else small)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def attention_masks(self, T, past, docs, device):
        """AttnContext's mask and strict_mask, for T tokens after `past` others; docs (B, T)."""
        c = self.config
        def mask(strict):
            if strict and (c.nexus_order == 1 or c.nexus_inner not in ("past", "cross")):
                return None
            if c.attention == "flex" and not past:
                def may_look(b, h, i, j):
                    causal = i > j if strict else i >= j
                    return causal if docs is None else causal & (docs[b, i] == docs[b, j])
                B = None if docs is None else len(docs)
                return create_block_mask(may_look, B, None, T, T, device)
            if docs is None and (T == 1 or not past) and c.attention != "manual":
                return None  # SDPA needs no mask in memory
            seen = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past - strict)
            return seen if docs is None else seen & (docs[:, None, :, None] == docs[:, None, None])
        return mask(strict=False), mask(strict=True)

    def hidden_states(self, idx, cache=None, maps=None, docs=None, masks=None):
        """The output layer's input: (B, T, C) for token ids idx (B, T).

        cache: a nanonexus.generate.KVCache, to continue after the tokens that it has seen. maps: a
        list to fill with manual attention's weights, (B, H, T, S): per layer, those of each inner
        loop (q's, then k's), then the outer ones. docs: (B, T), each token's document, which
        confines attention; a (T, T) mask per row, except with flex. masks: attention_masks' output.
        Raises ModelError if the context is too short, or the backend does not support this."""
        c, T = self.config, idx.size(1)
        past = cache.begin(T) if cache else 0
        if past + T > c.block_size:
            raise ModelError(f"{past + T} tokens are more than the context of {c.block_size}")
        if maps is not None and c.attention != "manual":
            raise ModelError(f"attention maps need attention='manual'; {c.attention} has none")
        if docs is not None and cache:
            raise ModelError("a cache holds one document: it cannot be combined with docs")
        if c.attention == "flex" and idx.device.type != "cuda" and torch.is_grad_enabled():
            raise ModelError("flex attention trains on CUDA only: use attention sdpa here")
        mask, strict_mask = masks or self.attention_masks(T, past, docs, idx.device)
        rope = self.cos[past:past + T], self.sin[past:past + T]

        x = self.dropout(self.embed(idx))
        for i, block in enumerate(self.blocks):
            layer = cache.layer(i) if cache else None
            x = block(x, AttnContext(c.attention, rope, mask, strict_mask, layer, maps))
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None, maps=None, docs=None):
        """Logits (B, T, V) and, given targets (B, T), the mean cross-entropy in nats, float32;
        targets of -1 are ignored, and without targets it is None. Others as in hidden_states."""
        logits = self.head(self.hidden_states(idx, cache, maps, docs))
        loss = None if targets is None else F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None):
        """Continue idx (B, T): (B, T + max_new_tokens). With a cache: nanonexus.generate."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            new = sample(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat([idx, new], dim=1)
        return idx

    def num_params(self, embeddings=True):
        """Number of parameters; embeddings=False excludes both ends, as Pythia counts."""
        ends = 0 if embeddings else self.embed.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - ends

    def flops_per_token(self, T):
        """Floating-point operations to train on one token in a context of T, forward and backward:
        matrix products only, 2 per weight forward and twice that backward. Causal attention counts
        as the half it needs, 4 C T / 2 forward."""
        c = self.config
        weights, loops = 12 * c.n_embd**2, len(c.nexus_streams) * (c.nexus_order - 1)
        if loops and c.nexus_inner == "shared":  # W_q and W_k in each loop, W_v once per stream
            weights += (2 * loops + len(c.nexus_streams)) * c.n_embd**2
        layer = 2 * weights + (1 + loops) * 2 * c.n_embd * T
        return 3 * (c.n_layer * layer + 2 * c.n_embd * c.vocab_size)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token for each row, (B, 1), from logits (B, V); temperature 0 is greedy.

    top_k, top_p: sample from the k most likely, or the most likely whose probabilities sum to p.
    generator: a torch.Generator, for reproducibility. Raises ModelError for invalid values."""
    if not (0 <= temperature < math.inf and (top_k is None or top_k >= 1)
            and (top_p is None or 0 < top_p <= 1)):
        raise ModelError("temperature must be at least 0, top_k at least 1, top_p in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the more likely have that mass already
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
