"""The user's text, in every kind of file, reads alike for prepare_data, finetune and eval_sciq."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
from functools import partial

import pytest

from nanonexus.cli import UserError
from nanonexus.tasks import read_task
from nanonexus.text import PLAIN, READERS, TABLES, UNPACK, check, find, read_files, rows
from nanonexus.tokenizer import EOT

pyarrow = pytest.importorskip("pyarrow")
# mtime: the bytes are in the tests' names, which must be the same in each process
PACK = {"": bytes, ".gz": partial(gzip.compress, mtime=0), ".bz2": bz2.compress,
        ".xz": lzma.compress, ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}
TEXTS = ["One,\n\"two\" naïve 🙂.\n", "three\n", "four\n" * 20_000]


def encode(suffix, texts, field="text"):
    """The bytes of a file with this suffix."""
    table = [{"n": i, field: text} for i, text in enumerate(texts)]
    if suffix in PLAIN:
        return f"{EOT}\n".join(texts).encode()
    if suffix == ".json":
        return json.dumps(table, indent=1).encode()
    if suffix == ".csv":
        cells = [text.replace('"', '""') for text in texts]
        return "".join([f"n,{field}\r\n", *(f'0,"{cell}"\r\n' for cell in cells)]).encode()
    if suffix == ".parquet":
        import pyarrow.parquet
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
        return file.getvalue()
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def read(*paths, field="text"):
    """(the texts, the state)"""
    state, paths = collections.Counter(), find(map(str, paths))
    for path in paths:
        check(path, field)
    return list(read_files(paths, field, state)), state


@pytest.mark.parametrize("packing", UNPACK)
@pytest.mark.parametrize("suffix", [PLAIN[0], *TABLES])
def test_every_kind_of_file(suffix, packing, tmp_path):
    folder = tmp_path / "my.jsonl_dumps.csv"  # the names of folders do not matter
    folder.mkdir()
    path = folder / f"a.b{suffix.upper()}{packing}"
    path.write_bytes(PACK[packing](encode(suffix, TEXTS)))
    texts, state = read(path)
    assert texts == TEXTS and state["done"] > 0.5
    if suffix in TABLES:
        assert [row["text"] for _, row in rows(path)] == TEXTS
    else:
        with pytest.raises(UserError, match="is plain text: rows come from .jsonl"):
            rows(path)


def test_the_documents_name_every_kind():
    with open(os.path.join(os.path.dirname(__file__), "..", "docs", "formats.md"),
              encoding="utf-8") as f:
        formats = f.read()
    assert all(f"`{suffix}`" in formats for suffix in [*READERS, *UNPACK] if suffix)


@pytest.mark.parametrize("name", ["a", "a.gz", "a.tar.gz", "a.txt.gz.gz", "a.jsonl_x", ".txt"])
def test_another_kind_is_refused_and_the_kinds_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"some text\n")
    with pytest.raises(UserError, match=r"cannot read .*\.txt, .*\.jsonl, .*\.parquet.*\.zst"):
        find([str(tmp_path / name)])


def test_a_name_that_exists_is_no_glob_and_a_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("books/part.txt")
    for name in ("book [1].txt", "book 1.txt", "z.txt", "part.txt/c.txt"):
        (tmp_path / "books" / name).write_text(name)
    assert find(["books/book [1].txt"]) == ["books/book [1].txt"]
    three = ["books/book 1.txt", "books/book [1].txt", "books/z.txt"]
    assert find(["books/*.txt"]) == three  # and no folder
    assert find(["books/z.txt", "books/*.txt", "./books/z.txt"]) == [three[2], *three[:2]]
    assert find(["books/**"]) == [*three[:2], "books/part.txt/c.txt", three[2]]
    bad = dict(books=r"is a folder: .* 'books.\*.txt'", none="no file matches none")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.txt")
        bad["pipe.txt"] = "is not a regular file"
    for pattern, message in bad.items():
        with pytest.raises(UserError, match=message):
            read(pattern)


@pytest.mark.parametrize("suffix, data, texts", [
    (".txt", f"one\r{EOT} \rtwo", ["one\n", "two"]),
    (".txt", f"\ufeff{EOT}\none\r\n{EOT}\r\ntwo\r\n", ["", "one\n", "two\n"]),
    (".txt", f"\ufeffone\n\ufeff{EOT}\n\ufefftwo\n{EOT}\n\ufeffthree",  # files, joined
     ["one\n", "two\n", "three"]),
    (".txt", f"one{EOT}two\n{EOT}\n{EOT} three", [f"one{EOT}two\n", f"{EOT} three"]),
    (".csv", '\ufefftext,n\r\n"two\r\nlines",1\r\n\r\nend,\r\n', ["two\nlines", "end"])])
def test_marks_line_ends_and_blank_lines(suffix, data, texts, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(data.encode())
    found, state = read(tmp_path / f"a{suffix}")
    assert found == texts and state["marks"] == "".join(texts).count(EOT)  # within a line


def damaged(data, at=None):
    return data[:len(data) // 2] if at is None else data[:at] + bytes(
        255 - byte for byte in data[at:at + 40]) + data[at + 40:]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"line\n" * 9000 + b"na\xefve\n", r"UTF-8 text: line 9001, byte 45002:.*iconv"),
    ("a.txt", "text".encode("utf-16"), "line 1, byte 0:.*iconv -f utf-16"),
    ("a.txt", "text".encode("utf-16-le"), "is not text: it holds NUL bytes"),
    ("a.csv", b"text\n" + b"line\n" * 9000 + b"\0\n", "line 9002: not text"),
    ("a.csv", b"text,text\na,b\n", "two columns have one name: text, text"),
    ("a.csv", b"text\nHello, world\n", "line 2: not CSV .more cells than columns"),
    *((f"a.txt{p}", data, f"a.txt{p} cannot be read: ") for p in PACK if p for data in (
        b"plain text", damaged(PACK[p](b"text" * 9999)))),
    ("a.txt.gz", damaged(gzip.compress(os.urandom(999) + b"a" * 9999, mtime=0), 50), "read: "),
    ("a.parquet", damaged(encode(".parquet", TEXTS), 100), "cannot be read: "),
    ("a.csv", b"a,b\n1,2\n", "a.csv has no field 'text' but a, b: choose with --text_field"),
    ("a.parquet", encode(".parquet", TEXTS, "body"), "no field 'text' but n, body"),
    ("a.jsonl", b'{"body": "a"}\n\n{}\n{"body": null}\n', "no field 'text' but body"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "line 2: the field 'text' is not text: 5")])
def test_what_cannot_be_read_is_named_with_its_place(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# --- one rule for all who read rows ---------------------------------------------------------------

class Letters:
    """A tokenizer, as much of it as finetune.py needs."""

    eos_token, eos_token_id, chat_template = "end", 0, None

    def __call__(self, text, add_special_tokens=True):
        return dict(input_ids=[[*map(ord, one)] for one in text] if isinstance(text, list)
                    else [*map(ord, text)])


def by_prepare_data(path):
    return read(path)[0]


def by_finetune(path):
    return ["".join(chr(i) for i in example["labels"] if i > 0) for example in
            pytest.importorskip("finetune").read_examples(path, Letters(), 100)]


def by_eval_sciq(path):
    return [doc.context[10:-8] for doc in read_task("piqa", path.parent)[0]]


def row(text):
    """A row for all of them; text is its JSON."""
    return f'{{"text": {text}, "prompt": "?", "answer": {text}, "goal": {text}, "sol1": "a", ' \
           '"sol2": "b", "label": 0}'


USERS = [by_prepare_data, by_finetune, by_eval_sciq]
A, B = row('"a"'), row('"é🙂"')


@pytest.mark.parametrize("user", USERS)
def test_rows_that_can_be_read(user, tmp_path):
    path = tmp_path / "piqa_validation.jsonl"
    for data, texts in [
            (f"\ufeff\n \r\n{A}\r\n\n{B}\n\n\n", ["a", "é🙂"]),  # blank lines
            (f"{A}\n\ufeff{B}", ["a", "é🙂"]),  # two files joined, the second with a mark
            (f"\ufeff[{A},\n{B}]", ["a", "é🙂"]), (f"[\n  {A}\n]\n", ["a"]),
            (row(r'"x\ud83d y\uDE42"'), ["x\ufffd y\ufffd"]), (row(r'"\ud83d\ude42"'), ["🙂"])]:
        path.write_bytes(data.encode())
        assert user(path) == texts, data


@pytest.mark.parametrize("user", USERS)
def test_rows_that_cannot_be_read(user, tmp_path):
    path = tmp_path / "piqa_validation.jsonl"
    for data, message in [
            (f"{A}\n\nnonsense\n".encode(), "line 3: not JSON"),
            (f"{A}\n5\n".encode(), "line 2: not a JSON object: 5"),
            (b'["a list"]', "row 1: not a JSON object: 'a list'"),
            (f"{A}\n".encode() + row('"\xef"').encode("latin-1"), r"line 2, byte 105: .*iconv"),
            ((f"{A}\n" + '{"a": ' + "[" * 100_000).encode(), "line 2: not JSON"),
            (f"{A}\n{row('5')}\n".encode(), "line 2"),
            (b'{"no": "such"}\n{"field": "here"}\n', "has no|no column")]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            user(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", [row("null"), row("NaN"), '{"prompt": "?"}'])
def test_a_row_without_text_is_skipped_and_counted_but_no_question(empty, tmp_path, capsys):
    path = tmp_path / "piqa_validation.jsonl"
    path.write_text("\n".join([A, empty, B, empty]))
    texts, state = read(path)
    assert texts == ["a", "é🙂"] == by_finetune(path) and state["skipped"] == 2
    assert "2 rows without messages, or prompt and answer, are skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 2"):  # fewer questions would be another benchmark
        by_eval_sciq(path)
