"""Text in, the same text out of the token files; bad sources leave nothing behind."""

import gzip
import json
import lzma
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data
import train
from nanonexus.cli import UserError
from nanonexus.data import Dataset
from nanonexus.hf import open_model
from nanonexus.tokenizer import EOT, get_tokenizer

BYTES = get_tokenizer("bytes")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command, out="set"):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *command.split(), "--out", out])
        prepare_data.main()

    return run


def parts(folder):
    """The documents of (train, val), each of them closed by its mark."""
    tokens = Dataset(folder, verify=True)
    texts = [BYTES.decode(part.tolist()).split(EOT) for part in (tokens.train, tokens.val)]
    assert [text.pop() for text in texts] == ["", ""]
    return texts


def many(n=20):
    return [f"Document {i}.\nIt has two lines, naïve 🙂.\n" for i in range(n)]


def write(path, docs):
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(f"{EOT}\n".join(docs))


def test_every_document_arrives(run):
    """In whole, from several files, packed or not, with their marks; on all cores as on one."""
    docs = many(21) + [f"A long one\n{'line of a document' * 3}\n" * 500]
    write("a.txt", docs[:15])
    with lzma.open("b.JSONL.xz", "wt") as f:
        f.writelines(json.dumps(dict(body=doc, n=1)) + "\n" for doc in docs[15:21])
    with gzip.open("c.txt.gz", "wt", encoding="utf-8") as f:
        f.write(docs[21])
    for workers in (1, 2):
        run(f"--dataset text --input [ab].* c.txt.gz --text_field body --workers {workers}",
            f"w{workers}")
    train, val = parts("w1")
    assert (train[:19], val[:2]) == (docs[:9] + docs[10:19] + [docs[20]], [docs[9], docs[19]])
    assert "".join(part + other for part, other in zip(train[19:], val[2:], strict=True)) \
        == docs[21]  # most of the text: in both parts
    metas = [Dataset(name).meta for name in ("w1", "w2")]
    assert metas[0] == metas[1] and metas[0]["source"] == "a.txt, b.JSONL.xz, c.txt.gz"
    assert metas[0]["tokens"]["val"] == sum(len(text.encode()) + 1 for text in val)


def test_a_text_that_is_cut_short_ends_there(run):
    write("a.txt", many(40))
    run("--dataset text --input a.txt --max_tokens 1503")
    train, val = parts("set")
    assert sum(len(text.encode()) + 1 for text in train + val) == 1503 and train[:9] == many(9)


@pytest.fixture
def hub(monkeypatch):
    """The hub's calls replaced. rows: what a set yields; calls: of load_dataset; configs: of the
    copy as parquet, if the set is one that only a script would make."""
    datasets = pytest.importorskip("datasets", reason="reading the hub needs datasets")
    import huggingface_hub

    def load_dataset(name, config=None, **kwargs):
        hub.calls.append((name, config, kwargs))
        if hub.configs and name != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported")
        return datasets.IterableDataset.from_generator(hub.rows)

    hub = SimpleNamespace(calls=[], configs=[])
    api = huggingface_hub.HfApi
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(api, "dataset_info", lambda *args, **kwargs: SimpleNamespace(sha="abc123"))
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "ls", lambda self, folder, detail: [
        f"{folder}/{name}" for name in hub.configs])
    return hub


def test_a_hub_set_is_streamed(run, hub, capsys):
    read = []

    def rows():
        for i in range(10**6):
            read.append(i)
            yield dict(text=many(1)[0], id=i)

    hub.rows = rows
    run("--dataset tinystories --max_tokens 1e4 --workers 1")
    tokens = Dataset("set", verify=True)
    assert len(tokens.train) + len(tokens.val) == 10_000 and len(read) < 2000  # not all of them
    assert tokens.meta["revision"] == "abc123" and tokens.meta["source"] == "roneneldan/TinyStories"
    assert hub.calls[0] == ("roneneldan/TinyStories", None,
                            dict(split="train", revision="abc123", streaming=True))
    with pytest.raises(UserError, match="has no field 'body' but text, id: choose with"):
        run("--dataset hf:roneneldan/TinyStories --text_field body", "other")
    hub.configs = ["default", "second"]  # a set that only a script would make
    with pytest.raises(UserError, match="'default', 'second'.*choose one with --config"):
        run("--dataset tinystories", "other")
    run("--dataset tinystories --config second --max_tokens 999", "other")
    assert hub.calls[-1][2]["data_files"] == ("hf://datasets/roneneldan/TinyStories@refs%2Fconvert"
                                              "%2Fparquet/second/train/*.parquet")
    assert "newest copy as Parquet, whatever the revision" in capsys.readouterr().err

    def lost():
        yield from [dict(text=text) for text in many()]
        raise type("Lost", (Exception,), {})("no route")  # neither an OSError nor a ValueError

    hub.rows, hub.configs = lost, []
    with pytest.raises(UserError, match="cannot read a/b from the hub .Lost: no route.; with no "
                       "network, use --dataset text --input"):
        run("--dataset hf:a/b", "lost")
    assert sorted(os.listdir()) == ["other", "set"]


def test_pydocs_and_max_tokens(run):
    for limit, out in (("", "a"), ("--max_tokens 1e5", "b")):
        run(limit, out)
    whole, part = Dataset("a"), Dataset("b")
    assert len(whole.train) + len(whole.val) > 400_000 == 4 * (len(part.train) + len(part.val))
    assert np.array_equal(part.train[:20_000], whole.train[:20_000])


def test_a_bpe_is_trained_on_the_training_part_alone_and_checkpoints_carry_it(run, monkeypatch,
                                                                              capsys):
    pytest.importorskip("tokenizers")
    docs = [f"Document {i}: {'qzqz' if i % 10 == 9 else 'xjxj'} and naïve 🙂.\n" for i in range(40)]
    write("a.txt", docs)
    run("--dataset text --input a.txt --tokenizer bpe:290")
    tokens = Dataset("set", verify=True)
    assert tokens.tokenizer == "bpe:290" and tokens.vocab_size == 320
    bpe = get_tokenizer(tokens.tokenizer, tokens.tokenizer_json)
    assert len(bpe.encode_ordinary(" xjxj")) == 1
    assert len(bpe.encode_ordinary("qzqz")) == 4  # it is in validation only
    texts = [bpe.decode(part.tolist()) for part in (tokens.train, tokens.val)]
    assert [text.count(EOT) for text in texts] == [36, 4]
    assert sorted("".join(texts).split(EOT)[:-1]) == sorted(docs)
    assert (tokens.train == tokens.eot).sum() == 36

    flags = "--n_layer 1 --n_embd 32 --n_head 2 --block_size 16 --batch_tokens 64 --micro_batch 4"
    train.main([*"--dataset set --out run --max_steps 1 --device cpu".split(), *flags.split()])
    assert "no sample" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        shutil.rmtree("set")
        patch.setitem(sys.modules, "tokenizers", None)  # and needs no package but tiktoken
        model, own, meta = open_model("run/ckpt.pt")
    assert (meta["tokenizer"], meta["tokenizer_json"]) == ("bpe:290", tokens.tokenizer_json)
    assert model.config.vocab_size == 320 and own.decode(own.encode(docs[0])) == docs[0]

    monkeypatch.setattr(prepare_data, "BPE_TEXT", 100)  # reached in the fourth document
    assert len(list(prepare_data.training_text(docs, 0.1, 10**9))) == 4


def test_wikitext_lines_become_articles():
    lines = ["", " = One = \n", " text\n", " = = Part = = \n", " more\n", " = Two = \n", " end\n"]
    assert list(prepare_data.articles(lines)) == ["", "".join(lines[1:5]), "".join(lines[5:])]


@pytest.mark.parametrize("command, message", [
    ("--dataset shakespear", "did you mean shakespeare"), ("--input empty.txt", "goes with"),
    ("--dataset text", "needs --input"), ("--dataset text --input none*.txt", "no file matches"),
    ("--dataset text --input empty.txt", "too few"), ("--tokenizer bpe:12", "bpe:12: N must be"),
    ("--dataset text --input a.txt latin.txt", "latin.txt cannot be read as UTF-8"),
    ("--dataset text --input rows.jsonl --text_field body", "rows.jsonl has no field 'body'"),
    ("--dataset text --input null.jsonl", "2 tokens, too few.*; 1 rows without text"),
    ("--dataset text --input empty.txt --text_field body", "files of rows"),
    ("--text_field body", "files of rows"), ("--config en", "go with a dataset on the hub"),
    ("--tokenizer words", "bytes or gpt2"), ("--val_fraction 0", "val_fraction")])
def test_bad_input_is_one_line_before_the_work_and_leaves_nothing(run, monkeypatch, command,
                                                                  message):
    for name, docs in (("a.txt", many()), ("empty.txt", []), ("rows.jsonl", ['{"txt": "b"}']),
                       ("null.jsonl", ['{"text": null}\n{"text": "a"}\n'])):
        write(name, docs)
    with open("latin.txt", "wb") as f:
        f.write("naïve".encode("latin-1"))
    before = sorted(os.listdir())
    if "few" not in message and "has no field" not in message:
        monkeypatch.setattr(prepare_data, "pieces", None)
    with pytest.raises(UserError, match=message):
        run(command)
    assert sorted(os.listdir()) == before
