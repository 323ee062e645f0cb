"""
Pretrained decoders of transformers (Llama, Qwen2, ...), retrofitted or not: load reads them, and a
Decoder is one as Scorer sees a GPT.
"""

import copy
import json
import os
from types import SimpleNamespace

import torch.nn as nn

from model import ModelError
from nanonexus.cli import UserError
from nanonexus.hf import fetch, load_gpt, weight_files
from nanonexus.retrofit import cache_name, check_map, nexus


def load(path, **kwargs):
    """A model as save_pretrained left it, Nexus or not; kwargs go to from_pretrained.

    (from_pretrained alone would give the original attention with those weights.) Raises ModelError
    if weights are missing, or its config.json has settings that nexus() does not accept, or an
    inner map that computes something else by now.
    """
    import transformers

    folder = fetch(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = settings_of(config)
    if settings:  # gates are read below: no warning here
        own = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        own._keys_to_ignore_on_load_unexpected = ["nexus_gate"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **kwargs)
    for what in ("missing", "unexpected"):
        if keys := sorted(map(str, info[f"{what}_keys"])):
            raise ModelError(f"{path}: the weight {keys[0]} is {what}"
                             + f", and {len(keys) - 1} more" * (len(keys) > 1))
    if settings:
        try:
            nexus(model, **settings)
        except (TypeError, ModelError) as error:
            raise ModelError(f"{path}: config.json has no settings of nexus() ({error})") from error
        check_map(config.nexus, config.model_type, path)
        load_gates(model, folder)
    return model


def load_gates(model, folder):
    """Give the gates their saved values, which the model's own class does not know and has
    skipped."""
    from safetensors import safe_open

    gates = {name: p for name, p in model.named_parameters() if "nexus_gate" in name}
    if not gates:
        return
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in gates.keys() & file.keys():
                values = file.get_tensor(key)
                if values.shape != gates[key].shape:
                    raise ModelError(f"{folder}: the gate {key} is {tuple(values.shape)}, but the "
                                     f"settings in config.json need {tuple(gates[key].shape)}")
                gates.pop(key).data.copy_(values)
    if gates:
        raise ModelError(f"{folder} lacks the gate {min(gates)}")


def settings_of(config):
    """What nexus() was given, {} if nothing: config.nexus without its probe."""
    settings = getattr(config, "nexus", None) or {}
    return {name: value for name, value in settings.items() if name != "probe"}


def override(model, **given):
    """nexus() with these settings and, where one is None, the model's own or the default."""
    own = {} if given["order"] == 1 else settings_of(model.config)
    return nexus(model, **own | {name: x for name, x in given.items() if x is not None})


class Decoder(nn.Module):
    """A causal language model of transformers: tokens (B, T) in, logits (B, T, V) out, with the
    config and the parameter count that Scorer reads of a GPT, and a DecoderCache for its cache."""

    def __init__(self, model):
        super().__init__()
        self.model, c = model, model.config
        settings = getattr(c, "nexus", None)  # of nanonexus.retrofit
        self.config = SimpleNamespace(
            model_type=c.model_type, vocab_size=c.vocab_size, block_size=c.max_position_embeddings,
            nexus_order=settings["order"] if settings else 1, nexus=settings)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, cache=None, **kwargs):
        if cache is not None:
            kwargs[cache_name(self.model)] = cache.layers
        return self.model(idx, use_cache=cache is not None, **kwargs).logits


class DecoderCache:
    """What a Decoder has seen of earlier tokens; `layers` is transformers' own cache of it."""

    def __init__(self):
        from transformers import DynamicCache

        self.layers = DynamicCache()

    def select(self, rows):
        """A copy that continues from these rows of the batch; a row may be repeated."""
        chosen = copy.deepcopy(self)
        chosen.layers.batch_select_indices(rows)
        return chosen


def is_gpt(folder):
    """Whether load_any reads a folder as a GPT; one that it cannot read is left to load_gpt, which
    says what is wrong."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            hf = json.load(f)
        return hf["model_type"] == "nanonexus" or (hf["model_type"] == "gpt_neox"
                                                   and "nexus" not in hf)
    except (OSError, ValueError, LookupError, TypeError):
        return True


def load_any(folder, **overrides):
    """load_gpt of a plain GPT-NeoX folder or one of nanonexus.export; of any other (a Decoder, the
    fields of its config as the folder has them). overrides: nexus_order, and for a Decoder the
    other settings of nexus(). Raises ModelError or UserError."""
    if is_gpt(folder):
        return load_gpt(folder, **overrides)
    model = pretrained(load, folder, dtype="float32")
    trained = vars(Decoder(model).config)
    if overrides:
        override(model, order=overrides.pop("nexus_order"), **overrides)
    return Decoder(model), trained


def pretrained(loader, path, **kwargs):
    """loader(path); UserError if it is neither a transformers folder nor on the hub."""
    try:
        return loader(path, **kwargs)
    except (ModelError, ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file can crash the libraries in any way
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load {path}: it is not a transformers model "
                        f"({type(error).__name__}: {reason:.300})") from error


def describe(model):
    """What nexus() has made of a transformers model, e.g. "order 2, streams qk, inner self"."""
    settings = settings_of(model.config) or dict(order=1)
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
