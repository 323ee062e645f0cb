"""
Files that are whole or not there: written beside their place, flushed to the disk, then renamed.
"""

import contextlib
import hashlib
import json
import os


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":  # nothing else can do that for a folder
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace(partial, path):
    """os.replace(partial, path), for a file or a folder, kept even if the power fails: the folder
    that holds both names is flushed to the disk too."""
    os.replace(partial, path)
    flush(os.path.dirname(os.path.abspath(path)))


def write_json(path, result):
    """Replace the file at path by result, in one step."""
    write_text(path, json.dumps(result, indent=1))


def write_text(path, text):
    """Replace the file at path by text, in UTF-8, in one step."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
