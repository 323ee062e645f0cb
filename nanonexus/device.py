"""
Devices: which one, what it can do, and how a CPU keeps its memory.
"""

import contextlib
import ctypes

import torch

from nanonexus.cli import UserError

# Peak dense bfloat16 FLOP/s from the vendors' data sheets, by CUDA device name. A device not listed
# has no MFU.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12, "NVIDIA B200": 2250e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA L4": 121e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops():
    """The current CUDA device's, or None if unknown."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name())


def check_device(name):
    """Raises UserError if this machine has no device of that name."""
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
        assert name == "cpu" or not name.startswith("cpu")  # there is no second one
    except (RuntimeError, AssertionError) as error:  # the second: torch without CUDA
        raise UserError(f"no device {name!r} here: use --device cpu") from error


def pick_device(kind, local_rank=0):
    """The torch.device of a process: kind is "auto", "cuda", "mps" or "cpu"."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() \
            else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"no CUDA device number {local_rank} here: use --device cpu, or fewer "
                        "processes per node")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device here: use --device cpu")
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(kind, local_rank if kind == "cuda" else None)


def keep_freed_memory():
    """Let glibc keep freed memory: otherwise every step on a CPU returns its activations to the
    kernel and gets them back page by page, which cost a third of the time (measured, 70M shape).
    Not for training on examples of varying length, whose sizes leave holes: twice the memory."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc (the last: Windows)
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too
