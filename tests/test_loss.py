"""model.py's loss: torch's cross-entropy in value and gradients, whatever the parts; and the output
layer, of which there is one: what stands there reaches training, scoring and sampling."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cost import tracked_memory

import model as ours
from model import GPT, SumCrossEntropy
from nanonexus.flags import preset_config
from nanonexus.generate import KVCache

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


class Scaled(GPT):
    """What a student writes into output_layer and output_weights: a learned scale."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(1.7))

    def output_weights(self):
        return self.head.weight, self.scale


def capped(h, weight, scale):
    return 2 * torch.tanh(scale * F.linear(h, weight) / 2)


def test_a_learned_scale_and_a_cap_reach_everything(monkeypatch):
    torch.manual_seed(0)
    gpt = Scaled(preset_config("tiny", n_layer=1, n_embd=16, block_size=16)).double()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    idx, gpt.scale.data[...] = torch.randint(320, (3, 16)), 1.7
    want = 2 * torch.tanh(gpt.scale * gpt.hidden_states(idx) @ gpt.head.weight.T / 2)
    monkeypatch.setattr(ours, "output_layer", capped)
    torch.testing.assert_close(gpt(idx), want)  # scoring, and sampling without a cache
    mine, theirs = gpt(idx, idx), F.cross_entropy(want.mT, idx)  # training
    grads = [torch.autograd.grad(loss, list(gpt.parameters())) for loss in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert dict(zip(dict(gpt.named_parameters()), grads[0], strict=True))["scale"].abs() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(gpt(idx, idx), theirs)  # validation
        cache = KVCache(16)
        parts = [gpt(part, cache=cache) for part in idx.split([5, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)  # sampling with one
