"""model.py's backends beyond sdpa and manual: flex, document masks, recomputation, compilation."""

import shutil
import warnings
from functools import partial
from typing import get_args

import pytest
import torch
import torch._dynamo
from test_model import ALL, VARIANTS, float64, make, name, tokens  # noqa: F401
from test_train import run
from test_train import tokens as tokens_on_disk  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPTConfig
from nanonexus.generate import KVCache, generate

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def same_weights(gpt, **changes):
    other = make(**vars(gpt.config) | changes)
    other.load_state_dict(gpt.state_dict())
    return other


@pytest.mark.parametrize("backend", ["sdpa", "manual", "flex"])
@pytest.mark.parametrize("variant", ALL, ids=name)
def test_packed_documents_are_as_if_alone(variant, backend):
    """Nothing leaks, not even through the refined keys: each document has the logits that it has
    by itself (rotary positions are relative), whatever its neighbour is."""
    gpt = make(attention=backend, **variant)
    lengths, idx = (7, 1, 12), tokens(2, 20)
    docs = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    with torch.no_grad():
        packed = gpt(idx, docs=docs)
        for part, out in zip(idx.split(lengths, 1), packed.split(lengths, 1), strict=True):
            torch.testing.assert_close(out, gpt(part), rtol=0, atol=1e-9)
        idx[:, :7] = tokens(2, 7)  # another first document
        torch.testing.assert_close(gpt(idx, docs=docs)[:, 7:], packed[:, 7:], rtol=0, atol=0)
        assert not torch.equal(gpt(idx)[:, 7:], packed[:, 7:])  # unlike without docs


@pytest.mark.parametrize("variant", [dict(nexus_order=1), VARIANTS[0], VARIANTS[1],
                                     VARIANTS[-1]], ids=name)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_flex_equals_manual_forward(variant, width):
    shape = dict(n_head=2, n_embd=2 * width, rotary_pct=0.25, block_size=300, n_layer=1)
    gpt, idx = make(attention="manual", **variant, **shape), tokens(2, 261)  # not a multiple of 128
    docs = (torch.rand(2, 261) < 0.02).cumsum(1)
    flex = same_weights(gpt, attention="flex")
    with torch.no_grad():
        for d in (None, docs):
            torch.testing.assert_close(flex(idx, docs=d), gpt(idx, docs=d), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inner", ["self", "past"])
def test_flex_generates_with_the_cache_of_sdpa(inner):
    gpt = make(attention="flex", nexus_order=2, nexus_inner=inner)
    with torch.no_grad():
        want = generate(same_weights(gpt, attention="sdpa"), tokens(1, 5), 8, temperature=0)
        torch.manual_seed(0)
    assert torch.equal(generate(gpt, want[:, :5], 8, temperature=0), want)


@pytest.mark.parametrize("variant", ALL, ids=name)
def test_a_cache_works_with_documents(variant):
    """Padding on the left is a document of its own: the rest is as if alone."""
    gpt, idx = make(**variant), tokens(3, 20)
    docs = (torch.arange(20) >= torch.tensor([0, 3, 7])[:, None]).long()
    with torch.no_grad():
        full = gpt(idx, docs=docs)
        for split in ([20], [8, 1, 1, 10], [1] * 20):
            cache, parts, end = KVCache(24), [], 0
            for part in idx.split(split, 1):
                end += part.size(1)
                parts.append(gpt(part, cache=cache, docs=docs[:, :end]))
            torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)
        for row, pad in enumerate((0, 3, 7)):
            torch.testing.assert_close(full[row, pad:], gpt(idx[row:row + 1, pad:])[0],
                                       rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=name)
def test_masks_made_beforehand_are_those_made_inside(variant):
    gpt, idx = make(attention="flex", **variant), tokens(2, 20)
    docs = (idx == idx[0, 7]).cumsum(1)
    with torch.no_grad():
        mask = gpt.attention_mask(20, 0, docs, idx.device)
        assert torch.equal(gpt(idx, idx, mask=mask), gpt(idx, idx, docs=docs))
        assert not torch.equal(gpt(idx, idx), gpt(idx, idx, docs=docs))


@pytest.mark.parametrize("inner", ["self", "past"])
def test_flex_with_documents_is_one_graph(inner):
    """As far as a CPU can tell: forward, traced, with the masks made outside."""
    gpt, idx = make(attention="flex", nexus_order=2, nexus_inner=inner), tokens(2, 20)
    docs = (torch.arange(20) > 6).long().expand(2, -1)
    torch._dynamo.reset()
    run = torch.compile(gpt, fullgraph=True, backend="eager")
    with torch.no_grad():
        mask = gpt.attention_mask(20, 0, docs, idx.device)
        assert torch.equal(run(idx, idx, docs=docs, mask=mask), gpt(idx, idx, docs=docs))


def test_a_document_for_each_token_is_needed():
    with pytest.raises(AssertionError, match="one for each token seen"):
        make()(tokens(1, 4), docs=torch.zeros(1, 3))


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
                if isinstance(x, torch.Tensor):
                    largest[0] = max(largest[0], x.numel())
            return out

    shape = dict(n_embd=16, block_size=T, nexus_order=order)
    for backend, square in (("sdpa", False), ("manual", True)):
        gpt, idx, largest[0] = make(attention=backend, **shape), tokens(1, T), 0
        with Watch():
            gpt(idx, idx).backward()
        assert (largest[0] >= T * T) is square  # logits, 61 T, and MLP, 64 T, are smaller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", get_args(GPTConfig.__annotations__["nexus_inner"]))
def test_compiled_gradients_are_the_eager_ones(inner, dtype):
    """Where torch's tracer drops a gradient, training goes on without it and says nothing."""
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()
    gpt, idx, grads = make(nexus_order=2, nexus_inner=inner), tokens(2, 17), []
    for forward in (torch.compile(gpt, backend="aot_eager", fullgraph=True), gpt):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            forward(idx[:, :-1], idx[:, 1:]).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    for compiled, eager in zip(*grads, strict=True):
        assert (compiled - eager).norm() < 1e-4 * eager.norm()


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [
    dict(nexus_order=3), dict(nexus_order=2, nexus_inner="shared", nexus_streams="k"),
    dict(nexus_order=3, nexus_inner="past"), dict(nexus_order=2, nexus_inner="cross")], ids=name)
def test_compiles_to_one_graph_and_stays(kind):
    """No graph break (fullgraph), no second compilation in later steps, the same gradients."""
    torch.set_default_dtype(torch.float32)
    gpt = make(**kind)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(gpt, fullgraph=True)
    for _ in range(3):
        idx, grads = tokens(2, 17), []
        for model in (run, gpt):
            gpt.zero_grad()
            model(idx[:, :-1], idx[:, 1:]).backward()
            grads.append([p.grad.clone() for p in gpt.parameters()])
        for compiled, eager in zip(*grads, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for p in gpt.parameters():  # a step
                p.sub_(p.grad, alpha=0.01)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_training_compiles_twice_whatever_comes(tokens_on_disk, tmp_path, monkeypatch):  # noqa: F811
    """One graph with gradients and one without: over steps, validations and a short last batch."""
    log = run(tokens_on_disk, tmp_path / "plain", "--max_steps", 5, "--eval_windows", 7)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = run(tokens_on_disk, tmp_path / "compiled", "--max_steps", 5, "--eval_windows", 7,
                   "--compile")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for a, b in zip(log, compiled, strict=True):
        assert a["val_loss"] == b["val_loss"] or abs(a["val_loss"] - b["val_loss"]) < 1e-4
