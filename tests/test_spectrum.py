"""spectrum.py: its measures are right on matrices whose answer is known."""

import json
import math

import pytest
import runs
import spectrum
import torch
from questions import done, drawn
from test_induction import one_step

from model import GPT, GPTConfig, attend


def test_effective_rank_and_entropy_relative_to_uniform():
    assert spectrum.effective_rank(torch.ones(7)).item() == pytest.approx(7)
    assert spectrum.effective_rank(torch.tensor([3.0, 0, 0])).item() == pytest.approx(1)
    uniform, earlier = torch.ones(6, 6).double().tril(), torch.ones(6, 6).double().tril(-1)
    uniform /= uniform.sum(-1, keepdim=True)
    earlier[1:] /= earlier[1:].sum(-1, keepdim=True)
    assert spectrum.is_strict(earlier) and not spectrum.is_strict(uniform)
    for weights, entropy in ((uniform, 1), (earlier, 1), (torch.eye(6).double(), 0)):
        assert spectrum.entropy(weights).item() == pytest.approx(entropy)


def test_token_shares():
    weights = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.7, 0], [0, 0, 0.4, 0.6]])
    own, before = spectrum.token_shares(weights)
    assert own.item() == pytest.approx(0.6) and before.item() == pytest.approx(1.1 / 3)
    strict = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0.7, 0.3, 0]])
    own, before = spectrum.token_shares(strict)
    assert own.item() == 0 and before.item() == pytest.approx(0.2)  # the second row has no choice


def test_at_the_start_a_wide_head_reads_mostly_itself():
    for D in (16, 128):
        own = [spectrum.at_start("self", 64, D, seed)[0] for seed in range(3)]
        others = torch.arange(1, 64) * torch.exp(torch.tensor(0.08 - 0.4 * D**0.5))  # rows 2 to 64
        assert sum(own) / 3 == pytest.approx((1 / (1 + others)).mean().item(), rel=0.15)
        for inner in ("past", "cross"):
            own, before = spectrum.at_start(inner, 64, D, 0)
            even = sum(1 / t for t in range(2, 64)) / 62
            assert own == 0 and before == pytest.approx(even, rel=0.4)


def test_maps_are_assigned_to_layers_loops_and_streams():
    names = ["q1", "k1", "q2", "k2", "outer"]
    maps = {(layer, name): torch.full((1, 1, 2, 2), 5.0 * layer + i)
            for layer in (0, 1) for i, name in enumerate(names)}
    first, second = spectrum.by_layer(maps, GPTConfig(n_layer=2, nexus_order=3))
    assert [m.mean().item() for m in first[0]["q"]] == [0, 2] and first[1].mean() == 4
    assert [m.mean().item() for m in second[0]["k"]] == [6, 8] and second[1].mean() == 9
    keys = spectrum.by_layer(maps, GPTConfig(n_layer=2, nexus_order=2, nexus_streams="k"))
    assert [list(inner) for inner, _ in keys] == [["k"], ["k"]]
    outer = {key: weights for key, weights in maps.items() if key[1] == "outer"}
    plain = spectrum.by_layer(outer, GPTConfig(n_layer=2))
    assert [inner for inner, _ in plain] == [{}, {}] and plain[1][1].mean() == 9


def test_block_has_the_rank_of_the_scores_and_is_blind_to_the_softmax():
    torch.manual_seed(0)
    T, D = 32, 3
    scores = torch.randn(T, D).double() @ torch.randn(D, T).double()
    weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    corner = scores[T // 2:, :T // 2]
    log = spectrum.block(weights)
    torch.testing.assert_close(log, corner - corner.mean(-1, keepdim=True))
    assert torch.linalg.matrix_rank(log) == D


def test_outside_span():
    torch.manual_seed(0)
    B, T, C = 2, 40, 5
    x = torch.randn(B, T, C).double()
    inside = x[:, 20:] @ torch.randn(C, C).double() @ x[:, :20].mT
    assert spectrum.outside_span(inside[:, None], x).abs().max() < 1e-9
    random = torch.randn(B, 1, 20, 20).double()  # (C + 1)^2 of 400 dimensions are reached
    share = spectrum.outside_span(random, x)
    assert 0.8 < share.min() and share.max() < 1


def test_measure_reads_the_streams_and_maps_of_the_right_layer(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, block_size=16, n_layer=2, n_head=2, n_embd=8, rotary_pct=1.0,
                       nexus_order=2, nexus_inner="self", nexus_streams="k", attention="manual")
    model = GPT(config)
    with torch.no_grad():  # the second layer's keys are all equal: its inner maps are uniform
        model.blocks[1].attn.qkv.weight[8:16] = 0
    monkeypatch.setattr(spectrum, "load_checkpoint", lambda path, attention: (model, None))
    idx = torch.randint(32, (3, 16))
    found = spectrum.measure("", idx, 0.01, [8, 16])
    rows = found["rows"]
    for layer, block in enumerate(model.blocks):
        seen = []
        block.attn.register_forward_pre_hook(lambda attn, given, seen=seen: seen.append(given))
        model(idx)
        _, k, _ = block.attn.project(seen[0][0])
        refined = attend(k, k, k, seen[0][1])
        assert rows["cosine, k"][layer] == pytest.approx(
            torch.cosine_similarity(k, refined, dim=-1).mean().item())
    assert rows["entropy, k"][1] == pytest.approx(1) and rows["entropy, k"][0] < 0.999999
    assert rows["cosine, q"] == rows["entropy, q"] == [None, None]
    own = sum(1 / t for t in range(2, 17)) / 15
    assert rows["own token, k"][1] == rows["token before, k"][1] == pytest.approx(own)
    both = [sum(rows[f"{name}, k"]) / 2 for name in ("own token", "token before")]
    assert found["shares"][16] == pytest.approx(both)  # over layers
    assert found["shares"][8] == pytest.approx(spectrum.shares(model, idx[:, :8]))
    assert rows["effective rank"][0] <= 4 + 1e-9  # D


def test_measure_of_tokens_whose_one_map_serves_queries_and_keys(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, block_size=16, n_layer=2, n_head=2, n_embd=8,
                          rotary_pct=1.0, nexus_order=2, nexus_inner="tokens", attention="manual"))
    with torch.no_grad():  # the second layer's keys are all equal: its inner maps are uniform
        model.blocks[1].attn.qkv.weight[8:16] = 0
    monkeypatch.setattr(spectrum, "load_checkpoint", lambda path, attention: (model, None))
    rows = spectrum.measure("", torch.randint(32, (3, 16)), 0.01, [16])["rows"]
    assert rows["entropy, h"][1] == pytest.approx(1) and rows["entropy, h"][0] < 0.999999
    assert rows["entropy, q"] == rows["own token, k"] == [None, None]
    assert all(-1 <= cosine < 0.999 for cosine in rows["cosine, q"] + rows["cosine, k"])


@pytest.mark.usefixtures("plots")
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "compare", one_step)
    printed = done(spectrum.main, "--quick", "--seeds", 1, "--widths", "8,16", "--variants",
                   "baseline,past", "--out", tmp_path)
    results = json.loads((tmp_path / "spectrum.json").read_text())["results"]
    rows = results["trained"]["past"][0]["rows"]
    assert len(rows["cosine, q"]) == 2 and all(-1 <= c <= 1 for c in rows["cosine, q"])
    assert f"{rows['effective rank'][0]:.2f} ±" in printed
    (before,) = [x["shares"][0][1] for x in results["untrained"]
                 if (x["inner"], x["D"], x["T"]) == ("past", 16, 64)]
    assert f"{before:.3f} ±" in printed.split("trained, mean")[1]
    drawn(tmp_path / "spectrum.svg", ["baseline", "past"])
