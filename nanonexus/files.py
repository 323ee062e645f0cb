"""
Files that are complete or absent: written under another name, flushed to disk, then renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil

from nanonexus.cli import UserError


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path):
    """Wait until a file, or the names in a folder, are on disk."""
    if os.name != "posix":  # other systems cannot do that for a folder
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace(partial, path):
    """os.replace(partial, path), for a file or a folder, durable even if the power fails: the
    folder that holds both names is flushed to disk too."""
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


def lock(folder):
    """A file that this process keeps locked while it writes to folder; UserError if another does.
    The system releases it when the process ends, however it ends."""
    file = open(os.path.join(folder, ".lock"), "w")
    with contextlib.suppress(ImportError):  # Windows has no fcntl: no lock there
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}: choose another --out, or stop "
                            "it first") from error
    return file


@contextlib.contextmanager
def new_folder(out):
    """A folder to write into, OUT.partial: renamed to OUT when the block ends, removed if it fails.

    What a killed process left in one is overwritten. Raises UserError if OUT exists and is not
    empty, or another process is making it.
    """
    out = os.path.abspath(os.path.expanduser(out))
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} exists and is not empty: remove it or choose another --out")
    partial = out + ".partial"
    os.makedirs(partial, exist_ok=True)
    with lock(partial):
        try:
            for name in set(os.listdir(partial)) - {".lock"}:
                os.remove(os.path.join(partial, name))
            yield partial
            for name in sorted({*os.listdir(partial), "."} - {".lock"}):
                flush(os.path.join(partial, name))
            replace(partial, out)  # onto nothing, or onto an empty folder
            # the lock is held until now: before the rename another process would start anew in it
            os.remove(os.path.join(out, ".lock"))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_lines(path):
    """The dicts of a file of JSON lines, [] if there is none; a last line cut short by a kill is
    ignored. UserError if another is damaged."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        try:
            return [json.loads(line) for line in f if line.endswith("\n")]
        except ValueError as error:
            raise UserError(f"{path} has a damaged line ({error}): remove it") from error


def append(file, line):
    """Append bytes to an unbuffered file, all or none of them; OSError if they cannot be
    written. One write, so that no other process's line comes between."""
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def append_line(path, result):
    """Append one line to a file of JSON lines, completely or not at all, replacing a last one cut
    short by a kill. UserError if it cannot be written."""
    try:
        with open(path, "a+b", buffering=0) as f:
            f.seek(0)
            content = f.read()
            if not content.endswith(b"\n"):
                f.truncate(content.rfind(b"\n") + 1)
            append(f, json.dumps(result).encode() + b"\n")
            os.fsync(f.fileno())
    except OSError as error:
        raise UserError(f"could not append to {path} ({error}): free some space; the same command "
                        "continues") from error
