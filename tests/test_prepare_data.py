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


def parts(folder):
    """The documents of (train, val), each of them closed by its mark."""
    tokens = TokenSet(folder, verify=True)
    texts = [BYTES.decode(part.tolist()).split(EOT) for part in (tokens.train, tokens.val)]
    assert [text.pop() for text in texts] == ["", ""]
    return texts


def many(n=20):
    return [f"Document {i}.\nIt has two lines, naïve 🙂.\n" for i in range(n)]


def write(path, docs):
    text = f"{EOT}\n".join(docs)
    if "jsonl" in path.name.lower():
        text = "".join(json.dumps(dict(body=doc, n=1)) + "\n" for doc in docs)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as f:
        f.write(text)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".JSONL.xz"])
def test_every_document_arrives(tmp_path, monkeypatch, suffix):
    write(tmp_path / f"a{suffix}", many(15))
    write(tmp_path / f"b{suffix}", many(22)[15:])
    run("--dataset", "text", "--input", tmp_path / f"*{suffix}", "--out", tmp_path / "set",
        *["--text_field", "body"] * ("JSONL" in suffix), "--workers", 1, monkeypatch=monkeypatch)
    docs = many(22)
    assert parts(tmp_path / "set") == [docs[:9] + docs[10:19] + docs[20:], [docs[9], docs[19]]]
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


def test_every_document_ends_with_its_mark(tmp_path, monkeypatch):
    """Documents of three pieces are whole in one part; a long one and few are closed in both."""
    docs = [f"Doc {i}\n" + f"line of document {i}\n" * 1000 for i in range(40)]
    write(tmp_path / "many.txt", docs)
    write(tmp_path / "long.txt", [*many(11), "a line of words\n" * 9000])
    write(tmp_path / "one.txt", ["word " * 1680])  # 8,400 characters, no line end
    for name in ("many", "long", "one"):
        run("--dataset", "text", "--input", tmp_path / f"{name}.txt", "--out", tmp_path / name,
            "--workers", 2, monkeypatch=monkeypatch)
    assert parts(tmp_path / "many") == [[d for d in docs if d not in docs[9::10]], docs[9::10]]
    train, val = parts(tmp_path / "long")
    assert "".join(train[-2:-1] + val[1:2] + train[-1:] + val[2:]) == "a line of words\n" * 9000
    assert train[:-2] + val[:1] == [*many(9), many(11)[10], many(10)[9]]
    [train], [val] = parts(tmp_path / "one")
    assert train + val == "word " * 1680 and 800 < len(val) < 900


def test_a_text_that_is_cut_short_ends_there(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", many(40))
    for limit in (1500, 1501, 503):
        run("--dataset", "text", "--input", tmp_path / "a.txt", "--max_tokens", limit, "--out",
            tmp_path / f"{limit}", monkeypatch=monkeypatch)
        train, val = parts(tmp_path / f"{limit}")
        assert sum(len(text.encode()) + 1 for text in train + val) == limit
        assert train[:9] == many(9) or limit == 503


@pytest.mark.parametrize("script", [False, True])
def test_a_hub_set_is_streamed(tmp_path, monkeypatch, script):
    """With the hub's two calls replaced: a set in files, and one that only a script would make."""
    datasets = pytest.importorskip("datasets", reason="reading the hub needs datasets")
    import huggingface_hub

    calls, read, configs = [], [], ["default"]

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
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "ls",
                        lambda self, folder, detail: [f"{folder}/{name}" for name in configs])
    run("--dataset", "tinystories", "--max_tokens", "1e5", "--out", tmp_path / "set", "--workers",
        1, monkeypatch=monkeypatch)
    tokens = TokenSet(tmp_path / "set", verify=True)
    assert len(tokens.train) + len(tokens.val) == 100_000 and len(read) < 4000  # not all of them
    assert tokens.meta["revision"] == "abc123" and tokens.meta["source"] == "roneneldan/TinyStories"
    assert calls[0] == ("roneneldan/TinyStories", None,
                        dict(split="train", revision="abc123", streaming=True))
    if script:
        assert calls[1][2]["data_files"] == ("hf://datasets/roneneldan/TinyStories@refs%2Fconvert"
                                             "%2Fparquet/default/train/*.parquet")
        configs.append("second")
        with pytest.raises(UserError, match="'default', 'second'.*choose one with --config"):
            run("--dataset", "tinystories", "--out", tmp_path / "x", monkeypatch=monkeypatch)
        run("--dataset", "tinystories", "--out", tmp_path / "x", "--config", "second",
            "--max_tokens", 999, monkeypatch=monkeypatch)
        assert calls[-1][2]["data_files"].endswith("%2Fparquet/second/train/*.parquet")
        del configs[1]
    with pytest.raises(UserError, match="has no field 'body' but text, id: choose with"):
        run("--dataset", "hf:roneneldan/TinyStories", "--text_field", "body", "--out",
            tmp_path / "other", monkeypatch=monkeypatch)


def test_a_connection_lost_in_the_middle_is_one_line(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    class Lost(Exception):  # like those of the libraries: neither an OSError nor a ValueError
        pass

    def rows():
        yield from [dict(text=text) for text in many()]
        raise Lost("no route")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs:
                        datasets.IterableDataset.from_generator(rows))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info",
                        lambda self, name, revision=None: type("Info", (), dict(sha="abc123")))
    with pytest.raises(UserError, match="cannot read a/b from the hub .Lost: no route.; with no"):
        run("--dataset", "hf:a/b", "--out", tmp_path / "set", monkeypatch=monkeypatch)
    assert not os.listdir(tmp_path)


def test_a_hub_set_with_several_configurations(tmp_path, monkeypatch):
    """A folder in the place of the set: the library reads both alike."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info",
                        lambda self, name, revision=None: type("Info", (), dict(sha=None)))
    monkeypatch.chdir(tmp_path)
    os.mkdir("multi")
    for name, text in (("en", "the text"), ("de", "der Text")):
        rows = [dict(text=f"{text} {i}") for i in range(20)] + [dict(text=None)]
        with open(f"multi/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    with open("multi/README.md", "w") as f:
        f.write("---\nconfigs:\n" + "".join(
            f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("en", "de")) + "---\n")
    for config, message in ((["--config", "fr"], "'fr' not found"), ([], "onfig name is missing")):
        with pytest.raises(UserError, match=f"{message}.*'en', 'de'.*choose one with --config"):
            run("--dataset", "hf:multi", "--out", "set", *config, monkeypatch=monkeypatch)
    run("--dataset", "hf:multi", "--config", "de", "--out", "set", monkeypatch=monkeypatch)
    train, val = parts("set")
    assert len(train) == 19 and val == ["der Text 9"]


def test_pydocs_and_max_tokens(tmp_path, monkeypatch):
    run("--out", tmp_path / "a", monkeypatch=monkeypatch)
    whole = TokenSet(tmp_path / "a")
    assert len(whole.train) + len(whole.val) > 400_000
    assert "assert" in BYTES.decode(whole.train[:2000].tolist())
    run("--out", tmp_path / "b", "--max_tokens", "1e5", monkeypatch=monkeypatch)
    part = TokenSet(tmp_path / "b")
    assert len(part.train) + len(part.val) == 100_000
    assert np.array_equal(part.train[:20_000], whole.train[:20_000])


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
    assert len(list(prepare_data.training_text(docs, 0.1, 10**9))) == 4
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
    (["--dataset", "text", "--input", "{}/rows.jsonl", "--text_field", "body"],
     "rows.jsonl has no field 'body' but txt: choose with --text_field"),
    (["--dataset", "text", "--input", "{}/null.jsonl"], "2 tokens, too few.*; 1 rows without text"),
    (["--dataset", "text", "--input", "{}/empty.txt", "{}/a.tar.gz"], "a.tar.gz: cannot read .tar"),
    (["--dataset", "text", "--input", "{}/empty.txt", "--text_field", "body"], "files of rows"),
    (["--text_field", "body"], "files of rows"),
    (["--config", "en"], "go with a dataset on the hub"),
    (["--dataset", "text", "--input", "{}/empty.txt", "--revision", "main"], "go with a dataset"),
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
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"text" * 1000))
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        run(*[a.format(tmp_path) for a in argv], "--out", tmp_path / "set", monkeypatch=monkeypatch)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_bad_file_is_found_before_the_work(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", many())
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    monkeypatch.setattr(prepare_data, "pieces", None)
    with pytest.raises(UserError, match="b.txt cannot be read as UTF-8 text"):
        run("--dataset", "text", "--input", tmp_path / "a.txt", tmp_path / "b.txt", "--out",
            tmp_path / "set", monkeypatch=monkeypatch)


def test_an_existing_folder_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        run("--out", tmp_path, monkeypatch=monkeypatch)
    assert (tmp_path / "mine").read_text() == "precious"


def test_hub_without_network_names_both_ways(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="reading the hub needs datasets")
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
