"""rank.py: its head is the formula, it fits what it can express, and the bottleneck is real."""

import json
import math
import os
import subprocess
import sys

import pytest
import rank
import torch

T, D = 12, 3


@pytest.fixture
def head():
    torch.manual_seed(0)
    X, (q, k, a, b, c) = torch.randn(2, T, D), (torch.randn(2, D, D) for _ in range(5))
    mask = torch.full((T, T), -math.inf).triu(1)
    return X, q, k, [a, b, c], mask


def test_scores_are_the_formulas(head):
    X, q, k, (a, b, c), mask = head
    none = [None, None]
    plain = X @ q @ k.mT @ X.mT / math.sqrt(D) + mask
    torch.testing.assert_close(rank.scores([q, k], none, X, mask, 1), plain)

    def attn(x, y, v):
        return (x @ y.mT / math.sqrt(D) + mask).softmax(-1) @ v

    Q, K = X @ q, X @ k
    twice = [attn(h, h, s) for h, s in ((attn(Q, Q, Q), Q), (attn(K, K, K), K))]
    torch.testing.assert_close(rank.scores([q, k], none, X, mask, 3),
                               twice[0] @ twice[1].mT / math.sqrt(D) + mask)
    once = [attn(s @ a, s @ b, s @ c) for s in (Q, K)]
    torch.testing.assert_close(rank.scores([q, k], [[a, b, c]] * 2, X, mask, 2),
                               once[0] @ once[1].mT / math.sqrt(D) + mask)


def test_order_1_fits_its_own_and_no_other(head):
    X, q, k, _, mask = head
    own = rank.scores([q / 2, k], [None, None], X, mask, 1).log_softmax(-1)
    other = (torch.randn(2, T, 2) @ torch.randn(2, 2, T) + mask).log_softmax(-1)  # rank 2 < d
    for target, low, high in ((own, -1e-6, 1e-4), (other, 0.05, 5)):
        left = rank.fit(X, target, mask, "order 1", 1500, 0.05)
        assert low <= left.min() and left.max() < high


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    argv = "--T 12 --d 3 --ranks 1,3 --seeds 2 --restarts 2 --steps 5".split()
    out = subprocess.run([sys.executable, rank.__file__, *argv, "--out", str(tmp_path)],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    kl = json.loads((tmp_path / "rank.json").read_text())["results"]
    assert list(kl) == ["causal", "not causal"] and list(kl["causal"]["3"]) == list(rank.VARIANTS)
    mean = sum(kl["causal"]["3"]["order 2"]["3"]) / 2
    assert f"{mean:.3f} ±" in out.stdout
    assert os.path.getsize(tmp_path / "rank.png") > 1000
    bad = subprocess.run([sys.executable, rank.__file__, "--d", "64"], capture_output=True,
                         text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
