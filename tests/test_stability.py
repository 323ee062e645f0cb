"""stability.py: its forms are what it says, and what it measures is correct."""

import json
import math
from types import SimpleNamespace

import pytest
import stability
import torch
from questions import done, drawn
from test_train import tokens  # noqa: F401

import model

ARGS = SimpleNamespace(width=16, steps=4)


ROPE = torch.ones(8, 2), torch.zeros(8, 2)  # nothing is rotated
CTX = model.AttnContext(0, "sdpa", ROPE, None, None, None, None)


def batches(seed, step):
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    idx = torch.randint(8, (2, stability.T + 1), generator=generator)
    return [idx[:, :-1], idx[:, 1:]]


def test_forms_part_at_order_3():
    for order, same in ((2, True), (3, False)):
        logits = [stability.build(order, form, 2, ARGS, 0)(batches(0, 0)[0])
                  for form in ("self", "free")]
        assert torch.equal(*logits) is same


def test_free_is_its_formula():
    attention = stability.build(3, "free", 1, ARGS, 0).blocks[0].attn
    q, k = torch.randn(2, 2, 4, 8, 4)  # (B, H, T, D) each
    causal = torch.full((8, 8), -math.inf).triu(1)
    for h, got in zip((q, k), attention.refine(None, q, k, None, CTX), strict=True):
        for _ in range(2):
            h = (h @ h.mT / 2 + causal).softmax(-1) @ h
        torch.testing.assert_close(got, h)


def test_without_the_anchor_streams_draw_together():
    idx = batches(0, 0)[0]
    spreads = {}
    for form in ("self", "free"):
        gpt, seen = stability.build(20, form, 1, ARGS, 0), []
        attention = gpt.blocks[0].attn
        refine = attention.refine
        attention.refine = lambda *args, refine=refine, seen=seen: seen.extend(
            refine(*args)) or seen
        gpt(idx)
        spreads[form] = [h.std(dim=2).mean().item() for h in seen]
    for free, anchored in zip(spreads["free"], spreads["self"], strict=True):  # of q and of k
        assert free < 0.5 * anchored


def test_gradients_and_logits_are_the_modules():
    gpt = stability.build(2, "self", 2, ARGS, 0)
    gpt(*batches(0, 0)).backward()
    norms = stability.gradients(gpt)
    weight = gpt.blocks[1].attn.qkv.weight.grad
    assert norms.shape == (2, 3) and norms[1, 2] == weight[32:].norm()
    before = stability.largest_logit(gpt, batches(0, 0)[0])
    with torch.no_grad():
        for block in gpt.blocks:
            block.attn.qkv.weight[:32] *= 2
    assert 3 < stability.largest_logit(gpt, batches(0, 0)[0]) / before < 5  # about 2 x 2


def test_the_largest_logit_is_one_that_a_softmax_sees():
    scores = 100 * torch.ones(8, 8).triu(1) + 50 * torch.eye(8) - 10 * torch.ones(8, 8).tril(-1)
    q, k = torch.eye(8)[None, None], 8**0.5 * scores.T[None, None]
    ctx = CTX._replace(rope=(torch.ones(8, 4), torch.zeros(8, 4)))
    for strict, largest in ((False, 50), (True, 10)):
        assert stability.largest_logit(lambda idx, strict=strict: model.attend(
            q, k, k, ctx, strict=strict), None) == pytest.approx(largest)


def test_divergence_is_seen():
    args = SimpleNamespace(width=16, steps=14)
    wild, tame = (stability.train(2, "self", 2, lr, args, 0, batches) for lr in (100.0, 0.03))
    assert wild["diverged"] and not tame["diverged"]


@pytest.mark.usefixtures("plots")
def test_the_command(tmp_path, tokens, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stability, "pydocs", lambda folder: tokens)
    argv = "--orders 1,3 --depths 1 --lrs 1e-2 --steps 3 --seeds 2 --width 16".split()
    out = done(stability.main, *argv, "--out", tmp_path)
    runs = json.loads((tmp_path / "stability.json").read_text())["results"]
    assert runs["free 1 depth 1 lr 0.01"] == runs["self 1 depth 1 lr 0.01"]
    loss = sum(run["loss"] for run in runs["free 3 depth 1 lr 0.01"]) / 2
    assert f"{loss:.3f} ±" in out
    drawn(tmp_path / "stability.svg", stability.FORMS)
    monkeypatch.setattr(stability, "train", None)  # nothing is measured again
    assert done(stability.main, *argv, "--out", tmp_path).splitlines()[:-1] == out.splitlines()[:-1]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (1 + len(stability.FORMS))  # order 1 is one model
