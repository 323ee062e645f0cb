"""
Checkpoints: written so that an intact one always exists, read so that a file cannot run code.
"""

import contextlib
import copy
import math
import os
import shutil
import sys
import zipfile
from dataclasses import asdict, fields

import torch

from model import GPTConfig, ModelError, check, output_layer
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.files import replace
from nanonexus.generate import KVCache

FORMAT = 2  # of checkpoints, see docs/formats.md
PARTS = dict(model=dict, config=dict, step=int, tokenizer=str, probe=torch.Tensor, optimizers=list,
             layout=list, scaler=dict, args=dict, data=str, tokens=int, format=int)


def older(path, i):
    """The i-th checkpoint before the one at path: ckpt.pt, ckpt.1.pt, ckpt.2.pt, ..."""
    root, extension = os.path.splitext(path)
    return f"{root}.{i}{extension}" if i else path


def save_checkpoint(path, state, keep=1):
    """Write state so that `path` is at every moment an intact checkpoint, the old or the new one;
    keep - 1 earlier ones stay. Raises UserError if it cannot, with all of them untouched."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as f:
            torch.save(dict(format=FORMAT) | state, f)
            f.flush()
            os.fsync(f.fileno())
        for i in range(keep - 2, 0, -1):
            if os.path.exists(older(path, i)):
                replace(older(path, i), older(path, i + 1))
        if keep > 1 and os.path.exists(path):  # via a second name, so that path always exists
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".link")
            try:
                os.link(path, path + ".link")
            except OSError:  # a file system without hard links
                shutil.copyfile(path, path + ".link")
            replace(path + ".link", older(path, 1))
            with contextlib.suppress(FileNotFoundError):  # a rename keeps two names of one file
                os.remove(path + ".link")
        replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        for name in (partial, path + ".link"):
            with contextlib.suppress(OSError):
                os.remove(name)
        kept = "the last one is untouched" if os.path.exists(path) else "there is none yet"
        raise UserError(f"could not write the checkpoint {path} ({error}): is the disk full? "
                        f"{kept}; free some space and --resume") from error


def load_weights(model, state, path):
    """load_state_dict; ModelError, naming the first weight, if they do not fit the model."""
    own = model.state_dict()
    for key in sorted(own.keys() | state.keys()):
        shape = getattr(state.get(key), "shape", None)
        if key not in own or own[key].shape != shape:
            wrong = "is missing" if key not in state else "has no place in this model" \
                if key not in own else f"is {shape and tuple(shape)}, not {tuple(own[key].shape)}"
            raise ModelError(f"{path}: the weight {key} {wrong}: it is not of the model that its "
                             "config and model.py make")
    model.load_state_dict(state)
    return model


def probe_ids(config):
    """A fixed sequence as long as the context, (1, block_size): long-range changes show, too."""
    return (torch.arange(config.block_size) * 37 % config.vocab_size)[None]


def probe(model):
    """A model's output for probe_ids: the last logits, (16, V) or fewer, in float32, on the CPU.
    Raises ModelError if a cache changes them: sampling and scoring would be another model's."""
    c, training = model.config, model.training
    idx, cache = probe_ids(c).to(next(model.parameters()).device), KVCache(c.block_size)
    with torch.no_grad():
        h = model.eval().hidden_states(idx)[0, -16:]
        parts = [p for p in idx.tensor_split([c.block_size // 2, c.block_size - 1], 1) if p.numel()]
        cached = torch.cat([model.hidden_states(part, cache=cache) for part in parts], 1)[0, -16:]
        logits, cached = (output_layer(x, *model.output_weights()).float().cpu()
                          for x in (h, cached))
    model.train(training)
    gap, scale = (logits - cached).abs().max(), logits.abs().max()
    if gap > 1e-3 * scale:
        raise ModelError(f"logits with a cache differ by {gap:.2g} from those without, of up to "
                         f"{scale:.2g}: tokens may meet only in attend, each attention of a layer "
                         "under its own name, and positions start after the cached tokens")
    return logits


def check_new(model, documents=False):
    """ModelError if a cache changes the logits of a new model or, with documents, the tokens of one
    document those of the next, whatever its parameters will be: what starts as a constant, such as
    zeros, is changed in a copy, since it would hide mistakes."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if (p == p.flatten()[0]).all():
                p.add_(torch.randn(p.shape, generator=generator).to(p) / 2)
    probe(twin)
    if documents:
        idx = probe_ids(model.config).to(next(model.parameters()).device)
        second = torch.arange(idx.size(1), device=idx.device) >= idx.size(1) // 2
        other = torch.where(second, idx, (idx + 1) % model.config.vocab_size)
        with torch.no_grad():
            h, changed = (twin.eval().hidden_states(x, docs=second.long()[None])[:, second]
                          for x in (idx, other))
        check((h - changed).abs().max() <= 1e-5 * h.abs().max(), "the tokens of a document change "
              "the hidden states of the next: with --doc_mask tokens may meet only in attend, or "
              "where ctx.docs says that they are of one document")


def restore_weights(model, saved, path):
    """Give the model the weights of a checkpoint that read_checkpoint has read, and check that it
    still gives the logits of when they were saved; ModelError, with what differs, if not."""
    load_weights(model, saved["model"], path)
    if saved["format"] > 1:
        check_probe(model, saved["probe"], path, [f.name for f in fields(GPTConfig)
                                                  if f.name not in saved["config"]])


def check_probe(model, saved, path, lacking=()):
    """Compare a model's logits with the probe saved beside its weights; ModelError if they
    differ. lacking: fields of GPTConfig that the file does not have."""
    if not saved.isfinite().all():
        raise ModelError(f"{path}: the model has diverged, its logits are not finite")
    found, scale = probe(model), saved.abs().max()
    gap = (found - saved.cpu()).abs().max() if found.shape == saved.shape else math.inf
    if not gap <= 5e-3 * scale:  # devices and backends differ by up to a thousandth
        raise ModelError(f"{path}: model.py has changed since: its logits differ by {gap:.2g} from "
                         f"those saved, of up to {scale:.2g}; use the model.py that made it, or "
                         "train a new one"
                         + f"; the file knows nothing of {', '.join(lacking)}" * bool(lacking))


def load_checkpoint(path, device="cpu", **overrides):
    """Read what train.py saved; returns (model, meta), the model in eval mode.

    meta holds everything but the tensors: config, step, tokens, tokenizer, data, args.
    overrides change fields of the config, e.g. nexus_order=2. attention is sdpa, however it was
    trained (the result is the same), unless overridden.
    Raises ModelError with the reason if the file is missing, damaged or not ours, or if it was
    trained with another model.py than this one.
    """
    saved = read_checkpoint(path, device)
    attention = overrides.pop("attention", "sdpa")
    config = make_config(saved["config"] | dict(attention=attention), path)
    model = build(config).to(device)
    restore_weights(model, saved, path)
    if overrides:
        other = build(make_config(asdict(config) | overrides, path)).to(device)
        model = load_weights(other, model.state_dict(), path)
    saved["config"] = asdict(config)
    return model.eval(), {key: value for key, value in saved.items()
                          if key not in ("model", "probe", "optimizers", "optimizer", "scaler")}


def check_size(config):
    """Raises ModelError for a typo that would exhaust the machine's memory."""
    size = config.n_embd * (12 * config.n_layer * config.n_embd + 2 * config.vocab_size
                            + config.block_size)
    if size > 1e12:
        raise ModelError("vocab_size, block_size, n_layer and n_embd make more than a trillion "
                         "numbers")


def make_config(values, path):
    """The GPTConfig of a checkpoint at path; ModelError if it is not ours, or absurdly large."""
    try:
        config = GPTConfig(**values)
    except TypeError as error:  # a field of another version
        raise ModelError(f"{path} has a config that is not ours: {error}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}; was it made with another model.py?") from error
    check_size(config)
    return config


def read_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint, tensors included. Only tensors and plain values are read: a
    file from elsewhere cannot run code. Errors as in load_checkpoint."""
    if not os.path.isfile(path):
        raise ModelError(f"no checkpoint at {path}: train.py writes one as OUT/ckpt.pt")
    try:
        with zipfile.ZipFile(path) as file:  # torch does not verify checksums
            if (part := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"checksum of {part}")
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can crash its parsers in any way
        raise ModelError(f"{path} is damaged, or not a checkpoint: it cannot be read as tensors "
                         f"and plain values ({type(error).__name__})") from error
    if not isinstance(saved, dict) or not {"model", "config", "step", "tokenizer"} <= saved.keys():
        raise ModelError(f"{path} is not a checkpoint of ours: it was not written by train.py")
    for name, kind in PARTS.items():
        if not isinstance(saved.get(name, kind()), kind):
            raise ModelError(f"{path} is damaged: its {name} is a {type(saved[name]).__name__}")
    return upgrade(saved, path)


def upgrade(saved, path):
    """A checkpoint in today's format. Format 1 has no logits to compare with, so a note says that
    it is taken for what its config says. ModelError for a format of a later version."""
    saved.setdefault("format", 1)
    if saved["format"] not in (1, FORMAT):
        raise ModelError(f"{path} has the format {saved['format']}, written by a later version; "
                         f"this one reads up to {FORMAT}")
    for values in (saved["config"], saved.get("args") or {}):
        if values.get("control") in ("separate", "tokens"):  # formerly controls
            values.update(control="", nexus_inner=values["control"])
    if saved["format"] == FORMAT and "probe" not in saved:
        raise ModelError(f"{path} is damaged: it lacks the logits to compare with")
    if saved["format"] == 1:
        saved["config"] = {"nexus_inner": "self"} | saved["config"]  # formerly the only one
        saved["config"].pop("checkpoint_attention", None)  # formerly a field
        print(f"note: {path} was written by an earlier version, which did not record changes of "
              "model.py nor controls without weights: it is taken for what its config says",
              file=sys.stderr)
    return saved


def newest_checkpoint(path):
    """read_checkpoint of the newest intact one of path, ckpt.1.pt, ...; prints a note if it is not
    the first. Raises ModelError, about the first, if there is none."""
    i, errors = 0, []
    while i == 0 or os.path.exists(older(path, i)):
        try:
            saved = read_checkpoint(older(path, i))
        except ModelError as error:
            errors.append(error)
            i += 1
            continue
        if errors:
            print(f"{errors[0]}; continuing from {older(path, i)}, step {saved['step']}",
                  file=sys.stderr)
        return saved
    raise errors[0]
