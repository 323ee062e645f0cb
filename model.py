"""
A GPT and its higher-order sibling Nexus, all of it in this file.

The GPT is Pythia's (GPT-NeoX): rotary positions, untied embeddings, biases, parallel or
sequential residual. Nexus refines its queries and keys by inner causal self-attention before the
outer attention reads them: see `Attention.refine`, a loop of a few lines. `nexus_order=1` is the
GPT, bit for bit.

References:
1) Nexus, higher-order attention: https://arxiv.org/abs/2512.03377
2) Pythia, sizes and training recipe: https://arxiv.org/abs/2304.01373
3) GPT-NeoX-20B, architecture and initialisation: https://arxiv.org/abs/2204.06745
4) Rotary position embedding: https://arxiv.org/abs/2104.09864
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# Shapes in comments: B batch, T new tokens, S all tokens seen (cached and new), C n_embd,
# H n_head, D = C / H head width, n streams refined (1 or 2), V vocab_size.


class ModelError(ValueError):
    """A configuration, an input or a checkpoint that the user can mend."""


@dataclass
class GPTConfig:
    """What a model is. Every field is a flag of train.py with the same name.

    Raises ModelError, naming the field, if a value is out of range or two do not fit together.
    """

    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    block_size: int = 2048  # the longest context, in tokens
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512
    rotary_pct: float = 0.25  # share of each head's dimensions that rotary turns
    parallel_residual: bool = True  # x + attn(ln1 x) + mlp(ln2 x); False: one after the other
    dropout: float = 0.0  # on the embedding and on what each block adds
    gelu: str = "tanh"  # "tanh", or "erf": exact, and twice as fast on a CPU
    attention: str = "sdpa"  # "sdpa"; "flex": FlexAttention, trains on CUDA; "manual": shows maps
    checkpoint_attention: bool = False  # compute inner loops again in backward, to save memory
    nexus_order: int = 1  # m: 1 is standard attention, m > 1 adds m-1 inner loops
    nexus_streams: str = "qk"  # which streams are refined: "qk", "q" or "k"
    nexus_inner: str = "self"  # how: "self", "shared" or "separate", see Attention.refine

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not f.type and not (f.type is float and type(value) is int):
                raise ModelError(f"{f.name} must be {f.type.__name__}, got {value!r}")
            if f.type is int and value < 1:
                raise ModelError(f"{f.name} must be at least 1, got {value}")
        for name, choices in dict(attention=("sdpa", "flex", "manual"), gelu=("tanh", "erf"),
                                  nexus_streams=("qk", "q", "k"),
                                  nexus_inner=("self", "shared", "separate")).items():
            if (value := getattr(self, name)) not in choices:
                raise ModelError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 < self.rotary_pct <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ModelError(f"rotary_pct ({self.rotary_pct}) must give an even number, 2 or more, "
                             f"of a head's {self.n_embd // self.n_head} dimensions")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.nexus_inner == "separate" and self.nexus_order < 2:
            raise ModelError("nexus_inner separate needs nexus_order >= 2: order 1 has no loop")
        size = self.n_embd * (12 * self.n_layer * self.n_embd + 2 * self.vocab_size
                              + self.block_size)
        if size > 1e12:  # a slip of the keyboard would take all memory, and then the machine
            raise ModelError(f"vocab_size, block_size, n_layer and n_embd make {size:.0e} numbers: "
                             "more than a trillion")

    @property
    def rotary_dim(self):
        return int(self.n_embd // self.n_head * self.rotary_pct)


PRESETS = {
    # learns most in a few minutes on a laptop; the byte vocabulary, padded
    "tiny": dict(vocab_size=320, block_size=256, n_layer=4, n_head=4, n_embd=128,
                 rotary_pct=1.0, parallel_residual=False, gelu="erf"),
    # Pythia's shapes, parameter for parameter
    "pythia-70m": dict(n_layer=6, n_head=8, n_embd=512),
    "pythia-160m": dict(n_layer=12, n_head=12, n_embd=768),
    "pythia-410m": dict(n_layer=24, n_head=16, n_embd=1024),
    "pythia-1b": dict(n_layer=16, n_head=8, n_embd=2048),
}


class KVCache:
    """What attention remembers of the tokens before, for generation and scoring.

    Standard attention keeps its keys and values: 2 tensors of (B, H, S, D) a layer. Each stream
    that Nexus refines also needs the values of its inner loops (the unrefined stream, kept once)
    and the keys of every inner loop, which are what the loop before made of the earlier tokens:
    m tensors more. At order m with n streams that is 2 + n m: order 2 on q and k keeps 3 times
    the baseline's bytes, order 3 keeps 4 times. Nothing is recomputed.
    """

    def __init__(self, capacity):
        self.capacity, self.len, self.buffers = capacity, 0, {}

    def append(self, name, x):
        """Add x (B, H, T, D) to the buffer `name`; return all of it so far, (B, H, S, D)."""
        B, H, T, D = x.shape
        if name not in self.buffers:
            self.buffers[name] = x.new_empty(B, H, self.capacity, D)
        self.buffers[name][:, :, self.len:self.len + T] = x
        return self.buffers[name][:, :, :self.len + T]

    def select(self, rows):
        """A copy that goes on from these rows of the batch; a row may come several times."""
        copy = KVCache(self.capacity)
        copy.len, copy.buffers = self.len, {name: b[rows] for name, b in self.buffers.items()}
        return copy


class Env(NamedTuple):
    """What one forward pass shares with every layer and with every loop of the recursion."""

    rope: tuple  # cos (T, D), sin (T, rotary_dim / 2)
    mask: object  # None: plain causal; (.., T, S), True where attention may look; or a BlockMask
    cache: KVCache | None
    maps: list | None  # if given, manual attention adds its weights here


class Rotary(torch.autograd.Function):
    """Turn the first rotary_dim dimensions of each head by its token's position.

    Dimension i and i + rotary_dim/2 make a pair (the rotate-half layout). A function of its own
    because the gradient of a rotation is the rotation back: autograd would do twice the work.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = sin.size(-1)
        a, b = x[..., :half], x[..., half:2 * half]
        y = x * cos  # cos is 1 on the dimensions that are not turned
        y[..., :half].addcmul_(b, sin, value=-1)
        y[..., half:2 * half].addcmul_(a, sin)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotary.apply(grad, cos, -sin), None, None


def softmax_attention(q, k, v, backend, mask=None, maps=None):
    """softmax(mask + q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, H, S, D), S >= T."""
    if backend == "flex" and isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if backend != "manual":
        # one new token may look at everything; plain causal needs no mask in memory
        causal = mask is None and q.size(2) > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(k.size(2) - q.size(2))
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    if maps is not None:
        maps.append(weights.detach())
    return weights @ v


class Attention(nn.Module):
    """Causal self-attention, of order 1 (the baseline's) or higher (Nexus)."""

    def __init__(self, config, layer):
        super().__init__()
        C, streams = config.n_embd, len(config.nexus_streams)
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(C, 3 * C)  # rows: all heads' queries, then keys, then values
        self.proj = nn.Linear(C, C)
        if config.nexus_inner == "separate":  # the one reading that adds parameters
            self.inner = nn.ModuleList([nn.Linear(C, 3 * C, bias=False) for _ in range(streams)])

    def forward(self, x, env):
        H = self.config.n_head
        qk, v = self.heads(self.qkv(x)).split([2 * H, H], dim=1)  # (B, 2H, T, D), (B, H, T, D)
        q, k = qk.chunk(2, dim=1)
        if self.config.nexus_order > 1:  # Nexus
            refine = self.refine
            if self.config.checkpoint_attention and torch.is_grad_enabled():
                refine = partial(checkpoint, refine, use_reentrant=False)
            if self.config.nexus_streams == "qk":  # side by side as 2H heads: one call for both
                q, k = refine(qk, env).chunk(2, dim=1)
            elif self.config.nexus_streams == "q":
                q = refine(q, env)
            else:
                k = refine(k, env)
        y = self.attend(q, k, self.keep("v", v, env), "k", env)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def refine(self, s, env):
        """Nexus: what m-1 loops of inner attention make of the streams s, both (B, nH, T, D).

        h <- s, then m-1 times h <- Attn(h, h, s). Queries and keys are refined; the values stay
        the unrefined stream, which anchors the recursion (arXiv 2512.03377, the reading "self").
        The two other readings project first, h <- Attn(h A_q, h A_k, s A_v), with the heads of
        a stream joined: "shared" takes the layer's own W_q, W_k, W_v again, "separate" takes
        weights of each stream's own, the same in every loop (3 C^2 more a stream and layer).
        """
        plain = self.config.nexus_inner == "self"
        h, values = s, self.keep("s", s if plain else self.project(s, 2), env)
        for loop in range(1, self.config.nexus_order):
            a, b = (h, h) if plain else (self.project(h, 0), self.project(h, 1))
            h = self.attend(a, b, values, f"k{loop}", env)
        return h

    def attend(self, a, b, c, key_name, env):
        """Attn(a, b, c) = softmax(mask + rope(a) rope(b)^T / sqrt(D)) c, the one primitive of the
        baseline and of every loop. a, b (B, H, T, D), c (B, H, S, D) -> (B, H, T, D)."""
        query = Rotary.apply(a, *env.rope)
        key = query if a is b else Rotary.apply(b, *env.rope)
        key = self.keep(key_name, key, env)
        return softmax_attention(query, key, c, self.config.attention, env.mask, env.maps)

    def project(self, x, part):
        """Each stream of x (B, nH, T, D) through W_q, W_k or W_v (part 0, 1, 2), same shape."""
        C = self.config.n_embd
        streams = x.transpose(1, 2).flatten(2).split(C, dim=-1)  # n of (B, T, C)
        linears = self.inner if self.config.nexus_inner == "separate" else [self.qkv] * 2
        out = [F.linear(stream, linear.weight.chunk(3)[part],
                        None if linear.bias is None else linear.bias.chunk(3)[part])
               for stream, linear in zip(streams, linears, strict=False)]
        return self.heads(torch.cat(out, dim=-1))

    def heads(self, x):
        """(B, T, H D) -> (B, H, T, D)"""
        return x.unflatten(-1, (-1, self.config.n_embd // self.config.n_head)).transpose(1, 2)

    def keep(self, name, x, env):
        """x with its past: (B, H, T, D) -> (B, H, S, D); without a cache there is none."""
        return x if env.cache is None else env.cache.append(f"{self.layer}.{name}", x)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, env):
        if self.parallel:
            return x + self.dropout(self.attn(self.norm1(x), env) + self.mlp(self.norm2(x)))
        x = x + self.dropout(self.attn(self.norm1(x), env))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A language model: tokens (B, T) in, logits (B, T, V) for each next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

        # one turn per pair of dimensions and position; angles in float64, since position * rate
        # loses its fraction in float32 at long contexts
        rates = 10000.0 ** (-torch.arange(0, config.rotary_dim, 2).double() / config.rotary_dim)
        turns = torch.arange(config.block_size).double()[:, None] * rates  # (block_size, R / 2)
        still = torch.ones(config.block_size, config.n_embd // config.n_head - config.rotary_dim)
        cos = torch.cat([turns.cos(), turns.cos(), still], dim=-1)
        self.register_buffer("cos", cos.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", turns.sin().to(torch.get_default_dtype()), persistent=False)

        # GPT-NeoX's: small_init everywhere, wang_init for what writes into the residual stream
        small = math.sqrt(2 / (5 * config.n_embd))
        wang = 2 / (config.n_layer * math.sqrt(config.n_embd))
        for name, p in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=wang)
            elif p.dim() == 2:
                nn.init.normal_(p, std=small)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def visible(self, T, past, docs, device):
        """The mask that every layer and every loop shares, for T tokens after `past` others."""
        if self.config.attention == "flex" and not past:
            def may_look(b, h, i, j):
                return i >= j if docs is None else (i >= j) & (docs[b, i] == docs[b, j])

            B = None if docs is None else docs.size(0)
            return create_block_mask(may_look, B, None, T, T, device=device)
        if docs is None and (T == 1 or not past):
            return None
        mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)
        return mask if docs is None else mask & (docs[:, None, :, None] == docs[:, None, None])

    def hidden(self, idx, cache=None, maps=None, docs=None):
        """What the output layer reads: (B, T, C) for token ids idx (B, T).

        cache: a KVCache, to go on after the tokens it has seen; it then has seen these too.
        maps: a list to which `manual` attention adds its weights, (B, heads, T, S) for each inner
        loop (q heads first, then k) and then the outer attention, layer by layer.
        docs: (B, T), the number of each token's document: attention, inner loops too, stays within
        one. Costs a (T, T) mask a row, except with flex.
        Raises ModelError if cache and idx together are longer than block_size, or the attention
        backend cannot do what is asked.
        """
        T, past = idx.size(1), cache.len if cache else 0
        if past + T > (limit := min(self.config.block_size, cache.capacity if cache else math.inf)):
            raise ModelError(f"{past + T} tokens are more than the context of {limit}")
        if maps is not None and self.config.attention != "manual":
            raise ModelError("attention maps need attention='manual'; "
                             f"{self.config.attention} never forms them")
        if docs is not None and cache is not None:
            raise ModelError("a cache holds one document: give no docs with it")
        if self.config.attention == "flex" and idx.device.type != "cuda" \
                and torch.is_grad_enabled():
            raise ModelError("flex attention trains on CUDA only: use attention sdpa here")
        rope = self.cos[past:past + T], self.sin[past:past + T]
        env = Env(rope, self.visible(T, past, docs, idx.device), cache, maps)

        x = self.dropout(self.embed(idx))
        for block in self.blocks:
            x = block(x, env)
        if cache:
            cache.len += T
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None, maps=None, docs=None):
        """Logits and, given targets, the loss.

        targets (B, T): the ids to predict; positions of -1 are ignored. The rest as in hidden.
        Returns logits (B, T, V) and the mean cross-entropy in nats, float32 (None if no targets).
        """
        logits = self.head(self.hidden(idx, cache, maps, docs))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                       ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
               vocab=None, generator=None, use_cache=True):
        """Yield the next token of each row, (B, 1), as it is drawn; arguments as in generate."""
        if idx.size(1) == 0:
            raise ModelError("nothing to continue: the prompt has no tokens")
        if not (0 <= temperature < math.inf and (top_k is None or top_k >= 1)
                and (top_p is None or 0 < top_p <= 1)):
            raise ModelError("temperature must be at least 0, top_k at least 1, top_p in (0, 1]")
        size = self.config.block_size
        cache = KVCache(size) if use_cache else None
        new, done = idx[:, -size:], torch.zeros_like(idx[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            if idx.size(1) > size:  # past the context every position has moved: slide, recompute
                cache, new = None, idx[:, -size:]
            logits = self(new if cache else idx[:, -size:], cache=cache)[0][:, -1, :vocab].float()
            new = sample(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                new = new.masked_fill(done, stop)
                done |= new == stop
            yield new
            if done.all():
                return
            idx = torch.cat([idx, new], dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
        """Continue idx (B, T) by up to max_new_tokens tokens; returns the whole, (B, T + new).

        temperature: 0 is greedy. top_k, top_p: draw among the k likeliest tokens, or among the
        likeliest whose probabilities sum to p. stop: a token that ends a row (a row that ended
        repeats it until all have). vocab: draw among the first `vocab` ids only (a vocabulary is
        padded). generator: a torch.Generator, on the model's device, for draws that repeat.
        use_cache=False recomputes everything for every token, with the same result.
        Beyond block_size each token sees the last block_size before it, recomputed: right, but
        slow. Raises ModelError for an empty idx or sampling parameters out of range.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p,
                                            **kwargs)], dim=1)

    @classmethod
    def from_hf(cls, path_or_name, **overrides):
        """A GPT with the weights of a GPT-NeoX model of Hugging Face, Pythia's for one.

        path_or_name: a folder with config.json and safetensors, or a name on the hub.
        overrides: fields of the config, e.g. nexus_order=2, the start of a retrofit.
        Raises ModelError if it cannot be had, or is not such a model.
        """
        from hf import load_neox  # only here: this file alone is the whole model

        return load_neox(path_or_name, **overrides)

    def num_params(self, embeddings=True):
        """How many parameters; embeddings=False leaves out both ends, as Pythia counts."""
        ends = 0 if embeddings else self.embed.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - ends

    def flops_per_token(self, T):
        """Floating-point operations to train on one token in a context of T, forward and backward.

        Matrix products only, the output layer included: 2 a weight forward, twice that backward.
        Causal attention is counted at the half it needs: 4 C T / 2 forward.
        """
        c = self.config
        loops = len(c.nexus_streams) * (c.nexus_order - 1)  # inner attentions a layer
        weights = 12 * c.n_embd**2
        if loops and c.nexus_inner != "self":  # W_q and W_k a loop, W_v once a stream
            weights += (2 * loops + len(c.nexus_streams)) * c.n_embd**2
        attention = (1 + loops) * 2 * c.n_embd * T
        return 3 * (c.n_layer * (2 * weights + attention) + 2 * c.n_embd * c.vocab_size)


def sample(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draw one token a row, (B, 1), from logits (B, V); parameters as in GPT.generate."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass of all likelier tokens
        drop = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
