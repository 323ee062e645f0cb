"""spectrum.py: its measures give what is known on matrices whose answer is known."""

import json
import math
import os
import subprocess
import sys

import pytest
import spectrum
import torch

from model import GPT, GPTConfig


def test_effective_rank():
    assert spectrum.effective_rank(torch.ones(7)).item() == pytest.approx(7)
    assert spectrum.effective_rank(torch.tensor([3.0, 0, 0])).item() == pytest.approx(1)


def test_entropy_is_relative_to_uniform():
    uniform = torch.tril(torch.ones(6, 6)).double()
    uniform /= uniform.sum(-1, keepdim=True)
    assert spectrum.entropy(uniform).item() == pytest.approx(1)
    assert spectrum.entropy(torch.eye(6).double()).item() == pytest.approx(0)


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
                       nexus_order=2, nexus_streams="k", attention="manual")
    model = GPT(config)
    with torch.no_grad():  # the second layer's keys are all alike: its inner maps are uniform
        model.blocks[1].attn.qkv.weight[8:16] = 0
    monkeypatch.setattr(spectrum, "load_checkpoint", lambda path, attention: (model, None))
    rows = spectrum.measure("", torch.randint(32, (3, 16)), 0.01)["rows"]
    assert rows["inner k entropy"][1] == pytest.approx(1) and rows["inner k entropy"][0] < 0.999999
    assert rows["inner q entropy"] == [None, None]
    own = sum(1 / t for t in range(2, 17)) / 15
    assert rows["own token, k"][1] == pytest.approx(own)
    assert rows["effective rank"][0] <= 4 + 1e-9  # D


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    out = subprocess.run([sys.executable, spectrum.__file__, "--quick", "--seeds", "1", "--out",
                          str(tmp_path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "spectrum.json").read_text())["results"]
    rows = results["nexus-2"][0]["rows"]
    assert len(rows["cosine q"]) == 2 and all(-1 <= c <= 1 for c in rows["cosine q"])
    assert f"{rows['effective rank'][0]:.2f} ±" in out.stdout
    assert os.path.getsize(tmp_path / "spectrum.png") > 1000
    again = subprocess.run([sys.executable, spectrum.__file__, "--runs", str(tmp_path / "compare"),
                            "--seeds", "2"], capture_output=True, text=True)
    assert again.returncode == 2 and "1 checkpoints of baseline, not 2" in again.stderr
