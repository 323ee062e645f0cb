"""
The command line: flags with bounds, help that begins with the script's docstring, one-line errors.
"""

import argparse
import errno
import inspect
import io
import math
import os
import re
import sys

from model import ModelError


class UserError(ValueError):
    """A mistake the user can correct: scripts print it as one line and exit with status 2."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Lines of 100 columns, N for a number."""

    def __init__(self, prog):
        super().__init__(prog, width=100, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        is_number = getattr(action.type, "__name__", "") in ("int", "float")
        return "N" if is_number else super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse whose help begins with the script's docstring and whose errors are one line."""

    def __init__(self, doc, usage="%(prog)s [flags]", **kwargs):
        super().__init__(description=inspect.cleandoc(doc), allow_abbrev=False, usage=usage,
                         formatter_class=Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # a shell leaves the ~ of --out=~/run as it is: it would name a folder of that name
        args = [re.sub(r"^(--\w+=)~(?=/|$)", lambda m: m[1] + os.path.expanduser("~"), arg)
                for arg in (sys.argv[1:] if args is None else args)]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value in ("", []):  # an unset variable of the shell, or --flag=--
                self.error(f"argument --{name}: expected a value")
            if isinstance(value, str) and value != value.encode(errors="replace").decode():
                self.error(f"argument --{name}: the value is not UTF-8")
        return found, rest

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def refuse(self, args, names, why):
        """UserError for those of the flags that are not at their default, which `why` ignores."""
        if given := [f"--{name}" for name in names
                     if getattr(args, name) != self.get_default(name)]:
            raise UserError(f"no effect {why}: {', '.join(given)}")


def number(kind, least, most=sys.float_info.max, above=False):
    """The argparse type of an int or a float from `least` (or above it) to `most`; 1e9 is an int
    too."""
    def read(text):
        value = float(text) if kind is int and "e" in text.lower() else kind(text)
        if not (least < value if above else least <= value) or value > most:  # NaN is neither
            bound = f"{'above' if above else 'from'} {least}" + f" to {most}" * (most < 2**63)
            raise argparse.ArgumentTypeError(f"must be a number {bound}, got {text}")
        if value != kind(value):
            raise ValueError(text)
        return kind(value)

    read.__name__ = kind.__name__  # in argparse's own message
    return read


positive_int, whole = number(int, 1, 2**31), number(int, 0, 2**31)
positive, non_negative = number(float, 0, math.inf, above=True), number(float, 0, 1e30)
rate = number(float, 0, 1000, above=True)  # of learning


def one_of(names):
    """The argparse type of one of several names."""
    def read(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"choose from {', '.join(names)}, not {text!r}")
        return text
    return read


def listed(kind):
    """The type of a flag that takes several: listed(int)("1,2,1") is [1, 2]."""
    def read(text):
        return list(dict.fromkeys(kind(x) for x in text.split(",")))  # each of them once

    read.__name__ = f"list of {kind.__name__}"  # in argparse's own message
    return read


class Output(io.FileIO):
    """Standard output or error whose reader may go, as `head` does, or a terminal that is closed:
    what is written after that is lost, and the work goes on. Any other failure is raised, once."""

    failed = False

    def write(self, data):
        try:
            return len(data) if self.failed else super().write(data)
        except OSError as error:
            self.failed = True
            gone = errno.EPIPE, errno.EINVAL, errno.EIO  # a pipe, a pipe on Windows, a terminal
            if error.errno not in gone or os.path.isfile(self.fileno()):
                raise
            return len(data)


def safe_streams():
    """Let no print end the work: characters that the terminal's encoding lacks become "?", a reader
    may go (see Output), and a stream that is closed from the start goes nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):  # not a notebook's
            if stream.errors != "backslashreplace":  # standard error's, which does not fail either
                stream.reconfigure(errors="replace")
            raw = getattr(stream.buffer, "raw", stream.buffer)  # the second: python -u
            if type(raw) is io.FileIO:  # not Windows' console
                setattr(sys, name, io.TextIOWrapper(
                    io.BufferedWriter(Output(raw.fileno(), "w", closefd=False)), stream.encoding,
                    stream.errors, line_buffering=stream.line_buffering or stream.write_through))


def run_script(main):
    """Call main(); report a user's mistake, an OSError or a lack of memory in one line, with status
    2."""
    safe_streams()
    try:
        main()
        sys.stdout.flush()
    except (UserError, ModelError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "out of memory" in message \
                or "can't allocate memory" in message:  # numpy's, CUDA's, torch's on a CPU
            message = ("out of memory: lower --micro_batch (--batch_size in eval_sciq.py, --batch "
                       "in finetune.py), then --block_size, --n_embd or --n_layer")
        elif isinstance(error, RuntimeError):  # gloo's are plain, NCCL's a subclass
            if not any(word in message for word in ("gloo", "NCCL")):
                raise
            message = ("another process of this run has ended, or the connection to it: the last "
                       "checkpoint is intact, the same command with --resume continues")
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
