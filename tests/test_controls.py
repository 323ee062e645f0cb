"""Each control is causal, is its formula and, where it says so, the baseline."""

import math
import re
from dataclasses import replace

import pytest
import torch

import model
from model import GPTConfig, ModelError, apply_rotary_emb
from nanonexus.controls import CONTROLS, build, describe, replaces_loops
from nanonexus.generate import KVCache

SMALL = dict(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=32, rotary_pct=0.5,
             parallel_residual=False)
NEW = {"key-shift": 2, "kv-shift": 8, "canon": 4 * 96, "bias": 2 * 2 * 24, "near": 4,
       "near-gated": 6}  # parameters per layer, of those that have some
every = pytest.mark.parametrize("name", CONTROLS)


@pytest.fixture(autouse=True)
def clean():
    """In float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(name=None, spread=False, **kwargs):
    """A GPT with the control; spread: its own parameters redrawn, away from their start."""
    if name:
        kwargs = dict(nexus_order=1 + replaces_loops(name), control=name) | kwargs
    torch.manual_seed(0)
    gpt = build(GPTConfig(**SMALL | kwargs))
    if spread:
        for p in own(gpt):
            p.data.normal_()
    return gpt


def own(gpt):
    """The parameters that the model does not have without the control."""
    return [p for name, p in gpt.named_parameters()
            if not any(part in name for part in ("qkv", "proj", "mlp", "norm", "embed", "head"))]


def tokens(rows=2, T=20):
    return torch.randint(61, (rows, T), generator=torch.Generator().manual_seed(1))


@every
@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@torch.no_grad()
def test_causal_and_cached_as_uncached(name, attention):
    gpt, idx = make(name, spread=True, attention=attention, n_layer=1), tokens(2, 16)
    full, cache = gpt(idx), KVCache(24)
    parts = [gpt(part, cache=cache) for part in idx.split([1, 6, 1, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10 if name != "mean"
                               else 1e-6)  # its sums are in float32
    for t in (4, 12):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 61
        change = (full - gpt(other)).abs().amax((0, 2))
        assert change[:t].max() == 0 and change[t:].min() > 1e-6  # and all later ones know of it


@every
def test_parameters_start_where_they_should_and_learn(name):
    base, gpt = make(), make(name)
    new = sum(p.numel() for p in own(gpt))
    assert new == 2 * NEW.get(name, 0) == gpt.num_params() - base.num_params()
    assert gpt.flops_per_token(20) > 0  # can be counted, on the device "meta"
    for key, value in base.state_dict().items():
        assert torch.equal(gpt.state_dict()[key], value), key
    gpt(tokens(), tokens().roll(-1, 1)).backward()
    for p in own(gpt):
        assert p.grad.abs().max() > 1e-9 and p.isfinite().all()
        assert p.dim() == 1 or name == "canon"  # 1-D: without weight decay
    start = {"key-shift": 0.0, "bias": 0.0}.get(name)
    assert start is None or all((p == start).all() for p in own(gpt))
    if name == "kv-shift":
        a1, a2, b1, b2 = own(gpt)[:4]
        assert torch.equal(a1 + a2, torch.ones(2)) and torch.equal(b1 + b2, torch.ones(2))
        assert 0 < min(a1.min(), b1.min()) and max(a1.max(), b1.max()) < 1


# --- the formulas, token by token in plain loops --------------------------------------------------

def layer_and_input(name, **kwargs):
    attention = make(name, spread=True, **kwargs).blocks[0].attn
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.qkv(x).view(7, 3, 2, 16).unbind(1)  # (T, H, D)
    return attention, x, q, k, v


def outer(attention, q, k, v):
    """Standard attention of q, k, v (T, H, D) by loops, and the output projection."""
    gpt, out = make(), torch.zeros(7, 2, 16)
    q, k = (apply_rotary_emb(s.transpose(0, 1), *gpt.rope[:, :7]) for s in (q, k))
    for h in range(2):
        for t in range(7):
            weights = torch.stack([q[h, t] @ k[h, s] / 4 for s in range(t + 1)]).softmax(0)
            out[t, h] = sum(weights[s] * v[s, h] for s in range(t + 1))
    return attention.proj(out.flatten(1))[None]


def context(gpt, T):
    return model.AttnContext(0, "sdpa", gpt.rope[:, :T], None, None, None, None)


def assert_is(attention, x, q, k, v):
    assert torch.allclose(attention(x, context(make(), 7)), outer(attention, q, k, v), atol=1e-12)


def test_key_shift_is_its_formula():
    """And comes before inner loops: with past on k it is the shifted key, refined."""
    attention, x, q, k, v = layer_and_input("key-shift")
    a = [1 / (1 + math.exp(-p)) for p in attention.shift.tolist()]
    shifted = [torch.stack([k[t, h] if t == 0 else (1 - a[h]) * k[t, h] + a[h] * k[t - 1, h]
                            for h in range(2)]) for t in range(7)]
    assert_is(attention, x, q, k := torch.stack(shifted), v)
    attention, x, q, _, v = layer_and_input("key-shift", nexus_order=2, nexus_inner="past",
                                            nexus_streams="k")
    heads = k.transpose(0, 1)[None]
    refined = heads + model.attend(heads, heads, heads, context(make(), 7), strict=True)
    assert_is(attention, x, q, refined[0].transpose(0, 1), v)


def test_kv_shift_is_its_formula():
    attention, x, q, k, v = layer_and_input("kv-shift")

    def mixed(s, here, before):
        past = [torch.zeros(2, 16), *s]
        return torch.stack([here[:, None] * s[t] + before[:, None] * past[t] for t in range(7)])

    assert_is(attention, x, q, mixed(k, attention.a1, attention.a2),
              mixed(v, attention.b1, attention.b2))


def test_canon_is_its_formula():
    attention, x, *streams = layer_and_input("canon")
    w = attention.conv.weight.view(3, 2, 16, 4)  # of each channel of q, k and v, the oldest first
    out = [torch.stack([s[t] + sum(w[i, :, :, 3 - lag] * s[t - lag] for lag in range(min(t, 3) + 1))
                        for t in range(7)]) for i, s in enumerate(streams)]
    assert_is(attention, x, *out)


def test_mean_and_bias_are_their_formulas():
    attention, x, q, k, v = layer_and_input("mean")
    q, k = (torch.stack([s[t] + (s[:t].mean(0) if t else 0) for t in range(7)]) for s in (q, k))
    # its sums are in float32
    assert torch.allclose(attention(x, context(make(), 7)), outer(attention, q, k, v), atol=1e-6)
    attention, x, q, k, v = layer_and_input("bias")

    def gathered(s, distance):
        by = distance.view(2, 24)
        return torch.stack([s[t] if t == 0 else s[t] + torch.stack(
            [by[h, [t - r for r in range(t)]].softmax(0) @ s[:t, h] for h in range(2)])
            for t in range(7)])

    assert_is(attention, x, gathered(q, attention.q_distance), gathered(k, attention.k_distance), v)


@pytest.mark.parametrize("name, order", [("near", 3), ("near-gated", 2)])
def test_near_is_its_formula(name, order):
    attention, x, q, k, v = layer_and_input(name, nexus_order=order)
    gates = attention.gate.tolist() if name == "near-gated" else [1, 1]
    gpt, c = make(), attention.slope.exp().tolist()
    a = [1 / (1 + math.exp(-p)) for p in attention.shift.tolist()]
    h_q, h_k = q, k
    for _ in range(order - 1):
        turned = [apply_rotary_emb(s.transpose(0, 1), *gpt.rope[:, :7]) for s in (h_q, h_k)]
        near_q, near_k = q.clone(), k.clone()  # as the first token keeps them
        for t in range(1, 7):
            for h in range(2):
                weights = torch.stack([gates[h] * turned[0][h, t] @ turned[1][h, r] / 4
                                       - c[h] * (t - r) for r in range(t)]).softmax(0)
                for s, near in ((q, near_q), (k, near_k)):
                    near[t, h] = (1 - a[h]) * s[t, h] + a[h] * weights @ s[:t, h]
        h_q, h_k = near_q, near_k
    assert_is(attention, x, h_q, h_k, v)


def joined(q, k, v, strict=False):
    """Attention of q, k, v (T, H, D) by the model's own attend, same shape."""
    q, k, v = (s.transpose(0, 1)[None] for s in (q, k, v))
    return model.attend(q, k, v, context(make(), 7), strict=strict)[0].transpose(0, 1)


@pytest.mark.parametrize("name, streams, order", [
    ("tokens-residual", "qk", 3), ("tokens-residual", "q", 2), ("mix", "qk", 2)])
def test_tokens_gather_and_keep_what_they_are_before_they_are_projected(name, streams, order):
    attention, x, q, k, v = layer_and_input(name, nexus_order=order, nexus_streams=streams)
    for _ in range(order - 1):
        y = outer(attention, q, k, v)[0] if name == "mix" else joined(q, k, v).flatten(1)
        a, b, _ = attention.qkv(x[0] + y).view(7, 3, 2, 16).unbind(1)
        q, k = a if "q" in streams else q, b if "k" in streams else k
    assert_is(attention, x, q, k, v)


@pytest.mark.parametrize("name", [name for name in CONTROLS if re.match(
    "(self|cross)-(plain|residual|strict)$", name)])
def test_the_own_token_is_seen_or_not_and_kept_or_not(name):
    attention, x, q, k, v = layer_and_input(name)
    new = []
    for s in (q, k):
        y = joined(*((q, k) if "cross" in name else (s, s)), s, strict="strict" in name)
        new.append(s + y if "residual" in name else y)
    assert_is(attention, x, *new, v)


@every
def test_a_control_says_what_it_is_and_what_it_needs(name):
    config = GPTConfig(**SMALL, control=name, nexus_order=1, nexus_inner="past")
    loops = replaces_loops(name)
    if loops:
        with pytest.raises(ModelError, match=f"the control {name} needs nexus_order 2 or more"):
            build(config)
    assert loops or describe(config) == f"order 1, {name}"
    assert describe(replace(config, nexus_order=2)) == f"order 2, {name}" + ", past" * (not loops)


@every
def test_documents_are_kept_apart_or_refused(name):
    gpt, idx = make(name, spread=True), tokens(2, 20)
    docs = (torch.arange(20) > 6).long().expand(2, -1)
    try:
        packed = gpt(idx, docs=docs)
    except ModelError as error:
        assert "reaches across documents" in str(error)
        with pytest.raises(ModelError, match="reaches across documents"):
            gpt(idx, cache=KVCache(24), docs=docs)
    else:
        assert torch.allclose(packed[:, 7:], gpt(idx[:, 7:]), atol=1e-10)


def test_a_control_that_does_not_exist():
    with pytest.raises(ModelError, match="no control 'shift': choose from key-shift, kv-shift"):
        build(GPTConfig(**SMALL, control="shift"))
    with pytest.raises(ModelError, match="'mean' is built by nanonexus.controls.build"):
        model.GPT(GPTConfig(**SMALL, control="mean"))  # which would be the baseline
