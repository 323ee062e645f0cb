"""
The format of datasets, and which sequences make up which batch.

A dataset is a folder: train.bin and val.bin hold nothing but token ids, meta.json describes them,
and tokenizer.json is there if the dataset has its own tokenizer (bpe:N). Training reads sequences
of block_size + 1 tokens; their order is a pure function of the seed and the step, so a run resumes
exactly and sees the same batches on one process or on many.
"""

import functools
import os
import subprocess
import sys
import textwrap

import numpy as np
import torch

from nanonexus.cli import UserError
from nanonexus.files import read_json, reading, sha256
from nanonexus.tokenizer import eot_id

VERSION = 1  # of the dataset format
SCAN = 1 << 25  # ids checked on opening a file (all of them, in such pieces, to verify it)


def load_hub(name, config, split, revision=None, streaming=False):
    """The rows of a dataset on the hub; if a script makes it, which `datasets` no longer runs, the
    copy that the hub keeps as parquet. Raises UserError if it is not available."""
    import datasets
    from huggingface_hub import HfFileSystem

    try:
        try:
            return datasets.load_dataset(name, config, split=split, revision=revision,
                                         streaming=streaming)
        except RuntimeError:
            folder = f"hf://datasets/{name}@refs%2Fconvert%2Fparquet"
            configs = [config] if config else [
                os.path.basename(path) for path in HfFileSystem().ls(folder, detail=False)]
            if len(configs) > 1:
                raise ValueError(f"Config name is missing: choose from {configs}") from None
            print(f"note: a script makes {name}, and scripts are not run: this reads the hub's "
                  "newest copy as Parquet, whatever the revision", file=sys.stderr)
            return datasets.load_dataset(
                "parquet", data_files=f"{folder}/{configs[0]}/{split}/*.parquet", split="train",
                streaming=streaming)
    except Exception as error:  # offline, unknown, gated, ...: the libraries' errors have no base
        reason = textwrap.shorten(str(error).split("\nExample")[0], 500)
        raise UserError(f"cannot read {name} from the hub ({type(error).__name__}: {reason})"
                        ) from error


def pydocs(folder):
    """The folder of the dataset made of the embedded text, in bytes, which is prepared if it is
    missing. UserError if that fails."""
    def missing():
        return not os.path.exists(os.path.join(folder, "meta.json"))

    if missing():
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        done = subprocess.run([sys.executable, os.path.join(root, "prepare_data.py"), "--dataset",
                               "pydocs", "--out", folder], stderr=subprocess.PIPE, text=True,
                              errors="replace")
        if done.returncode and missing():  # else another process was faster
            *_, last = done.stderr.splitlines() or [f"status {done.returncode}"]
            raise UserError(f"could not prepare {folder}: {last.partition('error: ')[2] or last}")
    return folder


class Dataset:
    """The folder that prepare_data.py wrote, checked on opening.

    .train and .val are read-only arrays of ids mapped from disk, .meta is meta.json as a dict,
    .tokenizer_json the text of tokenizer.json, or None for a tokenizer that every machine has.
    verify: read both files in full, to check their sha256 and ids.
    Raises UserError, saying what is wrong and where, if the folder is not a complete dataset.
    """

    def __init__(self, folder, verify=False):
        self.folder = folder
        path = os.path.join(folder, "meta.json")
        if not os.path.isfile(path):
            raise UserError(f"no dataset in {folder} (no meta.json): make one with "
                            f"python prepare_data.py --out {folder}")
        with reading(path, "prepare the dataset again"):
            self.meta = read_json(path, "prepare the dataset again")
            found, _ = self.meta["version"], self.meta["dataset"]
            if found != VERSION:
                raise UserError(f"{folder} has dataset version {found}, this code reads "
                                f"{VERSION}: prepare it again")
            self.tokenizer = self.meta["tokenizer"]
            if not isinstance(self.tokenizer, str) or not self.fingerprint:
                raise TypeError("the tokenizer is not a name")
            dtype = {"uint16": np.uint16, "uint32": np.uint32}[self.meta["dtype"]]
            self.vocab_size = int(self.meta["vocab_size"])
            self.tokenizer_json = self._own_tokenizer()
            for split in ("train", "val"):
                setattr(self, split, self._open(split, dtype, verify))

    def _open(self, split, dtype, verify):
        path = os.path.join(self.folder, f"{split}.bin")
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: prepare the dataset again")
        expect = self.meta["tokens"][split] * np.dtype(dtype).itemsize
        if os.path.getsize(path) != expect:
            raise UserError(f"{path} has {os.path.getsize(path)} bytes, meta.json says {expect}: "
                            "it is truncated or from another set; prepare it again")
        if verify and sha256(path) != self.meta["sha256"][split]:
            raise UserError(f"{path} does not have the sha256 in meta.json: it was changed")
        if expect == 0:
            raise UserError(f"{path} has no tokens")
        tokens = np.memmap(path, dtype=dtype, mode="r")
        for start in range(0, len(tokens) if verify else 1, SCAN):
            if (top := int(tokens[start:start + SCAN].max())) >= self.vocab_size:
                raise UserError(f"{path} holds the id {top}, beyond its vocabulary of "
                                f"{self.vocab_size}: prepare it again")
        return tokens

    def _own_tokenizer(self):
        path = os.path.join(self.folder, "tokenizer.json")
        if "tokenizer" not in self.meta["sha256"]:
            return None
        if not os.path.isfile(path) or sha256(path) != self.meta["sha256"]["tokenizer"]:
            raise UserError(f"{path} is missing or was changed: prepare the dataset again")
        with open(path, encoding="utf-8") as f:
            return f.read()

    def load(self, split, block_size, indices, device):
        """Sequences `indices` of "train" or "val" as int64 tensors (len(indices), block_size) on
        the device: inputs, and the tokens after them. UserError if one is beyond the vocabulary."""
        rows = torch.from_numpy(read_sequences(getattr(self, split), block_size, indices))
        if (top := int(rows.max())) >= self.vocab_size:  # opening a set checks its beginning
            raise UserError(f"{self.folder} holds the id {top}, beyond the vocabulary of "
                            f"{self.vocab_size}: prepare it again")
        if device.type == "cuda":  # pinned, the copy runs while the device computes
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)  # one copy, split there
        return rows[:, :-1], rows[:, 1:]

    @property
    def fingerprint(self):
        """Identifies this set, for a checkpoint to compare on resume."""
        return "".join([self.meta["sha256"]["train"][:16], self.meta["sha256"]["val"][:16]])

    @functools.cached_property
    def eot(self):
        """The id after each document: known here, so that training needs no tokenizer files."""
        if self.tokenizer_json:
            return eot_id(self.tokenizer_json)
        known = {"bytes": 256, "gpt2": 50256}
        if self.tokenizer not in known:
            raise UserError(f"{self.folder} has the tokenizer {self.tokenizer!r}: choose from "
                            f"{', '.join(known)}")
        return known[self.tokenizer]


@functools.lru_cache(maxsize=2)  # an epoch and the next
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def count_sequences(tokens, block_size):
    """How many sequences there are: sequence i is tokens[i * T : i * T + T + 1], so each token but
    the first is predicted once. Raises UserError if there is not even one."""
    n = (len(tokens) - 1) // block_size
    if n < 1:
        raise UserError(f"{len(tokens)} tokens are fewer than one sequence of {block_size} + 1: "
                        "use more text or a smaller --block_size")
    return n


def read_sequences(tokens, block_size, indices):
    """Sequences `indices` as one int64 array (len(indices), T + 1)."""
    rows = np.stack([tokens[i * block_size:(i + 1) * block_size + 1] for i in indices])
    return rows.astype(np.int64)


def split(items, size):
    """The items in lists of at most this size."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def train_indices(n, seed, step, batch_size, rank=0, world=1):
    """Which of n sequences this rank reads at this step: its slice of the global batch.

    Every epoch is a new permutation of all sequences, drawn globally and then cut by rank: none
    twice in an epoch, none in two ranks, and the same global batch for any number of ranks.
    """
    share = batch_size // world
    first = step * batch_size + rank * share
    return [int(epoch_order(seed, g // n, n)[g % n]) for g in range(first, first + share)]


def val_indices(n, count, rank=0, world=1):
    """A fixed list of validation sequences, spread evenly over the file; this rank's part of it."""
    count = min(n, count)
    return [i * n // count for i in range(count)][rank::world]
