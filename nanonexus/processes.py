"""
The processes of a run under torchrun, and the signals that ask them to stop.
"""

import os
import signal
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanonexus.device import pick_device


class Processes(NamedTuple):
    """How many there are, which one this is, and its device."""

    size: int
    rank: int
    device: torch.device

    def mean(self, total, count):
        """Over all processes: the sum of their totals over the sum of their counts, a float."""
        pair = torch.stack([total.float(), torch.tensor(float(count), device=self.device)])
        if self.size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    def any(self, flag):
        return self.mean(torch.tensor(float(flag), device=self.device), 1) > 0

    def synchronize(self):
        """Wait until this process's device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def wait(self):
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()


def join_processes(kind):
    """The Processes that torchrun has started (or this one alone), on devices of that kind."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = pick_device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return Processes(size, rank, device)


class Stop:
    """When to stop early: after Ctrl-C, SIGTERM (the system) or SIGUSR1 (Slurm, before its limit),
    or after max_minutes. A second signal stops at once."""

    def __init__(self, deadline):
        self.deadline, self.signal = deadline, None
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.on_signal)

    def on_signal(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self):
        return self.signal is not None or time.monotonic() > self.deadline
