"""The user's text, in every kind of file: what it holds, and where it cannot be read."""

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
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "line 2: the field 'text' is not text: 5"),
    ("a.jsonl", b'{"text": "a"}\n\nnonsense\n', "line 3: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n5\n', "line 2: not a JSON object: 5"),
    ("a.jsonl", b'["a list"]', "row 1: not a JSON object: 'a list'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xef"}', r"line 2, byte 24: .*iconv"),
    ("a.jsonl", b'{"text": "a"}\n{"a": ' + b"[" * 100_000, "line 2: not JSON")])
def test_what_cannot_be_read_is_named_with_its_place(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_can_be_read(tmp_path):
    path, a, b = tmp_path / "a.jsonl", '{"text": "a"}', '{"text": "é🙂"}'
    for data, texts in [
            (f"\ufeff\n \r\n{a}\r\n\n{b}\n\n\n", ["a", "é🙂"]),  # blank lines
            (f"{a}\n\ufeff{b}", ["a", "é🙂"]),  # two files joined, the second with a mark
            (f"\ufeff[{a},\n{b}]", ["a", "é🙂"]), (f"[\n  {a}\n]\n", ["a"]),
            (r'{"text": "x\ud83d y\uDE42"}', ["x\ufffd y\ufffd"]),
            (r'{"text": "\ud83d\ude42"}', ["🙂"])]:
        path.write_bytes(data.encode())
        assert read(path)[0] == texts, data


@pytest.mark.parametrize("empty", ['{"text": null}', '{"text": NaN}', '{"prompt": "?"}'])
def test_a_row_without_text_is_skipped_and_counted(empty, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "a"}', empty, '{"text": "b"}', empty]))
    texts, state = read(tmp_path / "a.jsonl")
    assert texts == ["a", "b"] and state["skipped"] == 2
