"""cost.py: the arithmetic it reports is torch's count, and its ratios are of the same round."""

import json
import sys
from types import SimpleNamespace

import cost
import pytest
import torch

from model import GPT, PRESETS, GPTConfig
from nanonexus.cli import run_script
from nanonexus.generate import KVCache


@pytest.mark.parametrize("kind", [dict(), dict(nexus_order=3), dict(nexus_order=2,
                         nexus_inner="shared"), dict(nexus_order=3, nexus_inner="past",
                         nexus_streams="k"), dict(nexus_order=2, nexus_streams="q")])
def test_the_models_flops_are_torchs(kind):
    config = GPTConfig(**PRESETS["tiny"], **kind)
    assert cost.counted_flops(config) == pytest.approx(cost.own_flops(config), rel=0.01)


ON_CPU = SimpleNamespace(device="cpu", compile=False, gib=0.25)


def test_peak_memory_grows_with_order_by_what_is_kept():
    small, order2, long = (cost.peak_memory("", GPTConfig(**PRESETS["tiny"] | kind), 2, ON_CPU)
                           for kind in (dict(), dict(nexus_order=2), dict(block_size=512)))
    weights = 4 * 4 * GPT(GPTConfig(**PRESETS["tiny"])).num_params()  # and gradient, two moments
    assert weights < small < order2 < long
    stream = 2 * 256 * 128 * 4  # one (B, T, C) of float32; a layer keeps 2 rotated and 2 new ones
    assert 4 * 4 * stream <= order2 - small <= 4 * 12 * stream


def test_the_largest_batch_fits_and_one_more_does_not():
    config = GPTConfig(**PRESETS["tiny"], nexus_order=2)
    peak = cost.peak_memory("", config, 4, ON_CPU)
    fits = cost.largest_batch("", config, 4, peak, ON_CPU)
    assert cost.peak_memory("", config, fits, ON_CPU) <= ON_CPU.gib * 2**30 \
        < cost.peak_memory("", config, fits + 1, ON_CPU)


def test_cache_bytes_are_the_generations():
    config = GPTConfig(**PRESETS["tiny"], nexus_order=3)
    model, cache = GPT(config), KVCache(10)
    model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    kept = sum(b[:, :, :5].nbytes for layer in cache.layers for b in layer.buffers)
    assert cost.cache_bytes(model) == kept / 5 == 4 * 128 * 4 * (2 + 2 * 3)


def test_speeds_pair_within_a_round():
    seconds = dict(baseline=[1.0, 2.0, 4.0], other=[2.0, 4.0, 8.0])  # a machine that slows down
    result = cost.speeds(seconds, "baseline", 100)["other"]
    assert result["ratio"] == 0.5 and result["quartiles"] == [0.5, 0.5] and result["rate"] == 25


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv = "--contexts 16,32 --tokens 64 --orders 1,2 --rounds 2 --new_tokens 4".split()
    monkeypatch.setattr(sys, "argv", [cost.__file__, *argv, "--out", str(tmp_path)])
    cost.main()
    results = json.loads((tmp_path / "cost.json").read_text())["results"]
    short, long = (results["training"][f"tiny, {T}"]["order 2"] for T in (16, 32))
    assert short["parameters"] == 875_264 and short["predicted"] > long["predicted"]
    assert "order 2, recomputed" in results["generation"]["tiny"]
    assert (tmp_path / "cost.svg").exists()
    for wrong in (["--orders", "2"], ["--presets", "huge"], ["--nanogpt", "nowhere.py"],
                  ["--gib", "-1"]):
        monkeypatch.setattr(sys, "argv", ["cost.py", *wrong])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(cost.main)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
