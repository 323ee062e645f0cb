"""
Does it fit? An estimate of what training needs, before it begins, against what the machine has.
"""

import contextlib

import torch

from model import ModelError
from nanonexus.cli import UserError


def check_size(config):
    """Raises ModelError for a typo that would exhaust the machine's memory."""
    size = config.n_embd * (12 * config.n_layer * config.n_embd + 2 * config.vocab_size
                            + config.block_size)
    if size > 1e12:
        raise ModelError(f"vocab_size, block_size, n_layer and n_embd make {size:.0e} numbers: "
                         "more than a trillion")


def training_bytes(config, micro_batch, bf16=False, recompute=False):
    """(bytes of weights, gradients and AdamW's moments; bytes of activations) of a training step.

    The second is what backward needs per token, layer and channel: 20 numbers, and 2 for each
    inner attention, 3 in cross, which reads both streams, 4 in shared, which projects them first
    (by torch's tracker, experiments/cost.py).
    """
    c = config
    weights = 2 * c.vocab_size * c.n_embd + c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)
    loops = 0 if recompute else len(c.nexus_streams) * (c.nexus_order - 1)
    numbers = 20 + loops * {"shared": 4, "cross": 3}.get(c.nexus_inner, 2)
    tokens = micro_batch * c.block_size
    return 16 * weights, tokens * c.n_layer * c.n_embd * numbers * (2 if bf16 else 4)


def available_bytes(device):
    """Free memory of a device: the GPU's, or what the machine and its cgroup leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration), \
            open("/proc/meminfo", encoding="ascii") as f:
        line = next(line for line in f if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    for limit, used in (("memory.max", "memory.current"),  # version 2, then version 1
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError), \
                open(f"/sys/fs/cgroup/{limit}", "rb") as f, \
                open(f"/sys/fs/cgroup/{used}", "rb") as g:
            found.append(int(f.read()) - int(g.read()))
    return min(found, default=None)  # None: unknown on this system


def check_fits(config, micro_batch, device, bf16=False, recompute=False):
    """Raises UserError, with the flag to lower, if not even 80% of the estimate fits."""
    free = available_bytes(device)
    state, activations = training_bytes(config, micro_batch, bf16, recompute)
    if free is None or 0.8 * (state + activations) <= free:
        return
    gib = 2**30
    lower = "--micro_batch" if state < 0.8 * free and micro_batch > 1 else \
        "--n_layer, --n_embd or --block_size"
    raise UserError(f"training needs about {(state + activations) / gib:.1f} GiB "
                    f"({state / gib:.1f} for weights and optimizer, {activations / gib:.1f} for "
                    f"activations), and {free / gib:.1f} are free: lower {lower}")
