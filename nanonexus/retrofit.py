"""
Nexus inside pretrained models of transformers: Qwen2.5, Llama, Mistral, Pythia and their like.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B")
    nexus(model, order=2)                 # in place; no weight is added or changed
    nexus(model, order=1)                 # the original again

Every decoder here rotates its queries and keys by one function, apply_rotary_pos_emb, just before
it attends. That is where Nexus comes in: what is to be rotated is first refined, by loops of the
model's own attention (same mask, scaling and backend). All else is the model's own code.
"""

import copy
import functools
import inspect
import os
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn as nn

from model import ModelError
from nanonexus.hf import fetch

# Shapes in comments: B batch, T new tokens, S all tokens seen, H query heads, K key heads (fewer,
# with grouped queries), D head width.

# Tested, with their mask, cache and scaling. Others rotate only a part of each head, or not always.
FAMILIES = ("gemma", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "qwen2",
            "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # from 5.24, before, in GPT-NeoX


class Refinement(NamedTuple):
    """What refining needs, carried to the rotary function in the place of its cosines."""

    attention: nn.Module
    cos: torch.Tensor
    mask: object  # as the model made it: None, a tensor or a BlockMask
    cache: object
    extra: dict  # what else the model hands to its attention


class Heads:
    """What transformers' attention functions ask a module for, where each head has its own key."""

    num_key_value_groups, is_causal = 1, True

    def __init__(self, attention):
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.training = attention.training


class Gate(nn.Module):
    """One number a head, h <- s + g (h - s): 0 is the original model, 1 is Nexus."""

    def __init__(self, heads, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, 1, 1), float(start)))

    def forward(self, s, h):
        return s + self.weight * (h - s)


class Nexus:
    """Comes before a model's own attention class: both together are that attention, refined."""

    def forward(self, *args, **kwargs):
        given = dict(zip(self.nexus_names, args, strict=False)) | kwargs
        cos, sin = given["position_embeddings"]
        extra = {k: v for k, v in given.items() if k not in self.nexus_names}
        cache = next((given[name] for name in CACHE_NAMES if name in given), None)
        context = Refinement(self, cos, given.get("attention_mask"), cache, extra)
        return self.nexus_forward(**given | dict(position_embeddings=(context, sin)))

    def refine(self, s, rotary, context):
        """h <- Attn(h, h, s), order - 1 times, of streams s (B, heads, T, D) before rotary: as
        CausalSelfAttention.refine in model.py, the reading `self`."""
        h, values, attend = s, s, attention_function(self)
        for loop in range(1, self.nexus_order):
            query = key = rotary(h)
            if context.cache is not None:  # the values are those of the first loop: kept once
                new = s if loop == 1 else s[..., :0]
                key, seen = keep(context.cache, self.layer_idx, loop, key, new)
                values = seen if loop == 1 else values
            h = attend(Heads(self), query, key, values, context.mask, dropout=0.0,
                       scaling=self.scaling, sliding_window=getattr(self, "sliding_window", None),
                       **context.extra)[0].transpose(1, 2)  # they give (B, T, heads, D)
        return self.nexus_gate(s, h) if self.nexus_gate is not None else h


def attention_function(attention):
    """The backend that the model's config names: sdpa, eager, flex_attention, ..."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = attention.nexus_forward.__globals__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, eager)


def keep(cache, layer, loop, key, value):
    """Append to what this loop of this layer has seen, (B, heads, S, D) each. It is a layer more of
    the model's own cache, of the kind its own layer has: beams, windows and cropping follow."""
    while len(cache.layers) <= layer:  # a cache that grows as layers come
        cache.layers.append(cache.layer_class_to_replicate())
    places = cache.__dict__.setdefault("nexus", {})  # (layer, loop) -> index in cache.layers
    if (layer, loop) not in places:
        own = cache.layers[layer]
        if own.is_initialized and own.get_seq_length():
            raise ModelError("this cache was filled before nexus(): begin with a new one")
        fresh = copy.deepcopy(own)
        fresh.is_initialized = False
        places[layer, loop] = len(cache.layers)
        cache.layers.append(fresh)
    return cache.update(key, value, places[layer, loop])


def refined_rotary(rotary):
    """apply_rotary_pos_emb of a model's file, with Nexus before it."""
    def apply(q, k, context, sin, *args, **kwargs):
        attention, H = context.attention, q.size(1)

        def rotated(h):
            return rotary(h, h[:, :0], context.cos, sin, *args, **kwargs)[0]

        if attention.nexus_streams == "qk":  # side by side as H + K heads: one call for both
            q, k = attention.refine(torch.cat([q, k], dim=1), rotated, context).split(
                [H, k.size(1)], dim=1)
        elif attention.nexus_streams == "q":
            q = attention.refine(q, rotated, context)
        else:
            k = attention.refine(k, rotated, context)
        return rotary(q, k, context.cos, sin, *args, **kwargs)

    return apply


@functools.cache
def nexus_class(attention_class):
    """attention_class with Nexus before it: its own forward, but with refined_rotary in scope."""
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


def nexus(model, order=2, streams="qk", layers=None, gate=None):
    """Turn a causal language model of transformers into its Nexus version, in place; returns it.

    order: 1 gives the original back, m > 1 adds m - 1 inner loops to each attention.
    streams: what is refined, "qk", "q" or "k". layers: numbers of the layers (None: all).
    gate: None, or what a new parameter a head and stream starts at; 0 starts as the original model,
    since at order 2 without a gate a pretrained model changes at once.
    Asked again with the same settings, it keeps what the gates have learnt.
    The settings stand in model.config.nexus: save_pretrained writes them, load() obeys them.
    Raises ModelError if they are out of range, or the model is of no family in FAMILIES.
    """
    if type(order) is not int or order < 1:
        raise ModelError(f"order must be a whole number from 1 up, got {order!r}")
    if streams not in ("qk", "q", "k"):
        raise ModelError(f"streams must be qk, q or k, got {streams!r}")
    modules = attentions(model)
    chosen = range(len(modules)) if layers is None else layers
    for i in chosen:
        if type(i) is not int or not 0 <= i < len(modules):
            raise ModelError(f"layers must be from 0 to {len(modules) - 1}, got {i!r}")
    if gate is not None and order == 1:
        raise ModelError("a gate needs order 2 or more: order 1 has nothing to let through")

    settings = dict(order=order, streams=streams, gate=gate,
                    layers=None if layers is None else list(layers))
    if any(isinstance(m, Nexus) for m in modules) and model.config.nexus == settings:
        return model  # as it is, with the gates it has learnt
    for attention in modules:  # the original, whatever it was before
        if isinstance(attention, Nexus):
            attention.__class__ = type(attention).__bases__[1]
            del attention.nexus_order, attention.nexus_streams, attention.nexus_gate
    model.config.__dict__.pop("nexus", None)
    if order == 1:
        return model
    for i in set(chosen):
        attention, c = modules[i], model.config
        attention.__class__ = nexus_class(type(attention))
        attention.nexus_order, attention.nexus_streams = order, streams
        query, key = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
        heads = {"qk": query + key, "q": query, "k": key}[streams]
        device = next(attention.parameters()).device
        attention.nexus_gate = None if gate is None else Gate(heads, gate).to(device, model.dtype)
    model.config.nexus = settings
    return model


def load(path, **kwargs):
    """A model as save_pretrained left it, Nexus or not; kwargs go to from_pretrained.

    (from_pretrained alone would give the original attention with those weights.) Raises ModelError
    if its config.json has settings that nexus() does not take, or gates are missing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if settings := getattr(config, "nexus", None):  # gates are read below, with nothing said here
        own = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        own._keys_to_ignore_on_load_unexpected = ["nexus_gate"]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if settings:
        try:
            nexus(model, **settings)
        except TypeError as error:
            raise ModelError(f"{path}: config.json has no settings of nexus() ({error})") from error
        load_gates(model, path)
    return model


def load_gates(model, path):
    """Give the gates their saved values: they are no weights of the model's own class, which has
    left them out."""
    from safetensors import safe_open

    gates = {name: p for name, p in model.named_parameters() if "nexus_gate" in name}
    if not gates:
        return
    folder = fetch(path)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                for key in gates.keys() & file.keys():
                    gates.pop(key).data.copy_(file.get_tensor(key))
    if gates:
        raise ModelError(f"{path} says that it has gates, but not {min(gates)}")
