"""
The processes of a run under torchrun, and the signals that ask them to stop.
"""

import os
import signal
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanonexus.cli import UserError
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
    """The Processes that torchrun has started (or this one alone), on devices of that kind. Raises
    UserError for an environment that is not torchrun's."""
    given = {name: os.environ.get(name, default) for name, default in (
        ("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))}
    hint = "start several processes with torchrun; for one, unset WORLD_SIZE, RANK and LOCAL_RANK"
    try:
        size, rank, local_rank = map(int, given.values())
        if not 0 <= rank < size or local_rank < 0:
            raise ValueError
    except ValueError as error:
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(f"the environment has {found}: {hint}") from error
    device = pick_device(kind, local_rank)
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    device_id=device if device.type == "cuda" else None)
        except (ValueError, RuntimeError) as error:  # no MASTER_ADDR, nobody there
            raise UserError(f"cannot join the other processes ({str(error).splitlines()[0]}): "
                            f"{hint}") from error
    return Processes(size, rank, device)


class Stop:
    """When to stop early: at the deadline or, within `with stop:`, after Ctrl-C, SIGTERM (the
    system), SIGHUP (the terminal has gone) or SIGUSR1 (Slurm, before its limit). A Ctrl-C after one
    of them stops at once; the system may well send the others twice. Without a deadline the first
    of them ends the block at once, as an exception."""

    def __init__(self, deadline=None):
        self.deadline, self.signal, self.before = deadline, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)  # Windows lacks two
                ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN  # nohup
                if number and not ignored:
                    self.before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_signal(self, number, frame):
        again, self.signal = self.signal, self.signal or number
        if number == signal.SIGINT and (again or self.deadline is None):
            raise KeyboardInterrupt
        if self.deadline is None and not again:
            sys.exit(128 + number)

    def asked(self):
        return self.signal is not None or time.monotonic() > self.deadline
