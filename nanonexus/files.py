"""
Files that are complete or absent: written under another name, flushed to disk, then renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time

from model import ModelError
from nanonexus.cli import UserError

# the errors of network file systems and FUSE for calls that they do not support
LACKING = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path):
    """Wait until a file is on disk, or the names in a folder, where the file system can do that."""
    if os.name != "posix":  # other systems cannot do that for a folder
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in LACKING:
            raise
    finally:
        os.close(number)


def output_folder(folder, name=""):
    """Make a folder to write into, before the work. Raises UserError if it, or in it a file whose
    name begins with `name`, cannot be made."""
    if not folder:
        raise UserError("'' is not the name of a folder: choose another")
    try:
        os.makedirs(os.path.realpath(folder), exist_ok=True)  # of a link, the target
        with tempfile.NamedTemporaryFile(prefix=name, dir=folder):  # adds 8, as ".partial" does
            pass
    except OSError as error:
        raise UserError(f"cannot write into the folder {folder} ({error.strerror}): choose "
                        "another") from error


def output_file(path, *inputs):
    """Make the folder of a file to write, before the work. Raises UserError if the file cannot be
    written there, or is one of the inputs (paths, names on the hub or None)."""
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{path!r} is not the name of a file: choose another")
    for other in inputs:
        if other and os.path.exists(path) and os.path.exists(other) \
                and os.path.samefile(path, other):
            raise UserError(f"{path} is read as {other}: choose another file to write")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{path} can only be read: choose another file")
    output_folder(*os.path.split(os.path.realpath(path)))


def replace(partial, path):
    """os.replace(partial, path), for a file or a folder, durable even if the power fails: the
    folder that holds both names is flushed to disk too."""
    until = time.monotonic() + 10
    while True:
        try:
            os.replace(partial, path)
            break
        except PermissionError:  # on Windows, as long as anyone is reading the old file
            if sys.platform != "win32" or time.monotonic() > until:
                raise
            time.sleep(0.1)
    flush(os.path.dirname(os.path.abspath(path)))


def write_json(path, result):
    """Replace the file at path by result, in one step."""
    write_text(path, json.dumps(result, indent=1))


def write_text(path, text):
    """Replace the file at path, or the one that it is a link to, by text, in UTF-8, in one step."""
    path = os.path.realpath(path)
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as f:
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
    The system releases it when the process ends, however it ends. Without a lock, on Windows and on
    file systems that have none, nothing stops a second run."""
    file = open(os.path.join(folder, ".lock"), "wb")
    try:
        import fcntl
    except ImportError:  # Windows, where a folder with an open file could not be renamed either
        file.close()
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {folder}: choose another --out, or stop "
                        "it first") from error
    except OSError as error:
        if error.errno not in LACKING:
            raise
        print(f"note: no locks in {folder} ({error.strerror}): do not start a second run there",
              file=sys.stderr)
    return file


@contextlib.contextmanager
def new_folder(out):
    """A folder to write into, OUT.partial: renamed to OUT when the block ends, removed if it fails.

    Of a link, OUT is the target. What a killed process left in OUT.partial is overwritten. Raises
    UserError, before the block, if OUT exists and is not empty, or cannot be replaced, or another
    process is making it.
    """
    out = os.path.realpath(os.path.expanduser(out))
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} exists and is not empty: remove it or choose another --out")
    partial = out + ".partial"
    os.makedirs(partial, exist_ok=True)
    if os.listdir(partial) and ".lock" not in os.listdir(partial):
        raise UserError(f"{partial} is in the way: move it, or choose another --out")
    with contextlib.closing(lock(partial)):
        try:
            for name in set(os.listdir(partial)) - {".lock"}:
                os.remove(os.path.join(partial, name))
            if os.path.isdir(out):
                replaceable(out)
            yield partial
            for name in sorted({*os.listdir(partial), "."} - {".lock"}):
                flush(os.path.join(partial, name))
            if os.path.isdir(out):  # Windows cannot rename onto a folder, not even an empty one
                os.rmdir(out)
            replace(partial, out)
            # the lock is held until now: before the rename another process would start anew in it
            os.remove(os.path.join(out, ".lock"))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def replaceable(folder):
    """Raises UserError unless an empty folder can be replaced by another: a mount point cannot, nor
    should the current folder, which this process and its shell would still be in."""
    if not os.path.samefile(folder, os.curdir):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
            os.mkdir(folder)
            return
    raise UserError(f"{folder} is a mount point, or in use: choose a new folder in it as --out")


@contextlib.contextmanager
def reading(place, hint="remove it"):
    """What a damaged file, or one of another kind, raises in the block becomes a UserError."""
    try:
        yield
    except (UserError, ModelError):
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError,
            RecursionError) as error:
        raise UserError(f"{place} is damaged, or of another kind ({type(error).__name__}: {error}):"
                        f" {hint}") from error


def read_json(path, hint="remove it"):
    """What a JSON file holds. UserError if it is damaged."""
    with open(path, encoding="utf-8") as f, reading(path, hint):
        return json.load(f)


def read_lines(path, *needed):
    """The dicts of a file of JSON lines, [] if there is none; a last line cut short by a kill is
    ignored. UserError if another is damaged, or lacks one of the fields needed."""
    lines = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.endswith(b"\n"):
                    with reading(f"{path}, line {number},", "give another file, or remove it"):
                        lines.append(dict(json.loads(line)))
                        [lines[-1][name] for name in needed]
    return lines


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
