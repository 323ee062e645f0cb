"""
The command line: flags with bounds, help that begins with the script's docstring, one-line errors.
"""

import argparse
import math
import os
import sys

from model import ModelError


class UserError(ValueError):
    """A mistake the user can correct: scripts print it as one line and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose help begins with the script's docstring and whose errors are one line."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, allow_abbrev=False, **kwargs,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


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
positive, non_negative = number(float, 0, math.inf, above=True), number(float, 0)


def listed(kind):
    """The type of a flag that takes several: listed(int)("1,2") is [1, 2]."""
    return lambda text: [kind(x) for x in text.split(",")]


def run_script(main):
    """Call main(); report a user's mistake, an OSError or a lack of memory in one line, with status
    2."""
    try:
        main()
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
