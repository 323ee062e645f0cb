"""The estimate of what training needs is near torch's count, and what cannot fit is refused."""

from types import SimpleNamespace

import cost
import pytest
import torch
from test_train import run, tokens  # noqa: F401

from model import PRESETS, GPTConfig
from nanonexus import memory
from nanonexus.cli import UserError

ON_CPU = SimpleNamespace(device="cpu", compile=False)


@pytest.mark.parametrize("preset, kind", [
    ("tiny", dict()), ("tiny", dict(nexus_order=3)), ("pythia-70m", dict(nexus_order=2)),
    ("tiny", dict(nexus_order=2, nexus_inner="shared")),
    ("tiny", dict(nexus_order=3, nexus_inner="past"))])
def test_the_estimate_is_near_what_torch_counts(preset, kind):
    config = GPTConfig(**PRESETS[preset] | dict(block_size=512), **kind)
    small, large = (cost.peak_memory("", config, batch, ON_CPU) for batch in (8, 16))
    state, activations = memory.training_bytes(config, 8)
    assert large - small == pytest.approx(activations, rel=0.15)
    assert small == pytest.approx(state + activations, rel=0.25)


def test_what_cannot_fit_is_refused_with_the_flag_to_lower(tokens, tmp_path, monkeypatch):  # noqa: F811
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**26)
    with pytest.raises(UserError, match="GiB.*are free: lower --micro_batch"):
        run(tokens, tmp_path, "--batch_tokens", 2**17, "--micro_batch", 4096)
    with pytest.raises(UserError, match="lower --n_layer, --n_embd or"):
        run(tokens, tmp_path, "--n_embd", 1024)
    run(tokens, tmp_path, "--max_steps", 1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)  # unknown: try
    memory.check_fits(GPTConfig(**PRESETS["pythia-1b"]), 4096, torch.device("cpu"))
