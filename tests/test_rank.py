"""rank.py: its head is the formula, it fits what it can express, and the bottleneck is real."""

import json
import math

import pytest
import rank
import torch
from questions import done, drawn

T, D = 12, 3


@pytest.fixture
def head():
    torch.manual_seed(0)
    X, W = torch.randn(2, T, D), [torch.randn(2, D, D) for _ in range(8)]
    return X, W, *rank.masks(T, causal=True)


def attn(x, y, mask):
    return x @ y.mT / math.sqrt(D) + mask


def test_scores_are_the_formulas(head):
    X, W, mask, strict = head
    q, k, c = W[:3]
    Q, K = X @ q, X @ k
    plain = X @ q @ k.mT @ X.mT / math.sqrt(D) + mask
    torch.testing.assert_close(rank.scores("baseline", W, X, mask, strict), plain)

    def loop(x, y, v):
        return attn(x, y, mask).softmax(-1) @ v

    twice = [loop(h, h, s) for h, s in ((loop(Q, Q, Q), Q), (loop(K, K, K), K))]
    torch.testing.assert_close(rank.scores("self-3", W, X, mask, strict), attn(*twice, mask))
    once = [loop(s @ q, s @ k, s @ c) for s in (Q, K)]
    torch.testing.assert_close(rank.scores("shared", W[:3], X, mask, strict), attn(*once, mask))
    once = [loop(s @ a, s @ b, s @ v)
            for s, (a, b, v) in ((Q, W[2:5]), (K, W[5:]))]
    torch.testing.assert_close(rank.scores("separate", W, X, mask, strict), attn(*once, mask))

    def gathered(x, y, v):  # by strictly earlier tokens; the first gathers nothing
        rows = [torch.zeros_like(v[:, :1])]
        for t in range(1, T):
            weights = attn(x[:, t:t + 1], y[:, :t], 0).softmax(-1)
            rows.append(weights @ v[:, :t])
        return v + torch.cat(rows, 1)

    torch.testing.assert_close(rank.scores("past", W, X, mask, strict),
                               attn(gathered(Q, Q, Q), gathered(K, K, K), mask))
    torch.testing.assert_close(rank.scores("cross", W, X, mask, strict),
                               attn(gathered(Q, K, Q), gathered(Q, K, K), mask))
    gelu = torch.nn.functional.gelu
    torch.testing.assert_close(
        rank.scores("mlp", W, X, mask, strict),
        attn(gelu(X @ W[0]) @ W[1], gelu(X @ W[2]) @ W[3], mask))


def test_without_a_causal_mask_a_token_gathers_from_all_others():
    mask, strict = rank.masks(T, causal=False)
    assert (mask == 0).all() and (strict.diagonal() == -math.inf).all()
    assert torch.isinf(strict).sum() == T


def test_a_wider_head_is_the_same_head(head):
    X, _, mask, strict = head
    wide = [torch.randn(2, D, 4 * D) for _ in "qk"]
    same = [wide[0] @ wide[1].mT / 2, torch.eye(D).expand(2, D, D)]  # sqrt(4d) = 2 sqrt(d)
    torch.testing.assert_close(rank.scores("baseline", wide, X, mask, strict),
                               rank.scores("baseline", same, X, mask, strict))


def test_the_mlps_have_the_parameters_of_what_they_control():
    count = {variant: sum(w.numel() for w in rank.matrices(variant, 1, 16))
             for variant in rank.VARIANTS}
    assert count["mlp"] == count["baseline"] == count["self"] == count["past"] == 2 * 16**2
    assert count["mlp-1.5x"] == count["shared"] and count["mlp-4x"] == count["separate"]


def test_order_1_fits_its_own_and_no_other(head):
    X, (q, k, *_), mask, strict = head
    own = rank.scores("baseline", [q / 2, k], X, mask, strict).log_softmax(-1)
    other = (torch.randn(2, T, 2) @ torch.randn(2, 2, T) + mask).log_softmax(-1)  # rank 2 < d
    for target, low, high in ((own, -1e-6, 1e-4), (other, 0.05, 5)):
        left = rank.fit(X, target, mask, strict, "baseline", 1500, 0.05)
        assert low <= left.min() and left.max() < high


@pytest.mark.usefixtures("plots")
def test_the_command(tmp_path):
    argv = "--T 12 --d 3 --ranks 1,3 --seeds 2 --restarts 2 --steps 5".split()
    out = done(rank.main, *argv, "--out", tmp_path)
    saved = json.loads((tmp_path / "rank.json").read_text())
    assert saved["settings"]["seeds"] == 2
    assert {"commit", "python", "torch"} <= saved["versions"].keys()
    kl = saved["results"]
    assert list(kl) == ["causal", "not causal"] and list(kl["causal"]["3"]) == list(rank.VARIANTS)
    mean = sum(kl["causal"]["3"]["past"]["3"]) / 2
    assert f"{mean:.3f} ±" in out
    drawn(tmp_path / "rank.svg", rank.VARIANTS)
