"""
Nexus, attention whose queries and keys are themselves outputs of attention, for transformers.

This file is all that a folder exported by nanoNexus needs besides torch and transformers (4.50 or
later). The model is a GPT-NeoX, weight for weight; what differs is NexusAttention.refine, by
config.nexus: order (1 is GPT-NeoX, m > 1 adds m-1 inner loops), streams and inner (how).

    Attn(a, b, c) = softmax(mask + rope(a) rope(b)^T / sqrt(D)) c
    h_s <- s, then m-1 times h_s <- Attn(h_s, h_s, s), for s = q, s = k
    out = Attn(h_q, h_k, v)

References: Nexus https://arxiv.org/abs/2512.03377, GPT-NeoX-20B 2204.06745.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, GPTNeoXConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Shapes in comments: B batch, T new tokens, S all tokens seen (cached and new), C hidden_size,
# H heads, D = C / H head width, R rotated dimensions of a head, V vocab_size.

# transformers 5.24 has renamed past_key_values
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NexusConfig(GPTNeoXConfig):
    """GPT-NeoX's, and `nexus`: dict(order=2, streams="qk", inner="self"). The name differs, so that
    no GPT-NeoX without the inner loops is loaded from it by mistake."""

    model_type = "nanonexus"


class Context(NamedTuple):
    """What all layers, and all loops of the recursion, share in one forward pass."""

    rope: tuple  # cos, sin (B or 1, 1, T, R / 2)
    mask: Any  # None: causal; or a bool tensor (B or 1, 1, T, S), True where allowed
    strict_mask: Any  # the same, without the token's own position
    memory: Any  # None, or Memory


class Memory:
    """A transformers cache, with one of its layers for each tensor that a pass stores: every pass
    stores the same in the same order. At order m with n streams, 2 + n m in each layer."""

    def __init__(self, cache):
        self.cache, self.pairs = cache, []

    def update(self, x):
        """x (B, H, T, D) after what earlier passes stored there, (B, H, S, D). The same tensor
        given again in a pass, as the values of a second loop, is stored once."""
        for given, kept in self.pairs:
            if given is x:
                return kept
        turn, layers = len(self.pairs), getattr(self.cache, "layers", None)
        if layers is not None and turn == len(layers):
            kind = self.cache.layer_class_to_replicate or type(layers[0])
            layers.append(kind())
        kept, _ = self.cache.update(x, x[..., :0], turn)  # keys alone, no values
        self.pairs.append((x, kept))
        return kept


def rotate(x, cos, sin):
    """Rotary position embedding: x (B, H, T, D), R dimensions rotated, i paired with i + R/2."""
    half = sin.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def attend(q, k, v, ctx, strict=False):
    """Attn(q, k, v), the one primitive: q, k, v (B, H, T, D) -> (B, H, T, D).

    strict: a token sees those before it and not itself. Where it sees nothing (padding, or the
    first token if strict), the result is 0.
    """
    query = rotate(q, *ctx.rope)
    key = query if k is q else rotate(k, *ctx.rope)
    if ctx.memory is not None:  # (B, H, T, D) -> (B, H, S, D)
        key, v = ctx.memory.update(key), ctx.memory.update(v)
    T, S, mask = query.size(2), key.size(2), ctx.strict_mask if strict else ctx.mask
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)  # (B, 1, T, 1): the softmax of an empty row is NaN
        y = F.scaled_dot_product_attention(query, key, v, attn_mask=mask | blind)
        return y.masked_fill(blind, 0)
    if not strict:
        return F.scaled_dot_product_attention(query, key, v, is_causal=T > 1)
    i = int(T == S)  # drop the last key, and the first query if it has no other
    y = F.scaled_dot_product_attention(query[:, :, i:], key[:, :, :-1], v[:, :, :-1],
                                       is_causal=T > 1)
    return F.pad(y, (0, 0, i, 0))


class NexusAttention(nn.Module):
    """GPT-NeoX's attention, of order 1 or higher."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.nexus = config.hidden_size, config.num_attention_heads, config.nexus
        self.query_key_value = nn.Linear(C, 3 * C)  # head after head, q, k, v each
        self.dense = nn.Linear(C, C)

    def forward(self, x, ctx):
        q, k, v = self.heads(self.query_key_value(x)).chunk(3, dim=-1)  # (B, H, T, D) each
        q, k = self.refine(q, k, ctx)
        return self.dense(attend(q, k, v, ctx).transpose(1, 2).flatten(2))  # (B, T, C)

    def refine(self, q, k, ctx):
        """The queries and keys after order - 1 inner loops, all (B, H, T, D)."""
        h, streams = {"q": q, "k": k}, self.nexus["streams"]
        s = dict(h)  # the values of every loop: the unrefined streams
        if self.nexus["inner"] == "shared" and self.nexus["order"] > 1:
            s = {n: self.project(h[n], 2) for n in streams}
        for _ in range(self.nexus["order"] - 1):
            h |= {n: self.inner_step(n, h, s[n], ctx) for n in streams}
        return h["q"], h["k"]

    def inner_step(self, n, h, s, ctx):
        """One loop of stream n ("q" or "k"), from both streams h and its own values s."""
        inner = self.nexus["inner"]
        if inner == "self":  # the paper's, as far as its text is known
            return attend(h[n], h[n], s, ctx)
        if inner == "past":  # a token keeps itself and gathers from those before it
            return s + attend(h[n], h[n], s, ctx, strict=True)
        if inner == "cross":  # the same, with the map from queries to keys for both streams
            return s + attend(h["q"], h["k"], s, ctx, strict=True)
        if inner == "shared":  # the layer's own W_q, W_k, W_v once more
            return attend(self.project(h[n], 0), self.project(h[n], 1), s, ctx)
        raise ValueError(f"config.nexus has the inner attention {inner!r}: known are self, past, "
                         "cross, shared")

    def project(self, x, part):
        """x (B, H, T, D), heads merged, through W_q, W_k or W_v (part 0, 1, 2); same shape."""
        weight, bias = (p.unflatten(0, (self.n_head, 3, -1))[:, part].flatten(0, 1)
                        for p in (self.query_key_value.weight, self.query_key_value.bias))
        return self.heads(F.linear(x.transpose(1, 2).flatten(2), weight, bias))

    def heads(self, x):
        """(B, T, H n) -> (B, H, T, n)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class NexusMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = "none" if config.hidden_act == "gelu" else "tanh"

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class NexusLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parallel, self.dropout = config.use_parallel_residual, config.hidden_dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention, self.mlp = NexusAttention(config), NexusMLP(config)

    def forward(self, x, ctx):
        y = self.attention(self.input_layernorm(x), ctx)
        if self.parallel:
            return x + self.drop(y + self.mlp(self.post_attention_layernorm(x)))
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)


class NexusModel(nn.Module):
    """The embedding, the layers and the last norm, under GPT-NeoX's names."""

    def __init__(self, config):
        super().__init__()
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NexusLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class NexusForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model: tokens (B, T) in, logits (B, T, V) for each next token out."""

    config_class = NexusConfig
    base_model_prefix = "gpt_neox"
    _supports_sdpa = True
    _no_split_modules = ["NexusLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = NexusModel(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.gpt_neox.embed_in

    def set_input_embeddings(self, value):
        self.gpt_neox.embed_in = value

    def get_output_embeddings(self):
        return self.embed_out

    def set_output_embeddings(self, value):
        self.embed_out = value

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                cache=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        """Logits for input_ids (B, T), as transformers' models give them.

        attention_mask: (B, S), 0 for padding, on the left or on the right. position_ids: (B, T).
        cache (before transformers 5.24: past_key_values): a DynamicCache, to continue after the
        tokens that it has seen. labels: (B, T), -100 is ignored, for .loss. logits_to_keep: how
        many of the last tokens' logits (0: all). Raises ValueError for what is not supported.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) not in (None, False):
                raise ValueError(f"{type(self).__name__} has no {name}")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError("the inner loops remember more than a static cache has room for: use "
                             "a DynamicCache")
        past = cache.get_seq_length() if cache is not None else 0
        ctx = self.context(input_ids, attention_mask, position_ids, past,
                           None if cache is None else Memory(cache))
        x = F.dropout(self.gpt_neox.embed_in(input_ids), self.config.hidden_dropout, self.training)
        for layer in self.gpt_neox.layers:
            x = layer(x, ctx)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.embed_out(self.gpt_neox.final_layer_norm(x[:, keep]))
        loss = None if labels is None else self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def context(self, input_ids, attention_mask, position_ids, past, memory):
        """The Context of a pass over input_ids (B, T) after `past` tokens."""
        T, S, device = input_ids.size(1), past + input_ids.size(1), input_ids.device
        if S > self.config.max_position_embeddings:
            raise ValueError(f"{S} tokens are more than the context of "
                             f"{self.config.max_position_embeddings}")
        if attention_mask is not None:
            if attention_mask.shape != (input_ids.size(0), S):
                raise ValueError(f"attention_mask must be (batch, tokens seen), {S} of them, 0 for "
                                 f"padding; it is {tuple(attention_mask.shape)}")
            attention_mask = attention_mask.to(device, torch.bool)
            if position_ids is None:  # padding has no position
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:]
        if position_ids is None:
            position_ids = torch.arange(past, S, device=device)[None]

        # angles in float64, which MPS lacks: position * rate loses precision in float32
        R = int(self.config.hidden_size // self.config.num_attention_heads
                * self.config.rope_parameters["partial_rotary_factor"])
        rates = 10000.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        place = torch.device("cpu") if device.type == "mps" else device
        angles = position_ids[:, None, :, None].to(place, torch.float64) * rates.to(place)
        rope = tuple(t.float().to(device) for t in (angles.cos(), angles.sin()))

        if (T == 1 or not past) and (attention_mask is None or attention_mask.all()):
            return Context(rope, None, None, memory)  # SDPA needs no mask in memory
        mask, strict_mask = (torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(past - i)
                             for i in (0, 1))
        if attention_mask is not None:
            seen = attention_mask[:, None, None]  # (B, 1, 1, S)
            mask, strict_mask = mask & seen, strict_mask & seen
        return Context(rope, mask, strict_mask, memory)
