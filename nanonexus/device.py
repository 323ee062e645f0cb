"""
Devices: which one, what it can do, and how a CPU keeps its memory.
"""

import contextlib
import ctypes

import torch

from nanonexus.cli import UserError

# Dense bfloat16 peaks from the makers' data sheets, FLOP/s. A device not here has no MFU.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12}


def peak_flops():
    """Of the current CUDA device, or None if it is not known."""
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def check_device(name):
    """Raises UserError if this machine has no device of that name."""
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:  # the second: torch without CUDA
        raise UserError(f"no device {name!r} here: use --device cpu") from error


def pick_device(kind, local_rank=0):
    """The torch.device of a process: kind is "auto", "cuda", "mps" or "cpu"."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() \
            else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"no CUDA device number {local_rank} here: use --device cpu, or fewer "
                        "processes a node")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device here: use --device cpu")
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(kind, local_rank if kind == "cuda" else None)


def keep_freed_memory():
    """Let glibc keep freed memory: else every step on a CPU returns its activations to the kernel
    and takes them back page by page, which cost a third of the time (measured, 70M shape)."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too
