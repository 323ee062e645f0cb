"""The data order; a dataset is checked on opening."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from nanonexus import data
from nanonexus.cli import UserError
from nanonexus.data import Dataset, count_sequences, read_sequences, train_indices, val_indices
from nanonexus.files import sha256


@pytest.fixture
def folder(tmp_path):
    """A complete dataset: ids 0 to 99 to train on, ten of them to validate."""
    for split, ids in (("train", range(100)), ("val", range(10))):
        np.array(ids, np.uint16).tofile(tmp_path / f"{split}.bin")
    meta = dict(version=1, dtype="uint16", tokens=dict(train=100, val=10), tokenizer="bytes",
                vocab_size=320, dataset="x", source="x", revision=None,
                sha256={s: sha256(tmp_path / f"{s}.bin") for s in ("train", "val")})
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def change(folder, **fields):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_windows_predict_every_token_but_the_first_once():
    tokens = np.arange(101, dtype=np.uint16)
    n = count_sequences(tokens, 10)
    rows = read_sequences(tokens, 10, range(n))
    x, y = rows[:, :-1], rows[:, 1:]
    assert n == 10 and x.shape == (10, 10) and x.dtype == np.int64
    assert (y == x + 1).all() and y.flatten().tolist() == list(range(1, 101))
    with pytest.raises(UserError, match="10 tokens are fewer than one sequence of 10"):
        count_sequences(tokens[:10], 10)


def test_order_is_a_pure_function_of_seed_and_step():
    first = [train_indices(50, 3, step, 8) for step in range(20)]
    data.epoch_order.cache_clear()
    assert [train_indices(50, 3, step, 8) for step in reversed(range(20))] == first[::-1]
    assert [train_indices(50, 4, step, 8) for step in range(20)] != first
    epochs = np.array(first).flatten()[:150].reshape(3, 50)
    assert (np.sort(epochs) == range(50)).all()  # every window once
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_ranks_share_the_batch_of_one_process():
    world = 4
    for step in range(20):
        whole = train_indices(50, 0, step, 8)
        parts = [train_indices(50, 0, step, 8, rank, world) for rank in range(world)]
        assert [i for part in parts for i in part] == whole
    parts = [val_indices(50, 20, rank, world) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == val_indices(50, 20)
    assert val_indices(50, 5) == [0, 10, 20, 30, 40] and val_indices(3, 100) == [0, 1, 2]


def test_a_set_with_its_own_tokenizer_needs_no_package_to_train(folder, monkeypatch):
    for package in ("tiktoken", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert (Dataset(folder).eot, Dataset(folder).tokenizer_json) == (256, None)
    own, sums = folder / "tokenizer.json", Dataset(folder).meta["sha256"]
    added = [dict(id=7, content="<|pad|>"), dict(id=299, content="<|endoftext|>")]
    for tokens in added, added[:1]:
        own.write_text(json.dumps(dict(added_tokens=tokens)))
        change(folder, tokenizer="bpe:300", sha256=sums | dict(tokenizer=sha256(own)))
        assert Dataset(folder).tokenizer_json == own.read_text()
        assert tokens != added or Dataset(folder).eot == 299
    with pytest.raises(UserError, match="is damaged, or of another kind.*it has no"):
        Dataset(folder).eot  # noqa: B018
    own.write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is missing or was changed"):
        Dataset(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "meta.json").unlink(), "no dataset in"),
    (lambda f: (f / "meta.json").write_text('{"version": 1, '), "meta.json is damaged"),
    (lambda f: change(f, version=2), "version 2, this code reads 1"),
    (lambda f: change(f, tokenizer=["bytes"]), "another kind .TypeError: the tokenizer"),
    (lambda f: change(f, sha256=dict(train=1, val=2)), "meta.json is damaged"),
    (lambda f: change(f, vocab_size=50), "holds the id 99, beyond its vocabulary of 50"),
    (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    (lambda f: (f / "train.bin").write_bytes(b"\0" * 199), "has 199 bytes, meta.json says 200"),
    (lambda f: (change(f, tokens=dict(train=100, val=0)), (f / "val.bin").write_bytes(b"")),
     "has no tokens"),
])
def test_damaged_sets_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Dataset(folder)
    assert "\n" not in str(caught.value)


def test_verify_finds_a_flipped_byte(folder):
    assert len(Dataset(folder, verify=True).fingerprint) == 32
    np.arange(100, dtype=np.uint16)[::-1].tofile(folder / "train.bin")
    Dataset(folder)  # the size is right: not noticed without reading it all
    with pytest.raises(UserError, match="does not have the sha256"):
        Dataset(folder, verify=True)


def test_the_embedded_text_is_prepared_once(folder, tmp_path, monkeypatch):
    assert data.pydocs(str(folder)) == str(folder)  # it is there
    half = tmp_path / "half"
    half.mkdir()

    def run(argv, **kwargs):
        if faster:  # another process has just made it
            shutil.copy(folder / "meta.json", half)
        return subprocess.CompletedProcess(argv, 2, stderr="notes\nx.py: error: it is not empty\n")

    monkeypatch.setattr(subprocess, "run", run)
    faster = False
    with pytest.raises(UserError, match="could not prepare .*half: it is not empty$"):
        data.pydocs(str(half))
    faster = True
    assert data.pydocs(str(half)) == str(half)
