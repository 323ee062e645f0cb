"""
Pretrained decoders of transformers (Llama, Qwen2, ...), retrofitted or not, as Scorer sees a GPT.
"""

import copy
import inspect
import json
import os
from types import SimpleNamespace

import torch.nn as nn

from model import ModelError
from nanonexus.cli import UserError
from nanonexus.hf import load_gpt
from nanonexus.retrofit import CACHE_NAMES, load, nexus


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
            names = inspect.signature(self.model.forward).parameters
            kwargs[next(name for name in CACHE_NAMES if name in names)] = cache.layers
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
        settings = (trained["nexus"] or {}) | overrides
        order = settings.pop("nexus_order")
        if order == 1:
            settings.pop("gate", None)
        nexus(model, **settings | dict(order=order))
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
    settings = getattr(model.config, "nexus", None) or dict(order=1)
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
