"""loss.py: the loss and gradients of torch's cross-entropy, whatever the pieces."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker

from model import GPT, PRESETS, GPTConfig
from nanonexus import loss
from nanonexus.loss import LinearCrossEntropy, TrainingLoss


@pytest.fixture(params=[1, 3, 10**6], ids=["a row", "some rows", "all rows"])
def rows(request, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", request.param * 11)


def problem(dtype=torch.float64, N=8, C=5, V=11):
    torch.manual_seed(0)
    h, w = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(V, (N,))
    targets[2] = targets[7] = -1
    return h.requires_grad_(), w.requires_grad_(), targets


def test_equals_cross_entropy_in_value_and_gradients(rows):
    h, w, targets = problem()
    mine = LinearCrossEntropy.apply(h, w, targets, torch.float64, True)
    theirs = F.cross_entropy(h @ w.T, targets, ignore_index=-1)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(3 * mine, [h, w]),
                    torch.autograd.grad(3 * theirs, [h, w]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.autograd.grad(LinearCrossEntropy.apply(h, w, targets, torch.float64, True),
                               h)[0][[2, 7]].abs().max() == 0  # ignored rows


def test_bfloat16_products_float32_sums(rows):
    h, w, targets = problem(torch.float32, N=64, C=32)
    exact = F.cross_entropy(h @ w.T, targets, ignore_index=-1)
    rounded = LinearCrossEntropy.apply(h, w, targets, torch.bfloat16, True)
    assert rounded.dtype == torch.float32 and 0 < abs(rounded - exact) < 0.02 * exact
    for a, b in zip(torch.autograd.grad(rounded, [h, w]), torch.autograd.grad(exact, [h, w]),
                    strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_of_a_model():
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(**PRESETS["tiny"])), torch.randint(256, (2, 33))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, :5] = -1
    torch.testing.assert_close(TrainingLoss(gpt)(x, y), gpt(x, y)[1])
    with torch.no_grad():
        torch.testing.assert_close(TrainingLoss(gpt)(x, y), gpt(x, y)[1])
    x[:, 9] = 256
    docs = torch.cat([torch.zeros(2, 9), torch.ones(2, 23)], 1).long()
    torch.testing.assert_close(TrainingLoss(gpt, eot=256)(x, y), gpt(x, y, docs=docs)[1])
    assert abs(TrainingLoss(gpt)(x, y) - gpt(x, y, docs=docs)[1]) > 1e-5


def test_the_logits_are_never_all_in_memory():
    peaks = []
    for run in (lambda gpt, x: gpt(x, x)[1], lambda gpt, x: TrainingLoss(gpt)(x, x)):
        gpt = GPT(GPTConfig(**PRESETS["tiny"] | dict(vocab_size=8192, n_layer=1)))
        tracker = MemTracker()
        tracker.track_external(gpt)
        with tracker, pytest.MonkeyPatch.context() as patch:
            patch.setitem(loss.CHUNK, "cpu", 8192 * 64)
            run(gpt, torch.zeros(4, 256, dtype=torch.long)).backward()
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    logits = 4 * 4 * 256 * 8192
    assert peaks[0] > 2 * logits and peaks[1] < peaks[0] - 1.5 * logits


def test_on_cuda_few_large_parts_of_whole_tiles():
    h = torch.empty(32768, 512, device="meta")
    rows = loss.rows_at_once(SimpleNamespace(device=torch.device("cuda")), 50304)
    assert rows % 256 == 0 and 1 <= len(h) / rows <= 4
    assert loss.rows_at_once(h.new_empty(5, 4, device="cpu"), 2**30) == 1  # never none
