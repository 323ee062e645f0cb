"""
Checkpoints: written so that a whole one is always there, read so that a file cannot run code.
"""

import contextlib
import os
import pickle

import torch

from data import UserError
from model import GPT, GPTConfig, ModelError


def save_checkpoint(path, state):
    """Write state so that `path` is at every moment a whole checkpoint, the old or the new one."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        kept = "the last one is untouched" if os.path.exists(path) else "there is none yet"
        raise UserError(f"could not write the checkpoint {path} ({error}): is the disk full? "
                        f"{kept}; free some space and --resume") from error


def load_weights(model, state, path):
    """load_state_dict; ModelError, naming the first weight, if they are not the model's."""
    own = model.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise ModelError(f"{path}: the weight {key} is missing, unknown or of another shape "
                             "than its config says")
    model.load_state_dict(state)
    return model


def load_checkpoint(path, device="cpu", **overrides):
    """Read what train.py saved; returns (model, meta), the model in eval mode.

    meta holds all but the tensors: config, step, tokens, tokenizer, data, args.
    overrides change fields of the config, e.g. nexus_order=2. attention is sdpa, however it was
    trained (the result is the same), unless they say otherwise.
    Raises ModelError with the reason if the file is missing, damaged or not ours.
    """
    saved = read_checkpoint(path, device)
    try:
        config = GPTConfig(**{**saved["config"], "attention": "sdpa", **overrides})
    except TypeError as error:  # a field of another version
        raise ModelError(f"{path} has a config that is not ours: {error}") from error
    model = load_weights(GPT(config), saved.pop("model"), path).to(device).eval()
    return model, {key: value for key, value in saved.items() if key != "optimizer"}


def read_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint, tensors included. Only tensors and plain values are read: a
    file from elsewhere cannot run code. Errors as in load_checkpoint."""
    if not os.path.isfile(path):
        raise ModelError(f"no checkpoint at {path}: train.py writes one as OUT/ckpt.pt")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} is damaged, or not a checkpoint: it cannot be read as tensors "
                         f"and plain values ({type(error).__name__})") from error
    if not isinstance(saved, dict) or not {"model", "config", "step", "tokenizer"} <= saved.keys():
        raise ModelError(f"{path} is not a checkpoint of ours: it was not written by train.py")
    return saved
