"""cost.py: peaks and caches are what they should be, ratios are of the same round."""

import json
from types import SimpleNamespace

import cost
import pytest
import torch
from questions import done

from model import GPT, GPTConfig
from nanonexus.flags import PRESETS, preset_config
from nanonexus.generate import KVCache

ON_CPU = SimpleNamespace(device="cpu", compile=False)


def test_peak_memory_is_what_is_kept():
    def peak(batch, order):
        config = preset_config("tiny", n_layer=1, nexus_order=order)
        return cost.tracked_memory("", config, batch, ON_CPU)

    small, order2 = peak(16, 1), peak(16, 2)
    weights = 4 * 4 * GPT(preset_config("tiny", n_layer=1)).num_params()  # and gradient, moments
    stream = 16 * 256 * 128 * 4  # one (B, T, C) of float32; a layer keeps 2 rotated and 2 new ones
    assert weights < small and 4 * stream <= order2 - small <= 12 * stream


def test_cache_bytes_are_the_generations():
    model, cache = GPT(preset_config("tiny", nexus_order=3)), KVCache(10)
    model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    kept = sum(entry[:, :, :5].nbytes for entry in cache.entries.values())
    assert cost.cache_bytes(model) == kept / 5 == 4 * 128 * 4 * 2 * (1 + 2 * 2)


def test_speeds_pair_within_a_round():
    seconds = dict(baseline=[1.0, 2.0, 4.0], other=[2.0, 4.0, 8.0])  # a machine that slows down
    result = cost.speeds(seconds, "baseline", 100)["other"]
    assert result["ratio"] == 0.5 and result["quartiles"] == [0.5, 0.5] and result["rate"] == 25


@pytest.mark.parametrize("name", ["baseline", "baseline, plain loss", "order 2", "a control"])
def test_a_step_is_one_of_adamw_on_the_models_loss(name):
    config = GPTConfig(64, 16, 1, 2, 32, nexus_order=1 + (name == "order 2"),
                       control="key-shift" if name == "a control" else "")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(cost.build(config))
    idx, targets = torch.randint(64, (2, 3, 16))
    cost.training_step(name, models[0], idx, targets, ON_CPU)()
    models[1](idx, targets).backward()
    torch.optim.AdamW(models[1].parameters(), lr=1e-4, fused=True).step()
    for p, own in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, own, rtol=0, atol=2e-5)
        assert p.grad is None


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | dict(n_layer=1))

    def run(*argv):
        return done(cost.main, "--contexts", 32, "--tokens", 64, "--rounds", 2, "--out", tmp_path,
                    *argv)

    return run


def test_the_command(run, tmp_path):
    run("--orders", "1,2")
    results = json.loads((tmp_path / "cost.json").read_text())["results"]
    base, order2 = (results["tiny, 32"][name] for name in ("baseline", "order 2"))
    assert order2["parameters"] == base["parameters"] == 280_448
    assert order2["predicted"] == base["flops"] / order2["flops"] < 1


def test_variants_and_profiles(run, tmp_path):
    out = run("--variants", "cross", "--vocab_size", 500)
    body = [line.split() for line in out.splitlines()[3:-1]]
    assert [line[:2] for line in body] == [["baseline", "326,528"], ["cross", "326,528"]]
    assert body[0][2] < body[1][2]  # FLOPs
    said = run("--profile", "--orders", "1,2")
    assert said.count("ms busy") == 2 and "aten::mm" in said
    trace = json.loads((tmp_path / "tiny-32-order-2.json").read_text())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) > 40
