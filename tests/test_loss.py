"""model.py's loss: torch's cross-entropy in value and gradients, whatever the parts and whatever
the output layer is."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cost import tracked_memory

import model as ours
from model import GPT, SumCrossEntropy
from nanonexus.flags import preset_config

ROWS = pytest.mark.parametrize("rows", [1, 3, 10**6])


def problem(dtype=torch.float64, N=8, C=5, V=11):
    """(what SumCrossEntropy takes after `learn` and `rows`, their sum of cross-entropies)"""
    torch.manual_seed(0)
    h, w = (torch.randn(n, C, dtype=dtype, requires_grad=True) for n in (N, V))
    targets = torch.randint(V, (N,))
    targets[2] = targets[7] = -1
    return (targets, h, w), F.cross_entropy(h @ w.T, targets, ignore_index=-1, reduction="sum")


@ROWS
def test_equals_cross_entropy_in_value_and_gradients(rows):
    given, want = problem()
    got, alone = (SumCrossEntropy.apply(learn, rows, *given) for learn in (True, False))
    torch.testing.assert_close((got, alone), (want, want))
    grads = [torch.autograd.grad(3 * loss, given[1:]) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert grads[0][0][[2, 7]].abs().max() == 0  # ignored rows


@ROWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_float32_sums(rows, dtype):
    given, exact = problem(torch.float32, N=64, C=32)
    with torch.autocast("cpu", dtype):
        rounded = SumCrossEntropy.apply(True, rows, *given)
    assert rounded.dtype == torch.float32 and 0 < abs(rounded - exact) < 0.02 * exact
    grads = [torch.autograd.grad(loss, given[1:]) for loss in (rounded, exact)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_small_gradients_survive_float16():
    """Of a mean over many rows: divided by their number before the cast they would be 0."""
    torch.manual_seed(0)
    h, w = torch.randn(2048, 32, requires_grad=True), torch.randn(512, 32) / 32
    targets, N = torch.randint(512, (2048,)), 2**16  # as of a batch of that many
    exact, = torch.autograd.grad(
        F.cross_entropy(h @ w.T, targets, reduction="sum") / N, h)
    with torch.autocast("cpu", torch.float16):
        mine, = torch.autograd.grad(SumCrossEntropy.apply(True, 512, targets, h, w) / N, h)
    assert (mine - exact).norm() < 0.01 * exact.norm()


def test_the_loss_of_a_model_is_the_cross_entropy_of_its_logits():
    torch.manual_seed(0)
    gpt, idx = GPT(preset_config("tiny")), torch.randint(256, (2, 33))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, :5] = -1

    def plain(**kwargs):
        return F.cross_entropy(gpt(x, **kwargs).flatten(0, 1), y.flatten(), ignore_index=-1)

    torch.testing.assert_close(gpt(x, y), plain())
    with torch.no_grad():
        torch.testing.assert_close(gpt(x, y), plain())
    docs = (torch.arange(32) > 9).long().expand(2, -1)
    torch.testing.assert_close(gpt(x, y, docs=docs), plain(docs=docs))
    assert abs(gpt(x, y) - gpt(x, y, docs=docs)) > 1e-5


def test_the_logits_are_never_all_in_memory():
    config = preset_config("tiny", vocab_size=2**16, n_layer=1, n_embd=16)
    on_cpu = SimpleNamespace(device="cpu", compile=False)
    peaks = [tracked_memory(name, config, 32, on_cpu) for name in ("plain loss", "")]
    logits = 4 * 32 * 256 * 2**16
    assert peaks[0] > 2 * logits and peaks[1] < peaks[0] - logits


@ROWS
def test_weights_that_an_edit_adds_to_the_output_layer_learn(rows, monkeypatch):
    """As in the soft-cap with a learned scale, which tests/test_change_it.py puts to every use."""
    def capped(h, weight, scale):
        return 2 * torch.tanh(scale * F.linear(h, weight) / 2)

    monkeypatch.setattr(ours, "output_layer", capped)
    (targets, h, w), _ = problem()
    given = h, w, torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    want = F.cross_entropy(capped(*given), targets, ignore_index=-1, reduction="sum")
    got = SumCrossEntropy.apply(True, rows, targets, *given)
    grads = [torch.autograd.grad(loss, given) for loss in (got, want)]
    torch.testing.assert_close((got, *grads[0]), (want, *grads[1]), rtol=0, atol=1e-12)
