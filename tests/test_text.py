"""The user's text, in every kind of file, reads alike for prepare_data, finetune and eval_sciq."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os

import pytest

from nanonexus.cli import UserError
from nanonexus.tasks import read_task
from nanonexus.text import PLAIN, READERS, TABLES, UNPACK, check, find, read_files, rows
from nanonexus.tokenizer import EOT

pyarrow = pytest.importorskip("pyarrow")
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}
TEXTS = ["One,\n\"two\" naïve 🙂.\n", "three\n", "four\n" * 200_000]


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


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_file(suffix, tmp_path):
    folder = tmp_path / "my.jsonl_dumps.csv"  # the names of folders do not matter
    folder.mkdir()
    for packing in UNPACK:
        path = folder / f"a.b{suffix.upper()}{packing}"
        path.write_bytes(PACK[packing](encode(suffix, TEXTS)))
        texts, state = read(path)
        assert texts == TEXTS and state["done"] > 0.5, path
        path.unlink()
    assert PACK.keys() == UNPACK.keys()


@pytest.mark.parametrize("name", [
    "a", "a.gz", "a.tar", "a.tar.gz", "a.tgz", "a.zip", "a.jsonl.txt.gz2", "a.txt.gz.gz", "a.html",
    "a.jsonl_x", "a.tsv", ".txt", "a.txt~"])
def test_another_kind_is_refused_and_the_kinds_are_named(name, tmp_path):
    path = tmp_path / "a.jsonl" / name
    path.parent.mkdir()
    path.write_bytes(b"some text\n" * 1000)
    for use in (lambda: find([str(path)]), lambda: list(rows(path))):
        with pytest.raises(UserError, match=r"cannot read .*\.txt, .*\.jsonl, .*\.parquet.*\.zst"):
            use()


def test_a_name_that_exists_is_no_glob_and_a_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("books/part.txt")
    for name in ("book [1].txt", "book 1.txt", "z.txt", "part.txt/c.txt"):
        with open(f"books/{name}", "w") as f:
            f.write(name)
    assert find(["books/book [1].txt"]) == ["books/book [1].txt"]
    three = ["books/book 1.txt", "books/book [1].txt", "books/z.txt"]
    assert find(["books/*.txt"]) == three  # and no folder
    assert find(["books/z.txt", "books/*.txt", "./books/z.txt"]) == [three[2], *three[:2]]
    assert find(["books/**"]) == [*three[:2], "books/part.txt/c.txt", three[2]]
    with pytest.raises(UserError, match=r"books is a folder: .* such as 'books.\*.txt'"):
        find(["books"])
    with pytest.raises(UserError, match="no file matches none"):
        find(["none*.txt"])


def test_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    for data, texts in [
        ("one\n" + EOT + "\ntwo", ["one\n", "two"]),
        ("\ufeff" + EOT + "\none\r\n" + EOT + "\r\ntwo\r\n", ["", "one\n", "two\n"]),
        ("\ufeffone\n\ufeff" + EOT + "\n\ufefftwo\n" + EOT + "\n\ufeffthree",  # files, joined
         ["one\n", "two\n", "three"]),
        ("one\r" + EOT + " \rtwo", ["one\n", "two"]),
    ]:
        path.write_bytes(data.encode())
        assert read(path)[0] == texts
    path.write_text(f"one{EOT}two\n{EOT}\n{EOT} three")
    assert read(path)[1]["marks"] == 2  # those within a line


def test_csv_as_a_spreadsheet_writes_it(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,n\r\n"two\r\nlines",1\r\n\r\nend,\r\n'.encode())
    assert read(tmp_path / "a.csv")[0] == ["two\nlines", "end"]


def damaged(data, at=None):
    return data[:len(data) // 2] if at is None else data[:at] + bytes(
        255 - byte for byte in data[at:at + 40]) + data[at + 40:]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", "é\nnaïve".encode("latin-1"), r"UTF-8 text: line 1, byte 0: .*iconv"),
    ("a.txt", b"line\n" * 9000 + b"na\xefve\n", r"UTF-8 text: line 9001, byte 45002:"),
    ("a.txt", "text".encode("utf-16"), "line 1, byte 0:.*iconv -f utf-16"),
    ("a.txt", b"line\n" * 9000 + b"\0" * 9000, "line 9001: not text, it holds NUL bytes"),
    ("a.csv", b"text\n" + b"line\n" * 9000 + b"\0\n", "line 9002: not text"),
    ("a.csv", b"text,text\na,b\n", "two columns have one name: text, text"),
    ("a.csv", b"text\nna\xefve\n", "line 2, byte 7:"),
    ("a.md", "cut 🙂".encode()[:-1], "line 1, byte 4: unexpected end"),
    ("a.txt", "text".encode("utf-16-le"), "is not text: it holds NUL bytes"),
    ("a.csv", b"text\na\0b\n", "NUL bytes"),
    ("a.txt.gz", damaged(gzip.compress(os.urandom(999) + b"a" * 9999, mtime=0), 50),
     "cannot be read: "),
    ("a.txt.gz", damaged(gzip.compress(b"text" * 9999, mtime=0)), "a.txt.gz cannot be read: "),
    ("a.txt.gz", b"plain text", "a.txt.gz cannot be read: Not a gzipped file"),
    ("a.txt.xz", damaged(lzma.compress(b"text" * 9999)), "a.txt.xz cannot be read: "),
    ("a.txt.xz", damaged(lzma.compress(os.urandom(999)), 50), "a.txt.xz cannot be read: "),
    ("a.txt.bz2", damaged(bz2.compress(b"text" * 9999), 20), "a.txt.bz2 cannot be read: "),
    ("a.txt.zst", damaged(PACK[".zst"](b"text" * 9999)), "a.txt.zst cannot be read: "),
    ("a.txt.zst", b"plain text", "a.txt.zst cannot be read: "),
    ("a.parquet", damaged(encode(".parquet", TEXTS)), "a.parquet cannot be read: "),
    ("a.parquet", damaged(encode(".parquet", TEXTS), 100), "a.parquet cannot be read: "),
    ("a.csv", b'text\n"no end\n', "line 2: not CSV"),
    ("a.csv", b"text\nHello, world\n", "line 2: not CSV .more cells than columns"),
    ("a.csv", b"a,b\n1,2\n", "a.csv has no field 'text' but a, b: choose with --text_field"),
    ("a.parquet", encode(".parquet", TEXTS, "body"), "no field 'text' but n, body"),
    ("a.jsonl", b'{"body": "a"}\n\n{}\n{"body": null}\n', "no field 'text' but body"),
    ("a.json", b'{\n "text": "a"\n}', "a.json, line 1: not JSON .*one array of rows"),
    ("a.json", b'[{"text": "a"}, 5]', "a.json, row 2: not a JSON object: 5"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "line 2: the field 'text' is not text: 5"),
])
def test_what_cannot_be_read_is_named_with_its_place(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is not a regular file"):
        read(tmp_path / "a.txt")


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
    finetune = pytest.importorskip("finetune")
    return ["".join(chr(i) for i in example["labels"] if i > 0)
            for example in finetune.read_examples(path, Letters(), 100)]


def by_eval_sciq(path):
    return [doc.context[len("Question: "):-len("\nAnswer:")]
            for doc in read_task("piqa", path.parent)[0]]


USERS = [by_prepare_data, by_finetune, by_eval_sciq]


def row(text):
    """A row for all of them; text is its JSON."""
    return f'{{"text": {text}, "prompt": "?", "answer": {text}, "goal": {text}, "sol1": "a", ' \
           '"sol2": "b", "label": 0}'


A, B = row('"a"'), row('"é🙂"')


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("data, texts", [
    (f"{A}\n{B}", ["a", "é🙂"]), (f"\ufeff{A}\n{B}\n", ["a", "é🙂"]),
    (f"\n \r\n{A}\r\n\n{B}\n\n\n", ["a", "é🙂"]),  # blank lines
    (f"{A}\n\ufeff{B}", ["a", "é🙂"]),  # two files joined, the second with a mark
    (f"\ufeff[{A},\n{B}]", ["a", "é🙂"]), (f"[\n  {A}\n]\n", ["a"]),
    (row(r'"x\ud83d y\uDE42"'), ["x\ufffd y\ufffd"]), (row(r'"\ud83d\ude42"'), ["🙂"]),
])
def test_rows_that_can_be_read(user, data, texts, tmp_path):
    (tmp_path / "piqa_validation.jsonl").write_bytes(data.encode())
    assert user(tmp_path / "piqa_validation.jsonl") == texts


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("data, message", [
    (f"{A}\n\nnonsense\n".encode(), "line 3: not JSON"), (f"{A}\n{B[:-9]}".encode(), "line 2: not"),
    (f"{A}\n5\n".encode(), "line 2: not a JSON object: 5"),
    (b'["a list"]', "row 1: not a JSON object: 'a list'"),
    (f"{A}\n".encode() + row('"\xef"').encode("latin-1"), r"line 2, byte 105: .*iconv"),
    ((f"{A}\n" + '{"a": ' + "[" * 100_000).encode(), "line 2: not JSON"),
    (f"{A}\n{row('5')}\n".encode(), "line 2"), (f"{A}\n{row('[]')}\n".encode(), "line 2"),
    (b'{"no": "such"}\n{"field": "here"}\n', "has no|no column"),
])
def test_rows_that_cannot_be_read(user, data, message, tmp_path):
    (tmp_path / "piqa_validation.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        user(tmp_path / "piqa_validation.jsonl")
    assert "piqa_validation.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", [row("null"), row("NaN"), '{"prompt": "?"}'])
def test_a_row_without_text_is_skipped_and_counted_but_no_question(empty, tmp_path, capsys):
    path = tmp_path / "piqa_validation.jsonl"
    path.write_text("\n".join([A, empty, B, empty]))
    texts, state = read(path)
    assert texts == ["a", "é🙂"] == by_finetune(path) and state["skipped"] == 2
    assert "2 rows without messages, or prompt and answer, are skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 2"):  # fewer questions would be another benchmark
        by_eval_sciq(path)


def test_tables_have_rows_and_plain_text_has_none(tmp_path):
    for suffix in TABLES:
        (tmp_path / f"a{suffix}.xz").write_bytes(lzma.compress(encode(suffix, ["x", "y"], "body")))
        assert [row["body"] for _, row in rows(tmp_path / f"a{suffix}.xz")] == ["x", "y"]
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a.txt is plain text: rows come from .jsonl"):
        rows(tmp_path / "a.txt")


def test_the_documents_name_every_kind():
    with open(os.path.join(os.path.dirname(__file__), "..", "docs", "formats.md"),
              encoding="utf-8") as f:
        formats = f.read()
    assert all(f"`{suffix}`" in formats for suffix in [*READERS, *UNPACK] if suffix)
