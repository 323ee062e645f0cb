"""
The user's text, read alike by every script: plain, JSON, CSV or Parquet, by the file's suffix.

Text is UTF-8, with or without a byte order mark. Blank lines are skipped; unpaired surrogates,
which JSON may hold, become U+FFFD. A damaged file, or one of another kind, is a UserError that says
where.
"""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
import os
import textwrap
import zlib

from nanonexus.cli import UserError
from nanonexus.tokenizer import EOT, printable

BOM = "\ufeff"  # the byte order mark
DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN, as some write null


def find(patterns):
    """The files that names and globs stand for, each of them once. A file that exists is not taken
    for a glob. Raises UserError for a pattern without a file, and for a file without a reader."""
    found = {}  # real path -> path
    for pattern in map(os.path.expanduser, patterns):
        if os.path.isdir(pattern):
            raise UserError(f"{pattern} is a folder: name its files, such as "
                            f"'{os.path.join(pattern, '*.txt')}'")
        paths = [pattern] if os.path.exists(pattern) else sorted(
            path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
        if not paths:
            raise UserError(f"no file matches {pattern}")
        for path in paths:
            reader_of(path)
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def reader_of(path):
    """(what unpacks a file, what reads it), by its name's last suffixes in lower case."""
    name, packing = os.path.splitext(os.path.basename(path).lower())
    if packing not in UNPACK:
        name, packing = name + packing, ""
    suffix = os.path.splitext(name)[1]
    if suffix not in READERS:
        raise UserError(f"{path}: cannot read {suffix or 'a name without a suffix'}; supported are "
                        f"{SUPPORTED} (unpack an archive; rename plain text to .txt)")
    return UNPACK[packing], READERS[suffix]


@contextlib.contextmanager
def opened(path):
    """(raw file, what its reader reads, the reader); errors in the block name the path."""
    unpack, reader = reader_of(path)
    try:
        with open(path, "rb") as raw, unpack(raw) as f:
            yield raw, f if reader is read_parquet else io.TextIOWrapper(f, "utf-8-sig"), reader
    except UnicodeDecodeError as error:
        with open(path, "rb") as raw, unpack(raw) as f:
            where, kind = first_damage(f)
            raise UserError(f"{path} cannot be read as UTF-8 text: {where} (convert it, as iconv "
                            f"-f {kind} -t utf-8 does)") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = textwrap.shorten(getattr(error, "strerror", None) or str(error), 200)
        raise UserError(f"{path} cannot be read: {reason}") from error


def first_damage(f):
    """Where a binary file is not UTF-8, and what it may be."""
    start, kind = 0, "latin1"
    for number, line in enumerate(f, 1):
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and number == 1:
            kind = "utf-16"
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number}, byte {start + error.start}: {error.reason}", kind
        start += len(line)
    return "it ends within a character", kind


def check(path, field=None):
    """Raises UserError if the beginning of a file shows that it cannot be read."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file")
    with opened(path) as (_, f, reader):
        if reader is not read_parquet and "\0" in f.read(1 << 13):
            raise UserError(f"{path} is not text: it holds NUL bytes")
    if reader is not read_plain:
        next(items(path, field), None)


def items(path, field=None, state=None):
    """(place, document) of a plain text, (place, row) of other files; place names file and line.

    field: the one that the caller uses, where it is known. state["file"]: the open file.
    """
    with opened(path) as (raw, f, reader):
        if state is not None:
            state["file"] = raw
        yield from reader(f, path, field)


def has_rows(path):
    return reader_of(path)[1] is not read_plain


def rows(path):
    """(place, row as a dict) of a file that is not plain text."""
    if not has_rows(path):
        raise UserError(f"{path} is plain text: rows come from {', '.join(TABLES)}")
    check(path)
    return items(path)


def read_files(paths, field, state):
    """The texts in files. state: "done", the fraction of their bytes read; "skipped", see column;
    "marks", how often <|endoftext|> stands within a text."""
    total, before = sum(map(os.path.getsize, paths)) or 1, 0
    for path in paths:
        if reader_of(path)[1] is read_plain:
            found = (text for _, text in items(path, field, state))
        else:
            found = column(items(path, field, state), path, field, state)
        for text in found:
            state["done"] = (before + state["file"].tell()) / total
            if EOT in text:
                state["marks"] += text.count(EOT)
            yield text
        before += os.path.getsize(path)


def column(found, source, field, state):
    """row[field] of each (place, row). A row without a text (null, or no such field) is skipped,
    and counted in state["skipped"]. Raises UserError if no row has the field."""
    row, known = None, False
    for place, row in found:
        known = known or field in row
        text = row.get(field)
        if text is None:
            state["skipped"] += 1
        elif isinstance(text, str):
            yield printable(text).removeprefix(BOM)
        else:
            raise UserError(f"{place}: the field {field!r} is not text: {text!r:.60}")
    if row is not None and not known:
        raise no_field(source, field, row)


def no_field(source, field, names):
    return UserError(f"{source} has no field {field!r} but {', '.join(names) or 'none'}: choose "
                     "with --text_field")


# --- one generator for each kind of file: (place, document or row) --------------------------------

def lines_of(f, path):
    """The lines of a text; UserError at a NUL byte, as in files that a crash left half written."""
    for number, line in enumerate(f, 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: not text, it holds NUL bytes")
        yield line


def read_plain(f, path, field):
    """A line that holds only <|endoftext|> ends a document."""
    document = []
    for line in lines_of(f, path):
        if EOT in line and line.strip(BOM + " \t\n") == EOT:
            yield path, "".join(document).removeprefix(BOM)
            document = []
        else:
            document.append(line)
    yield path, "".join(document).removeprefix(BOM)


def read_json(f, path, field):
    """A row per line, or one array of rows, which is read whole."""
    for number, line in enumerate(f, 1):
        line, place = line.strip(BOM + " \t\n"), f"{path}, line {number}"
        if line.startswith("["):
            for i, row in enumerate(parse(line + f.read(), place), 1):
                yield f"{path}, row {i}", an_object(row, f"{path}, row {i}")
        elif line:
            yield place, an_object(parse(line, place), place)


def an_object(row, place):
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object: {row!r:.60}")
    return row


def parse(text, place):
    try:
        value = DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # an escaped surrogate
            value = json.loads(printable(json.dumps(value, ensure_ascii=False)))
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); a row is one line, or the file one array "
                        "of rows") from error


def read_csv(f, path, field):
    """The first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(lines_of(f, path), strict=True)
    try:
        if len(set(table.fieldnames or ())) < len(table.fieldnames or ()):
            raise csv.Error(f"two columns have one name: {', '.join(table.fieldnames)}")
        if field and table.fieldnames and field not in table.fieldnames:
            raise no_field(path, field, table.fieldnames)
        for row in table:
            if None in row:
                raise csv.Error("more cells than columns; a text with a comma needs quotes")
            yield f"{path}, line {table.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {table.reader.line_num}: not CSV ({error})") from error


def read_parquet(f, path, field):
    import pyarrow
    import pyarrow.parquet

    try:
        table, number = pyarrow.parquet.ParquetFile(f if f.seekable() else io.BytesIO(f.read())), 0
        names = table.schema_arrow.names
        if field and field not in names:
            raise no_field(path, field, names)
        for batch in table.iter_batches(1024, columns=[field] if field else None):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(f"damaged Parquet ({error})") from error


def zstd(raw):
    import pyarrow  # comes with datasets

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


UNPACK = {"": contextlib.nullcontext, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
          ".zst": zstd}
TABLES = {".jsonl": read_json, ".ndjson": read_json, ".json": read_json, ".csv": read_csv,
          ".parquet": read_parquet}
PLAIN = (".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".java", ".js", ".go",
         ".rs", ".sh")
READERS = dict.fromkeys(PLAIN, read_plain) | TABLES
SUPPORTED = f"{', '.join(READERS)}, and these with {', '.join(filter(None, UNPACK))}"
