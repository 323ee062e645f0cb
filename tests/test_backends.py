"""model.py's backends beyond sdpa and manual: flex, document masks, recomputation, compilation."""

import shutil
import warnings
from functools import partial

import pytest
import torch
import torch._dynamo
from test_model import ALL, INNER, VARIANTS, float64, make, name, tokens  # noqa: F401
from test_train import run
from test_train import tokens as tokens_on_disk  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from nanonexus.generate import KVCache

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def same_weights(gpt, **changes):
    other = make(**vars(gpt.config) | changes)
    other.load_state_dict(gpt.state_dict())
    return other


@pytest.mark.parametrize("variant, backend", [
    *((variant, backend) for variant in ALL for backend in ("sdpa", "manual")),
    *((variant, "flex") for variant in ALL[:1 + len(INNER)])], ids=str)
@torch.no_grad()
def test_packed_documents_are_as_if_alone_with_and_without_a_cache(variant, backend):
    """Nothing leaks, not even through the refined keys: each document has the logits that it has
    by itself (rotary positions are relative), whatever its neighbours are."""
    gpt, idx, lengths = make(attention=backend, **variant), tokens(2, 16), ((5, 1, 10), (3, 12, 1))
    docs = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed, cache, parts, end = gpt(idx, docs=docs), KVCache(24), [], 0
    plain = same_weights(gpt, attention="manual")
    for row, out, parted in zip(idx, packed, lengths, strict=True):
        alone = torch.cat([plain(part[None])[0] for part in row.split(parted)])
        torch.testing.assert_close(out, alone, rtol=0, atol=1e-9)
    assert not torch.allclose(plain(idx), packed)
    for part in idx.split((6, 1, 1, 8), 1):
        end += part.size(1)
        parts.append(gpt(part, cache=cache, docs=docs[:, :end]))
    torch.testing.assert_close(torch.cat(parts, 1), packed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", [ALL[0], VARIANTS[0], VARIANTS[-1]], ids=name)
@torch.no_grad()
def test_flex_equals_manual_in_more_than_one_block(variant):
    shape = dict(n_head=2, n_embd=64, rotary_pct=0.25, block_size=300, n_layer=1)
    gpt, idx = make(attention="manual", **variant, **shape), tokens(2, 261)  # not a multiple of 128
    flex = same_weights(gpt, attention="flex")
    for docs in (None, (torch.rand(2, 261) < 0.02).cumsum(1)):
        torch.testing.assert_close(flex(idx, docs=docs), gpt(idx, docs=docs), rtol=0, atol=1e-9)


@torch.no_grad()
def test_flex_with_documents_is_one_graph_with_masks_made_outside():
    """As far as a CPU can tell: forward, traced."""
    gpt, idx = make(attention="flex", nexus_order=2, nexus_inner="past"), tokens(2, 20)
    docs = (torch.arange(20) > 6).long().expand(2, -1)
    torch._dynamo.reset()
    run = torch.compile(gpt, fullgraph=True, backend="eager")
    mask, want = gpt.attention_mask(20, 0, docs, idx.device), gpt(idx, idx, docs=docs)
    assert torch.equal(run(idx, idx, mask=mask), want) and not torch.equal(gpt(idx, idx), want)


@CUDA
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("variant", ALL, ids=name)
def test_outputs_and_gradients_on_cuda(variant, backend, dtype, error):
    """Against manual attention in float32 on the same device, errors relative to the norm."""
    torch._dynamo.reset()  # else the ninth configuration hits the recompilation limit
    torch.set_default_dtype(torch.float32)
    shape = dict(n_head=2, n_embd=128, block_size=300)
    idx = tokens(2, 261).cuda()
    docs = (torch.rand(2, 261, device="cuda") < 0.02).cumsum(1) if backend == "flex" else None
    gpt = make(attention="manual", **variant, **shape).cuda()
    other = same_weights(gpt, attention=backend).cuda()
    run = torch.compile(other, fullgraph=True)
    x, y = idx[:, :-1], idx[:, 1:]
    kwargs = dict(docs=None if docs is None else docs[:, :-1])
    want, loss = gpt(x, **kwargs), gpt(x, y, **kwargs)
    loss.backward()
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        got, loss = run(x, **kwargs), run(x, y, **kwargs)
    loss.backward()
    assert (got - want).norm() < error * want.norm()
    for p, r in zip(other.parameters(), gpt.parameters(), strict=True):
        assert (p.grad - r.grad).norm() < 5 * error * r.grad.norm() + 1e-6


@CUDA
@pytest.mark.parametrize("order", [1, 2])
def test_sdpa_runs_flash_on_cuda(order):
    torch.set_default_dtype(torch.float32)
    gpt, idx = make(nexus_order=order).cuda(), tokens(2, 24).cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), \
            torch.autocast("cuda", torch.bfloat16):  # any other kernel would raise
        gpt(idx, idx).backward()


@pytest.mark.parametrize("order", [1, 3])
def test_no_square_of_the_context_is_ever_in_memory(order):
    T, largest = 512, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                largest[0] = max(largest[0], x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    for backend, square in (("sdpa", False), ("manual", True)):
        gpt = make(attention=backend, n_embd=16, block_size=T, n_layer=1, nexus_order=order)
        idx, largest[0] = tokens(1, T), 0
        with Watch():
            gpt(idx, idx).backward()
        assert (largest[0] >= T * T) is square  # logits, 61 T, and MLP, 64 T, are smaller


@pytest.mark.parametrize("inner, dtype, backend", [
    *((inner, dtype, "aot_eager") for inner in INNER for dtype in (torch.float32, torch.bfloat16)),
    pytest.param("past", torch.float32, "inductor", marks=pytest.mark.skipif(
        not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler"))])
def test_compiled_is_eager_in_loss_and_gradients(inner, dtype, backend):
    """Where torch's tracer drops a gradient, training goes on without it and says nothing."""
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()
    gpt, idx = make(n_layer=1, nexus_order=2, nexus_inner=inner), tokens(2, 17)
    found = []
    for forward in (torch.compile(gpt, backend=backend, fullgraph=True), gpt):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = forward(idx[:, :-1], idx[:, 1:])
        found.append((loss, *torch.autograd.grad(loss, list(gpt.parameters()))))
    for compiled, eager in zip(*found, strict=True):
        assert (compiled - eager).norm() < 1e-4 * eager.norm()


def test_training_compiles_twice_whatever_comes(tokens_on_disk, tmp_path, monkeypatch):  # noqa: F811
    """One graph with gradients and one without: over steps, validations and a short last batch."""
    flags = ["--max_steps", 3, "--eval_windows", 7]
    log = run(tokens_on_disk, tmp_path / "plain", *flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = run(tokens_on_disk, tmp_path / "compiled", *flags, "--compile")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for a, b in zip(log, compiled, strict=True):
        assert a["val_loss"] == b["val_loss"] or abs(a["val_loss"] - b["val_loss"]) < 1e-4
