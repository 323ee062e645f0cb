"""stability.py: its forms are what it says, and what it measures is there."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import stability
import torch

ARGS = SimpleNamespace(width=16, steps=4)


def batches(seed, step):
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    idx = torch.randint(8, (2, stability.T + 1), generator=generator)
    return [idx[:, :-1], idx[:, 1:]]


def test_forms_part_at_order_3():
    for order, same in ((2, True), (3, False)):
        logits = [stability.build(order, form, 2, ARGS, 0)(batches(0, 0)[0])[0]
                  for form in stability.FORMS]
        assert torch.equal(*logits) is same


def test_without_the_anchor_streams_draw_together():
    idx = batches(0, 0)[0]
    spreads = {}
    for form in stability.FORMS:
        model, seen = stability.build(40, form, 1, ARGS, 0), []
        attention = model.blocks[0].attn
        refine = attention.refine
        attention.refine = lambda s, env, refine=refine, seen=seen: seen.append(refine(s, env)) \
            or seen[-1]
        model(idx)
        spreads[form] = seen[0].std(dim=2).mean().item()
    assert spreads["free"] < 0.5 * spreads["anchored"]


def test_gradients_and_logits_are_the_modules(monkeypatch):
    model = stability.build(2, "anchored", 2, ARGS, 0)
    model(*batches(0, 0))[1].backward()
    norms = stability.gradients(model)
    weight = model.blocks[1].attn.qkv.weight.grad
    assert norms.shape == (2, 3) and norms[1, 2] == weight[32:].norm()
    before = stability.largest_logit(model, batches(0, 0)[0])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:32] *= 2
    assert 3 < stability.largest_logit(model, batches(0, 0)[0]) / before < 5  # about 2 x 2
    assert "attend" not in vars(model.blocks[0].attn)


def test_divergence_is_seen():
    args = SimpleNamespace(width=16, steps=14)
    wild, tame = (stability.train(2, "anchored", 2, lr, args, 0, batches) for lr in (100.0, 0.03))
    assert wild["diverged"] and not tame["diverged"]


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    argv = "--orders 1,3 --depths 1 --lrs 1e-2 --steps 3 --seeds 2 --width 16".split()
    out = subprocess.run([sys.executable, stability.__file__, *argv, "--out", str(tmp_path)],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    runs = json.loads((tmp_path / "stability.json").read_text())["results"]["training"]
    assert runs["free 1 depth 1 lr 0.01"] == runs["anchored 1 depth 1 lr 0.01"]
    loss = sum(run["loss"] for run in runs["free 3 depth 1 lr 0.01"]) / 2
    assert f"{loss:.3f} ±" in out.stdout and (tmp_path / "stability.png").exists()
    bad = subprocess.run([sys.executable, stability.__file__, "--orders", "2"],
                         capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
