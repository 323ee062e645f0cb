"""
Nexus inside pretrained transformers models: Qwen2.5, Llama, Mistral, Pythia and similar ones.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B")
    nexus(model, order=2)                 # in place; no weight is added or changed
    nexus(model, order=1)                 # the original again

Every decoder here rotates its queries and keys by one function, apply_rotary_pos_emb, just before
it attends. That is where Nexus hooks in: what is to be rotated is first refined, by loops of the
model's own attention (same mask, scaling and backend). All else is the model's own code.

A loop refines the queries and keys s into h_s, which begins as s, by one of five maps:

    self     h_s <- Attn(h_s, h_s, s)          accounts of the paper, as a formula
    tokens   h <- Attn(h_q, h_k, v)            another, in words: what the heads have gathered,
             h_q, h_k <- h W_q, h W_k          (B, T, C), is projected in place of the input
    past     h_s <- s + Attn_<(h_s, h_s, s)    Attn_< sees only earlier tokens; the first of a
    cross    h_s <- s + Attn_<(h_q, h_k, s)    document keeps s
    shift    h_s <- h_s of the token before    no attention: with a gate from 0 on the keys alone,
                                               k_t <- (1 - g) k_t + g k_(t-1), g learnt per head

Where H query heads share K keys in groups, each head of a stream has its own map in self, past and
shift: H for the queries, K for the keys. In cross and tokens a query head takes its group's key. In
cross a key takes its group's mean query: its logits are the group's mean logits, no head is
preferred, and a group of one query gives the definition.
"""

import copy
import functools
import inspect
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from model import ModelError

# Shapes in comments: B batch, T new tokens, S all tokens seen, H query heads, K key heads (fewer,
# with grouped queries), D head width.

# Tested, with their mask, cache and scaling. Others rotate only a part of each head, or not always.
FAMILIES = ("gemma", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "qwen2",
            "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
INNERS = ("self", "past", "cross", "shift", "tokens")
BACKENDS = ("sdpa", "eager", "flex_attention")  # whose masks can hide a token's own position
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # from 5.24, before, in GPT-NeoX


class Refinement(NamedTuple):
    """What the inner loops of one attention need, passed to the rotary function in place of its
    cosines."""

    attention: nn.Module
    x: torch.Tensor  # what the attention is given, (B, T, C)
    cos: torch.Tensor
    mask: object  # as the model made it: None, a tensor (B, 1, T, S) or a BlockMask
    cache: object
    cache_position: object  # of the new tokens, or None: newer versions count them in the cache
    extra: dict  # what else the model passes to its attention


class Heads:
    """What transformers' attention functions read from a module; each head has its own key."""

    num_key_value_groups, is_causal = 1, True

    def __init__(self, attention):
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.training = attention.training


class Gate(nn.Module):
    """One number per head, h <- s + g (h - s): 0 is the original model, 1 is Nexus."""

    def __init__(self, heads, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, 1, 1), float(start)))

    def forward(self, s, h):
        return s + self.weight * (h - s)


class Nexus:
    """Mixed in before a model's own attention class: together they are that attention, refined."""

    def forward(self, *args, **kwargs):
        given = dict(zip(self.nexus_names, args, strict=False)) | kwargs
        cos, sin = given["position_embeddings"]
        extra = {k: v for k, v in given.items() if k not in self.nexus_names}
        cache = next((given[name] for name in CACHE_NAMES if name in given), None)
        context = Refinement(self, given["hidden_states"], cos, given.get("attention_mask"), cache,
                             given.get("cache_position"), extra)
        return self.nexus_forward(**given | dict(position_embeddings=(context, sin)))

    def refine(self, q, k, rotary, context):
        """Queries (B, H, T, D) and keys (B, K, T, D) after order - 1 inner loops, before rotary: as
        CausalSelfAttention.refine in model.py. The streams are concatenated, as H + K heads."""
        H, K, names = q.size(1), k.size(1), self.nexus_streams
        backend = self.config._attn_implementation
        if self.nexus_inner not in ("self", "tokens") and backend not in BACKENDS:
            raise ModelError(f"the inner map {self.nexus_inner!r} needs the attention "
                             f"{', '.join(BACKENDS)}, not {backend!r}, whose masks it cannot read")

        def apart(h):
            return h[:, :H] if "q" in names else q, h[:, -K:] if "k" in names else k

        def heads(linear, x):  # (B, T, C) -> (B, heads, T, D)
            return linear(x).unflatten(-1, (-1, q.size(-1))).transpose(1, 2)

        h = s = torch.cat([{"q": q, "k": k}[n] for n in names], dim=1)
        if self.nexus_inner != "shift":  # of every loop
            values = keep(context, "values", heads(self.v_proj, context.x)
                          if self.nexus_inner == "tokens" else s)
        for loop in range(1, self.nexus_order):
            match self.nexus_inner:
                case "self":
                    query = rotary(h)
                    h = attend(query, keep(context, loop, query), values, context)
                case "past":
                    query = rotary(h)
                    h = s + attend_earlier(query, keep(context, loop, query), values, context)
                case "cross":  # a group's mean query for its key, a group's key for its queries
                    hq, hk = apart(h)
                    mean = hq.unflatten(1, (K, H // K)).mean(2)
                    query = rotary(torch.cat([{"q": hq, "k": mean}[n] for n in names], dim=1))
                    key = keep(context, loop, rotary(hk))
                    keys = {"q": key.repeat_interleave(H // K, 1), "k": key}
                    key = torch.cat([keys[n] for n in names], dim=1)
                    h = s + attend_earlier(query, key, values, context)
                case "tokens":
                    hq, hk = apart(h)
                    key, value = (shared.repeat_interleave(H // K, 1) for shared in (
                        keep(context, loop, rotary(hk)), values))
                    y = attend(rotary(hq), key, value, context).transpose(1, 2).flatten(2)
                    h = torch.cat([heads(getattr(self, f"{n}_proj"), y) for n in names], dim=1)
                case "shift":
                    h = previous(h, keep(context, loop, h), context)
                case inner:
                    raise ModelError(f"refine has no case for {inner!r}")
        return apart(self.nexus_gate(s, h) if self.nexus_gate is not None else h)


def attend(query, key, value, context):
    """Attention by the backend that the model's config names, with its scaling and mask, a key for
    each query head: query (B, heads, T, D), key and value (B, heads, S, D) -> (B, heads, T, D)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = context.attention
    eager = attention.nexus_forward.__globals__["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, eager)
    return function(Heads(attention), query, key, value, context.mask, dropout=0.0,
                    scaling=attention.scaling, **context.extra,
                    sliding_window=getattr(attention, "sliding_window", None))[0].transpose(1, 2)


def attend_earlier(query, key, value, context):
    """attend, to strictly earlier tokens only; where a document has none, the result is 0."""
    T, S, mask = query.size(2), key.size(2), context.mask
    if mask is None:  # plain causal: drop the newest key, and the query that sees no other
        if S == 1:
            return torch.zeros_like(query)
        seen = S if T == 1 else T  # a static cache has room for more
        first = int(seen == T)
        y = attend(query[:, :, first:], key[:, :, :seen - 1], value[:, :, :seen - 1], context)
        return F.pad(y, (0, 0, first, 0))
    strict = earlier(context, T, S)
    if isinstance(strict, BlockMask):  # it gives 0 for an empty row
        return attend(query, key, value, context._replace(mask=strict))
    nothing = ~strict.any(-1, keepdim=True)  # (B, 1, T, 1): the softmax of such a row would be NaN
    allowed = strict | nothing
    if mask.dtype != torch.bool:  # additive
        allowed = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    return attend(query, key, value, context._replace(mask=allowed)).masked_fill(nothing, 0)


def previous(h, seen, context):
    """h (B, heads, T, D) of the token before each, out of all seen (B, heads, S, D); the first of
    a document keeps its own."""
    T, S = h.size(2), seen.size(2)
    if context.mask is None:  # the very first keeps its own
        before = seen[:, :, S - 2:S - 1] if T == 1 else h[:, :, :-1]
        return torch.cat([h[:, :, :T - before.size(2)], before], dim=2)
    mask = earlier(context, T, S)
    if isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, len(h), 1, T, S, h.device)
    newest = last(mask)
    before = seen.gather(2, newest.clamp(min=0).expand_as(h))
    return before.where(newest >= 0, h)


def earlier(context, T, S):
    """The model's mask less each token's own position: a bool tensor (B, 1, T, S) or a BlockMask.

    The own position is the last that a token may see, as in every causal mask; in a BlockMask,
    S - T + i for query i. Raises ModelError where that does not hold.
    """
    mask, cache = context.mask, context.cache
    if isinstance(mask, BlockMask):
        if getattr(cache, "is_compileable", False):
            raise ModelError("past, cross and shift do not know a token's position in a static "
                             "cache under flex_attention: use sdpa, or a dynamic cache")
        if not hasattr(mask, "nexus_earlier"):  # made once, for all layers
            may_look = mask.mask_mod
            mask.nexus_earlier = create_block_mask(
                lambda b, h, i, j: may_look(b, h, i, j) & (j < S - T + i), mask.shape[0], None, T,
                S, mask.kv_indices.device)
        return mask.nexus_earlier
    allowed = mask if mask.dtype == torch.bool else mask > -1e4  # below that, the weight is 0
    return allowed & (torch.arange(S, device=mask.device) < last(allowed))


def last(allowed):
    """The last position that each row of a bool tensor (..., T, S) allows, (..., T, 1), or -1."""
    place = allowed.size(-1) - 1 - allowed.flip(-1).byte().argmax(-1, keepdim=True)
    return place.where(allowed.any(-1, keepdim=True), -1)


def keep(context, name, x):
    """Append x (B, heads, T, D) to what this layer has stored under a name, and return that, (B,
    heads, S, D); without a cache, x. It is an extra layer of the model's own cache, of this layer's
    kind: beams, windows and cropping apply to it too."""
    cache, layer = context.cache, context.attention.layer_idx
    if cache is None:
        return x.view_as(x)  # compiled flex_attention rejects a tensor given twice (torch 2.13)
    while len(cache.layers) < context.attention.config.num_hidden_layers:  # one that would grow
        cache.layers.append(cache.layer_class_to_replicate())
    places = cache.__dict__.setdefault("nexus", {})  # (layer, name) -> index in cache.layers
    if (layer, name) not in places:
        own = cache.layers[layer]
        if own.is_initialized and own.get_seq_length():
            raise ModelError("this cache was filled before nexus(): start with a new one")
        fresh = copy.deepcopy(own)
        fresh.is_initialized = False
        places[layer, name] = len(cache.layers)
        cache.layers.append(fresh)
    return cache.update(x, x[..., :0], places[layer, name],  # as keys, without values
                        dict(cache_position=context.cache_position))[0]


def refined_rotary(rotary):
    """apply_rotary_pos_emb of a model's file, preceded by Nexus."""
    def apply(q, k, context, sin, *args, **kwargs):
        def rotated(h):
            return rotary(h, h[:, :0], context.cos, sin, *args, **kwargs)[0]

        q, k = context.attention.refine(q, k, rotated, context)
        return rotary(q, k, context.cos, sin, *args, **kwargs)

    return apply


@functools.cache
def nexus_class(attention_class):
    """attention_class, preceded by Nexus: its own forward, but with refined_rotary in scope."""
    forward = inspect.unwrap(attention_class.forward)
    scope = dict(forward.__globals__)
    scope["apply_rotary_pos_emb"] = refined_rotary(scope["apply_rotary_pos_emb"])
    scope.pop("__name__")  # else torch.compile would look its names up in their file
    refined = FunctionType(forward.__code__, scope, "forward", forward.__defaults__,
                           forward.__closure__)
    names = [p.name for p in inspect.signature(forward).parameters.values()
             if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return type("Nexus" + attention_class.__name__, (Nexus, attention_class),
                dict(nexus_forward=refined, nexus_names=names))


def attentions(model):
    """The decoder's attention modules, in order. ModelError if Nexus does not fit this model."""
    family = getattr(model.config, "model_type", None)
    if family not in FAMILIES:
        raise ModelError(f"nexus() knows the rotary decoders {', '.join(FAMILIES)}; this model is "
                         f"{family!r}")
    return [m for m in model.modules()
            if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def attach(model, order, streams, layers, gate, inner):
    """Give the layers' attentions their inner loops, in place of any before; order 1: none."""
    modules, c = attentions(model), model.config
    query, key = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
    for attention in modules:  # the original, whatever it was before
        if isinstance(attention, Nexus):
            attention.__class__ = type(attention).__bases__[1]
            for name in ("order", "streams", "inner", "gate"):
                delattr(attention, f"nexus_{name}")
    for attention in modules if order > 1 else ():
        if layers is None or attention.layer_idx in layers:
            attention.__class__ = nexus_class(type(attention))
            attention.nexus_order, attention.nexus_streams = order, streams
            attention.nexus_inner = inner
            attention.nexus_gate = None if gate is None else Gate(
                {"qk": query + key, "q": query, "k": key}[streams], gate).to(
                    next(attention.parameters()).device, model.dtype)


def cache_name(model):
    """What the forward pass of a model of transformers calls its cache."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in names)


@functools.cache
def probe(family, order, streams, gated, inner):
    """What these settings compute, whatever the weights: eight sums of squared logits of a small
    fixed model of the family. Raises ModelError if its logits differ through a cache, or if
    documents packed into a row see each other."""
    import transformers

    few = dict(vocab_size=48, hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
               intermediate_size=32, max_position_embeddings=64, moe_intermediate_size=32,
               num_experts=8, num_local_experts=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if family != "gpt_neox":
        few |= dict(num_key_value_heads=2, head_dim=8)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        config = transformers.AutoConfig.for_model(family, **few)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for p in model.parameters():
            if p.dim() > 1:  # attention neither even nor sharp: all that is computed shows
                p.copy_((torch.arange(p.numel()) * 1.7).sin().view_as(p) * 0.7 / p.size(-1) ** 0.5)
        attach(model, order, streams, None, 0.5 if gated else None, inner)
        idx, parts, cache = torch.arange(48)[None] * 7 % 48, [], transformers.DynamicCache()
        first, second = idx.split([28, 20], dim=1)
        whole, name = model(idx, use_cache=False).logits, cache_name(model)
        for part in idx.split([20, 1, 1, 26], dim=1):
            parts.append(model(part, use_cache=True, **{name: cache}).logits)
        packed = model(idx, position_ids=torch.arange(48)[None] % 28, use_cache=False).logits
        alone = [model(document, use_cache=False).logits for document in (first, second)]
    for what, found, wanted in (("a cache", torch.cat(parts, 1), whole),
                                ("other documents in its row", packed, torch.cat(alone, 1))):
        if not (found - wanted).abs().max() <= 1e-3 * wanted.abs().max():
            raise ModelError(f"the inner map {inner!r} gives other logits with {what}: what it "
                             "reads of earlier tokens must come from keep, and be gathered by "
                             "attend, attend_earlier or previous")
    return [round(x, 4) for x in whole.view(8, -1).square().sum(1).tolist()]


def nexus(model, order=2, streams="qk", layers=None, gate=None, inner="self"):
    """Turn a transformers causal language model into its Nexus version, in place; returns it.

    order: 1 restores the original, m > 1 adds m - 1 inner loops to each attention.
    streams: what is refined, "qk", "q" or "k". layers: indices of the layers (None: all).
    inner: the map of a loop, "self", "past", "cross", "shift" or, in Llama, Mistral and Qwen2,
    "tokens", see above.
    gate: None, or the initial value of a new parameter per head and stream; 0 starts as the
    original model, whereas order 2 without a gate changes a pretrained model at once.
    Called again, with the same streams and gate, it keeps what the gates have learnt.
    The settings are in model.config.nexus, with a probe of what they compute: save_pretrained
    writes them, nanonexus.decoder.load applies them, and refuses other maps of the same name.
    Raises ModelError if they are out of range, or the model's family is not in FAMILIES.
    """
    if type(order) is not int or order < 1:
        raise ModelError(f"order must be a whole number from 1 up, got {order!r}")
    if streams not in ("qk", "q", "k"):
        raise ModelError(f"streams must be qk, q or k, got {streams!r}")
    if inner not in INNERS:
        raise ModelError(f"inner must be one of {', '.join(INNERS)}, got {inner!r}")
    modules = attentions(model)
    if not all(attention.is_causal for attention in modules):
        raise ModelError("this model attends to later tokens too: the loops of Nexus are causal")
    for i in layers or []:
        if type(i) is not int or not 0 <= i < len(modules):
            raise ModelError(f"layers must be from 0 to {len(modules) - 1}, got {i!r}")
    c, plain = model.config, ("llama", "mistral", "qwen2")
    if inner == "tokens" and (c.model_type not in plain or modules[0].o_proj.in_features
                              != c.hidden_size):
        raise ModelError(f"the inner map 'tokens' needs heads whose outputs have the model's width "
                         f"and the projections of {', '.join(plain)}: this is {c.model_type!r}")
    if gate is not None and order == 1:
        raise ModelError("a gate needs order 2 or more: order 1 has nothing to gate")

    before = c.__dict__.pop("nexus", {})
    learnt = {m.layer_idx: m.nexus_gate for m in modules if isinstance(m, Nexus)
              and (before.get("streams"), before.get("gate")) == (streams, gate)}
    attach(model, order, streams, layers, gate, inner)
    if order > 1:
        for attention in modules:
            if isinstance(attention, Nexus):
                attention.nexus_gate = learnt.get(attention.layer_idx, attention.nexus_gate)
        c.nexus = dict(order=order, streams=streams, gate=gate, inner=inner,
                       layers=None if layers is None else sorted(set(layers)),
                       probe=probe(c.model_type, order, streams, gate is not None, inner))
    return model


def check_map(saved, family, path):
    """ModelError if saved settings of nexus() compute something else by now than their probe says;
    order 1 and older settings have none."""
    if saved.get("probe"):
        s = dict(streams="qk", gate=None, inner="self") | saved
        found = probe(family, s["order"], s["streams"], s["gate"] is not None, s["inner"])
        if not torch.allclose(torch.tensor(found), torch.tensor(s["probe"]), rtol=1e-4, atol=1e-3):
            raise ModelError(f"{path}: nanonexus/retrofit.py has changed since: its inner map "
                             f"{s['inner']!r} computes something else")
