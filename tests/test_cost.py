"""cost.py: peaks and caches are what they should be, ratios are of the same round, the variants are
those that compare.py trains."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import compare
import cost
import pytest
import torch

from model import GPT, GPTConfig
from nanonexus.cli import run_script
from nanonexus.flags import PRESETS, preset_config
from nanonexus.generate import KVCache

ON_CPU = SimpleNamespace(device="cpu", compile=False)


def peak(batch, **kind):
    return cost.tracked_memory("", preset_config("tiny", n_layer=1, **kind), batch, ON_CPU)


def test_peak_memory_grows_with_order_by_what_is_kept():
    small, order2, long = (peak(2, **kind) for kind in (
        dict(), dict(nexus_order=2), dict(block_size=512)))
    weights = 4 * 4 * GPT(preset_config("tiny", n_layer=1)).num_params()  # and gradient, moments
    assert weights < small < order2 < long
    stream = 2 * 256 * 128 * 4  # one (B, T, C) of float32; a layer keeps 2 rotated and 2 new ones
    assert 4 * stream <= order2 - small <= 12 * stream


def test_the_largest_batch_fits_and_one_more_does_not():
    order_2 = partial(peak, nexus_order=2, nexus_inner="cross")
    fits = cost.largest_batch(16, order_2(16), order_2(32), 1 / 8)
    assert order_2(fits) <= 2**27 < order_2(fits + 1)


def test_cache_bytes_are_the_generations():
    model, cache = GPT(preset_config("tiny", nexus_order=3)), KVCache(10)
    model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    kept = sum(entry[:, :, :5].nbytes for entry in cache.entries.values())
    assert cost.cache_bytes(model) == kept / 5 == 4 * 128 * 4 * 2 * (1 + 2 * 2)


def test_speeds_pair_within_a_round():
    seconds = dict(baseline=[1.0, 2.0, 4.0], other=[2.0, 4.0, 8.0])  # a machine that slows down
    result = cost.speeds(seconds, "baseline", 100)["other"]
    assert result["ratio"] == 0.5 and result["quartiles"] == [0.5, 0.5] and result["rate"] == 25


SHAPE = "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32".split()


def test_a_variant_is_what_compare_trains():
    plan = compare.Plan(*compare.parse_args(["--", *SHAPE]), 2048)
    args = SimpleNamespace(variants=list(compare.VARIANTS))
    for name, config in cost.chosen(GPTConfig(2048, 32, 1, 2, 32), args).items():
        given = compare.model_fields(plan.run(name, 0).flags)
        assert {"nexus_order", "n_embd"} <= given.keys()
        for field, value in given.items():
            assert getattr(config, field) == value, (name, field)
        assert config.control == given.get("control", "")


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


TRAINING = "--contexts 16,32 --tokens 64 --rounds 2".split()


def run(monkeypatch, *argv):
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | dict(n_layer=1))
    monkeypatch.setattr(sys, "argv", ["cost.py", *TRAINING, *argv])
    run_script(cost.main)


@pytest.mark.usefixtures("plots")
def test_the_command(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--orders", "1,2", "--new_tokens", "4", "--out", str(tmp_path))
    results = json.loads((tmp_path / "cost.json").read_text())["results"]
    short, long = (results["training"][f"tiny, {T}"]["order 2"] for T in (16, 32))
    assert short["parameters"] == 280_448 and short["predicted"] > long["predicted"]
    assert "order 2, recomputed" in results["generation"]["tiny"]
    assert (tmp_path / "cost.svg").exists()
    for wrong in (["--orders", "2"], ["--presets", "huge"], ["--nanogpt", "nowhere.py"],
                  ["--gib", "-1"], ["--variants", "longer"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("plots")
def test_variants_and_profiles(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--variants", "key-shift,cross", "--vocab_size", "500", "--contexts",
        "32", "--gib", "1", "--out", str(tmp_path))
    body = [line.split() for line in capsys.readouterr().out.splitlines()[3:-1]]
    assert [line[0] for line in body] == ["baseline", "key-shift", "cross"]
    parameters, flops = ([line[i] for line in body] for i in (1, 2))
    assert parameters == ["326,528", "326,532", "326,528"] and flops[0] == flops[1] < flops[2]
    assert all(100 < int(line[7]) < 10_000 for line in body)  # windows of 32 tokens in 1 GiB
    run(monkeypatch, "--profile", "--orders", "1,2", "--out", str(tmp_path))
    said = capsys.readouterr().out
    assert said.count("ms busy") == 4 and "aten::mm" in said
    trace = json.loads((tmp_path / "tiny-32-order-2.json").read_text())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) > 40
