"""Text in, the same text out of the token files; bad sources leave nothing behind."""

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import prepare_data
import train
from nanonexus.cli import UserError
from nanonexus.data import TokenSet
from nanonexus.hf import open_model
from nanonexus.tokenizer import EOT, get_tokenizer

BYTES = get_tokenizer("bytes")


def run(*argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, argv)])
    prepare_data.main()


def documents(folder):
    """All documents of a token set, in any order."""
    tokens = TokenSet(folder, verify=True)
    text = "".join(BYTES.decode(part.tolist()) for part in (tokens.train, tokens.val))
    assert text.endswith(EOT)
    return sorted(text.split(EOT)[:-1])


def many(n=20):
    return [f"Document {i}.\nIt has two lines, naïve 🙂.\n" for i in range(n)]


def write(path, docs):
    text = f"{EOT}\n".join(docs)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(dict(body=doc, n=1)) + "\n" for doc in docs)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as f:
        f.write(text)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".jsonl"])
def test_every_document_arrives(tmp_path, monkeypatch, suffix):
    write(tmp_path / f"a{suffix}", many(15))
    write(tmp_path / f"b{suffix}", many(22)[15:])
    run("--dataset", "text", "--input", tmp_path / f"*{suffix}", "--out", tmp_path / "set",
        "--text_field", "body", "--workers", 1, monkeypatch=monkeypatch)
    assert documents(tmp_path / "set") == sorted(many(22))
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    assert meta["tokens"]["val"] == sum(len(many()[i].encode()) + 1 for i in (9, 19))
    assert meta["source"] == f"a{suffix}, b{suffix}"


def test_all_cores_give_what_one_gives(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", many(300))
    for workers in (1, 2):
        run("--dataset", "text", "--input", tmp_path / "a.txt", "--out", tmp_path / f"w{workers}",
            "--workers", workers, monkeypatch=monkeypatch)
    hashes = [json.loads((tmp_path / f"w{w}/meta.json").read_text())["sha256"] for w in (1, 2)]
    assert hashes[0] == hashes[1]


def test_a_long_document_is_cut_without_loss(tmp_path):
    texts = ["line of words\n" * 5000, "x" * 50_000, "short"]
    cut = list(prepare_data.pieces(texts))
    assert "".join(text + EOT * ends for text, ends in cut) == "".join(t + EOT for t in texts)
    assert max(len(text) for text, _ in cut) <= 2 * prepare_data.PIECE


def test_only_the_end_of_a_document_is_marked(tmp_path, monkeypatch):
    docs = ["a line of words\n" * 3000, *many(12)]  # the first is tokenised in several pieces
    write(tmp_path / "a.txt", docs)
    run("--dataset", "text", "--input", tmp_path / "a.txt", "--out", tmp_path / "set",
        "--workers", 1, monkeypatch=monkeypatch)
    assert documents(tmp_path / "set") == sorted(docs)


@pytest.mark.parametrize("script", [False, True])
def test_a_hub_set_is_streamed(tmp_path, monkeypatch, script):
    """With the hub's two calls replaced: a set in files, and one that only a script would make."""
    import datasets
    import huggingface_hub

    calls, read = [], []

    def load_dataset(name, config=None, **kwargs):
        calls.append((name, config, kwargs))
        if script and name != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported")

        def rows():
            for i in range(10**6):
                read.append(i)
                yield dict(text=many(1)[0], id=i)

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info",
                        lambda self, name, revision=None: type("Info", (), dict(sha="abc123")))
    run("--dataset", "tinystories", "--max_tokens", "1e5", "--out", tmp_path / "set", "--workers",
        1, monkeypatch=monkeypatch)
    tokens = TokenSet(tmp_path / "set", verify=True)
    assert len(tokens.train) + len(tokens.val) == 100_000 and len(read) < 4000  # not all of them
    assert tokens.meta["revision"] == "abc123" and tokens.meta["source"] == "roneneldan/TinyStories"
    assert calls[0] == ("roneneldan/TinyStories", None,
                        dict(split="train", revision="abc123", streaming=True))
    if script:
        assert calls[1][2]["data_files"].startswith(
            "hf://datasets/roneneldan/TinyStories@refs%2Fconvert%2Fparquet/")
    with pytest.raises(UserError, match="has no field 'body' but text, id: choose with"):
        run("--dataset", "hf:roneneldan/TinyStories", "--text_field", "body", "--out",
            tmp_path / "other", monkeypatch=monkeypatch)


def test_pydocs_and_max_tokens(tmp_path, monkeypatch):
    run("--out", tmp_path / "a", monkeypatch=monkeypatch)
    whole = TokenSet(tmp_path / "a")
    assert len(whole.train) + len(whole.val) > 400_000
    assert "assert" in BYTES.decode(whole.train[:2000].tolist())
    run("--out", tmp_path / "b", "--max_tokens", "1e5", monkeypatch=monkeypatch)
    part = TokenSet(tmp_path / "b")
    assert len(part.train) + len(part.val) == 100_000
    assert np.array_equal(part.train, whole.train[:len(part.train)])


def test_a_bpe_is_trained_on_the_training_part_alone(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    docs = [f"Document {i}: {'qzqz' if i % 10 == 9 else 'xjxj'} and naïve 🙂.\n" for i in range(40)]
    write(tmp_path / "a.txt", docs)
    for workers in (1, 2):
        run("--dataset", "text", "--input", tmp_path / "a.txt", "--out", tmp_path / f"w{workers}",
            "--tokenizer", "bpe:290", "--workers", workers, monkeypatch=monkeypatch)
    tokens, other = (TokenSet(tmp_path / f"w{workers}", verify=True) for workers in (1, 2))
    assert tokens.meta == other.meta and tokens.tokenizer_json == other.tokenizer_json
    assert tokens.tokenizer == "bpe:290" and tokens.vocab_size == 320
    bpe = get_tokenizer(tokens.tokenizer, tokens.tokenizer_json)
    assert bpe.encode_ordinary(" xjxj")[0] > 255 and len(bpe.encode_ordinary(" xjxj")) == 1
    assert len(bpe.encode_ordinary("qzqz")) == 4  # it is in validation only
    texts = [bpe.decode(part.tolist()) for part in (tokens.train, tokens.val)]
    assert [text.count(EOT) for text in texts] == [36, 4]
    assert sorted("".join(texts).split(EOT)[:-1]) == sorted(docs)
    assert (tokens.train == tokens.eot).sum() == 36

    monkeypatch.setattr(prepare_data, "BPE_TEXT", 100)  # reached in the fourth document
    run("--dataset", "text", "--input", tmp_path / "a.txt", "--out", tmp_path / "short",
        "--tokenizer", "bpe:2000", "--workers", 1, monkeypatch=monkeypatch)
    short = TokenSet(tmp_path / "short").tokenizer_json
    assert len(list(prepare_data.training_text(docs, 10))) == 4
    assert get_tokenizer("bpe:2000", short).n_vocab < 320


def test_a_checkpoint_carries_the_tokenizer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    write(tmp_path / "a.txt", many(60))
    run("--dataset", "text", "--input", tmp_path / "a.txt", "--out", tmp_path / "set",
        "--tokenizer", "bpe:300", "--workers", 1, monkeypatch=monkeypatch)
    flags = "--n_layer 1 --n_embd 32 --n_head 2 --block_size 16 --batch_tokens 64 --micro_batch 4"
    train.main(["--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "run"), "--max_steps",
                "2", "--device", "cpu", *flags.split()])
    assert "no sample" not in capsys.readouterr().out
    source = (tmp_path / "set" / "tokenizer.json").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # and needs no package but tiktoken
    model, tokenizer, meta = open_model(tmp_path / "run" / "ckpt.pt")
    assert (meta["tokenizer"], meta["tokenizer_json"]) == ("bpe:300", source)
    assert model.config.vocab_size == 320 and tokenizer.decode(tokenizer.encode("naïve 🙂")) \
        == "naïve 🙂"


def test_wikitext_lines_become_articles():
    lines = ["", " = One = \n", " text\n", " = = Part = = \n", " more\n", " = Two = \n", " end\n"]
    assert list(prepare_data.articles(lines)) == ["", "".join(lines[1:5]), "".join(lines[5:])]


@pytest.mark.parametrize("argv, message", [
    (["--dataset", "shakespear"], "did you mean shakespeare"),
    (["--dataset", "zzz"], "choose pydocs, text"),
    (["--dataset", "text"], "needs --input"),
    (["--dataset", "text", "--input", "{}/none*.txt"], "no file matches"),
    (["--dataset", "text", "--input", "{}/empty.txt"], "too few"),
    (["--dataset", "text", "--input", "{}/latin.txt"], "latin.txt cannot be read as UTF-8"),
    (["--dataset", "text", "--input", "{}/cut.txt.xz"], "cut.txt.xz cannot be read"),
    (["--dataset", "text", "--input", "{}/rows.jsonl"], "rows.jsonl, line 2: no JSON object with"),
    (["--input", "{}/empty.txt"], "goes with --dataset text"),
    (["--tokenizer", "words"], "choose bytes or gpt2"),
    (["--tokenizer", "bpe:12"], "bpe:12: N must be a whole number from 258"),
    (["--dataset", "text", "--input", "{}/empty.txt", "--tokenizer", "bpe:300"], "too few"),
    (["--val_fraction", "0"], "val_fraction"), (["--max_tokens", "0"], "max_tokens"),
    (["--max_tokens", "many"], "max_tokens"), (["--dateset", "x"], "--dateset"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, argv, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(os.urandom(5000))[:3000])
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        run(*[a.format(tmp_path) for a in argv], "--out", tmp_path / "set", monkeypatch=monkeypatch)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_existing_folder_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        run("--out", tmp_path, monkeypatch=monkeypatch)
    assert (tmp_path / "mine").read_text() == "precious"


def test_hub_without_network_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = subprocess.run([sys.executable, prepare_data.__file__, "--dataset", "tinystories",
                           "--out", str(tmp_path / "set")], capture_output=True, text=True)
    assert code.returncode == 2 and code.stderr.count("\n") == 1
    assert "from the hub" in code.stderr and "--dataset text --input" in code.stderr
    assert not os.listdir(tmp_path)


def test_killed_preparation_leaves_no_token_set(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", many(200_000))
    process = subprocess.Popen([sys.executable, prepare_data.__file__, "--dataset", "text",
                                "--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "set"),
                                "--workers", "1"])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set.partial/train.bin")):  # until it is well under way
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match="no token set"):
        TokenSet(tmp_path / "set")
    run("--out", tmp_path / "set", "--max_tokens", 50_000, monkeypatch=monkeypatch)
    assert os.listdir(tmp_path / "set") and not (tmp_path / "set.partial").exists()
