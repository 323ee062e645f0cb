"""Every attention path against an explicit float64 reference; causality; the cache; counts."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    AttnContext,
    CausalSelfAttention,
    GPTConfig,
    ModelError,
    apply_rotary_emb,
    attend,
    merge_heads,
)
from nanonexus.checkpoint import check_size
from nanonexus.flags import preset_config
from nanonexus.generate import KVCache

SMALL = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=32, rotary_pct=0.5,
                  parallel_residual=False)
STREAMS, INNER = (get_args(GPTConfig.__annotations__[f"nexus_{name}"])
                  for name in ("streams", "inner"))
VARIANTS = [dict(nexus_order=m, nexus_streams=s, nexus_inner=i)  # gpu.py names some of them
            for (m, s), i in itertools.product([(2, "qk"), *((3, s) for s in STREAMS)], INNER)]
ALL = [dict(nexus_order=1), *VARIANTS]


def name(variant):
    return "-".join(map(str, variant.values()))


@pytest.fixture(autouse=True)
def float64():
    """Tests of exactness run in float64: an error of 1e-10 is a wrong formula, not rounding."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(**changes):
    model = GPT(replace(SMALL, **changes))
    for p in model.parameters():  # biases too, which start at 0
        torch.nn.init.normal_(p, std=0.2)
    return model


def tokens(*shape):
    return torch.randint(SMALL.vocab_size, shape)


def context(gpt, T):
    """What the model's own forward pass gives its attention, for one text of T tokens."""
    return AttnContext(0, gpt.config.attention, gpt.rope[:, :T], gpt.attention_mask(T), None, None,
                       None)


# --- the reference: the design's formulas, one head and one query at a time ---------------------

def reference_rope(x, rotary_dim):
    """(T, D): pair i with i + R/2 and multiply by exp(i position rate), as complex numbers."""
    half = rotary_dim // 2
    rates = torch.tensor([10000.0 ** (-2 * i / rotary_dim) for i in range(half)])
    angles = torch.arange(len(x))[:, None] * rates
    turned = torch.complex(x[:, :half], x[:, half:rotary_dim]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag, x[:, rotary_dim:]], dim=1)


def reference_attn(a, b, c, rotary_dim, own=True):
    """Attn(a, b, c), each (T, D): a softmax over the past for one query after another; without
    its own token a query that has no past gets 0."""
    a, b = reference_rope(a, rotary_dim), reference_rope(b, rotary_dim)
    rows = [] if own else [torch.zeros_like(c[0])]
    for t in range(len(rows), len(a)):
        weights = torch.exp(b[:t + own] @ a[t] / math.sqrt(a.size(1)))
        rows.append(weights @ c[:t + own] / weights.sum())
    return torch.stack(rows)


def reference_attention(attn, x):
    """What CausalSelfAttention(config) should give for x (T, C), from its weights alone."""
    c = attn.config
    D, R = c.n_embd // c.n_head, c.rotary_dim
    w, b = (dict(zip("qkv", p.chunk(3), strict=True)) for p in (attn.qkv.weight, attn.qkv.bias))
    streams = {n: x @ w[n].T + b[n] for n in "qkv"}

    def heads(*abc, own=True):
        parts = zip(*(s.split(D, 1) for s in abc), strict=True)
        return torch.cat([reference_attn(*part, R, own) for part in parts], 1)

    h = dict(streams)
    for _ in range(c.nexus_order - 1):
        new = {}
        for n in c.nexus_streams:
            s = streams[n]
            if c.nexus_inner == "self":
                new[n] = heads(h[n], h[n], s)
            elif c.nexus_inner == "past":
                new[n] = s + heads(h[n], h[n], s, own=False)
            elif c.nexus_inner == "cross":
                new[n] = s + heads(h["q"], h["k"], s, own=False)
            elif c.nexus_inner == "shared":
                new[n] = heads(*(y @ w[i].T + b[i] for y, i in zip((h[n], h[n], s), "qkv",
                                                                   strict=True)))
            elif c.nexus_inner == "separate":
                wq, wk, wv = attn.inner[n].weight.chunk(3)
                new[n] = heads(h[n] @ wq.T, h[n] @ wk.T, s @ wv.T)
            elif c.nexus_inner == "tokens":  # gather first, one map for both streams
                new[n] = heads(h["q"], h["k"], streams["v"]) @ w[n].T + b[n]
            else:
                raise AssertionError(f"add a branch for {c.nexus_inner!r} to this reference")
        h.update(new)
    return heads(h["q"], h["k"], streams["v"]) @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("variant", ALL, ids=name)
def test_attention_equals_the_reference_in_output_and_gradients(variant, backend):
    T = 5
    gpt = make(attention=backend, **variant)
    attn, x = gpt.blocks[0].attn, torch.randn(2, T, SMALL.n_embd, requires_grad=True)
    params, weight = list(attn.parameters()), torch.randn(2, T, SMALL.n_embd)

    got = attn(x, context(gpt, T))
    want = torch.stack([reference_attention(attn, row) for row in x])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    got_grads = torch.autograd.grad((got * weight).sum(), [x, *params])
    want_grads = torch.autograd.grad((want * weight).sum(), [x, *params])
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert b.abs().max() > 0  # no weight is dead


def test_order_1_is_the_baseline_bit_for_bit():
    """Whatever the other Nexus fields say, and equal to attention written without any of Nexus."""
    torch.set_default_dtype(torch.float32)
    idx, base = tokens(2, 20), make()
    for streams, inner in itertools.product(STREAMS, INNER):
        other = GPT(replace(SMALL, nexus_streams=streams, nexus_inner=inner))
        other.load_state_dict(base.state_dict())
        grads = [torch.autograd.grad(m(idx, idx), list(m.parameters())) for m in (base, other)]
        assert all(map(torch.equal, *grads))

    attn, x, rope = base.blocks[0].attn, torch.randn(2, 20, SMALL.n_embd), base.rope[:, :20]
    q, k, v = (s.view(2, 20, 2, 16).transpose(1, 2) for s in attn.qkv(x).split(32, dim=-1))
    y = torch.nn.functional.scaled_dot_product_attention(
        apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope), v, is_causal=True)
    assert torch.equal(attn(x, context(base, 20)), attn.proj(merge_heads(y)))


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("variant", ALL, ids=name)
@torch.no_grad()
def test_causal_and_cached_as_uncached(variant, backend):
    gpt, idx, split = make(attention=backend, **variant), tokens(2, 12), (5, 1, 1, 3, 2)
    full, cache = gpt(idx), KVCache(12)
    parts = [gpt(part, cache=cache) for part in idx.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-10)
    for t in (1, 7):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % SMALL.vocab_size
        after = gpt(changed)
        torch.testing.assert_close(after[:, :t], full[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t:] - full[:, t:]).abs().amax(-1).min() > 1e-6  # and each sees the past


@pytest.mark.parametrize("variant", ALL, ids=name)
def test_maps_cache_and_flops_are_those_of_every_attention(variant):
    T, gpt, cache, maps = 12, make(attention="manual", **variant), KVCache(12), {}
    c, idx = gpt.config, tokens(1, T)
    with FlopCounterMode(display=False) as counter:
        gpt(idx, cache=cache, maps=maps).sum().backward()
    streams = "h" if variant.get("nexus_inner") == "tokens" else variant.get("nexus_streams", "")
    names = [f"{n}{loop}" for loop in range(1, c.nexus_order) for n in streams] + ["outer"]
    assert list(maps) == [(layer, n) for layer in (0, 1) for n in names]
    assert sum(buffer.size(1) for buffer in cache.entries.values()) == 2 * c.n_head * len(maps)
    # torch counts the attention that the causal mask hides, flops_per_token does not
    hidden = 3 * len(maps) * 2 * c.n_embd * T
    assert counter.get_total_flops() == T * (gpt.flops_per_token(T) + hidden)

    for weights in maps.values():
        own = int(weights[..., 0, 0].max() > 0)  # may a token look at itself?
        assert weights.shape == (1, 2, T, T) and weights.triu(own).abs().max() == 0
        rows = weights.sum(-1)
        torch.testing.assert_close(rows[..., 1:], torch.ones_like(rows[..., 1:]))
        assert (rows[..., 0] == own).all()
    attn, x = gpt.blocks[0].attn, gpt.blocks[0].norm1(gpt.embed(idx))
    y = merge_heads(maps[0, "outer"] @ attn.project(x, "v")[0])  # the outer map makes the output
    torch.testing.assert_close(attn.proj(y), attn(x, context(gpt, T)))


def test_attentions_of_one_name_are_told_apart(monkeypatch):
    """A step that attends twice under one name would overwrite its own cache."""
    def twice(self, n, h, s, ctx, name):
        return attend(h[n], h[n], attend(h[n], h[n], s, ctx, name), ctx, name)

    monkeypatch.setattr(CausalSelfAttention, "inner_step", twice)
    with pytest.raises(ModelError, match="two attentions of layer 0 have one name"):
        make(nexus_order=2)(tokens(1, 5), cache=KVCache(8))


def test_more_tokens_than_fit_are_refused():
    gpt, cache = make(), KVCache(10)
    gpt(tokens(1, 8), cache=cache)
    with pytest.raises(ModelError, match="11 tokens are more than the context of 10"):
        gpt(tokens(1, 3), cache=cache)
    with pytest.raises(ModelError, match="25 tokens exceed the context of 24"):
        gpt(tokens(1, 25))


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32():
    torch.set_default_dtype(torch.float32)
    for variant in ALL:
        gpt, idx = GPT(replace(SMALL, n_layer=1, **variant)), tokens(2, 24)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gpt(idx, idx)
        assert loss.dtype == torch.float32
        assert 0 < abs(loss.item() - gpt(idx, idx).item()) < 0.02


COUNTS = {"pythia-70m": (70_426_624, 18_915_328), "pythia-160m": (162_322_944, 85_056_000),
          "pythia-410m": (405_334_016, 302_311_424), "pythia-1b": (1_011_781_632, 805_736_448)}


@pytest.mark.parametrize("preset, counts", COUNTS.items())
def test_parameter_counts_are_pythias(preset, counts):
    for m, inner in [(1, INNER[0]), *((2, inner) for inner in INNER if preset == "pythia-70m")]:
        config = preset_config(preset, nexus_order=m, nexus_inner=inner)
        check_size(config)
        with torch.device("meta"):
            gpt, own = GPT(config), 6 * config.n_layer * config.n_embd**2
        own *= inner == "separate"  # the only one with weights
        assert (gpt.num_params() - own, gpt.num_params(embeddings=False) - own) == counts
    gpt.head.weight = gpt.embed.weight  # tied ones count once
    assert gpt.num_params() - gpt.num_params(embeddings=False) == gpt.embed.weight.numel()


def test_initialisation_is_gpt_neox():
    torch.set_default_dtype(torch.float32)
    for key, p in GPT(preset_config("pythia-70m")).named_parameters():
        if p.dim() == 2:
            wang = key.endswith(("attn.proj.weight", "mlp.down.weight"))
            assert abs(p.std().item() / (0.01473 if wang else 0.02795) - 1) < 0.01, key
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in key and "weight" in key))), key


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=0), "n_layer must be int, at least 1"), (dict(n_embd="32"), "n_embd must be int"),
    (dict(n_head=3), "multiple of n_head"), (dict(rotary_pct=1.5), "rotary_pct"),
    (dict(rotary_pct=0.2), "even"), (dict(dropout=math.nan), "dropout"),
    (dict(nexus_streams="v"), "qk, q, k"), (dict(n_layer=10**9), "more than a trillion"),
    (dict(block_size=10**12), "more than a trillion")])
def test_bad_configurations_are_named_before_they_are_built(change, message):
    with pytest.raises(ModelError, match=message):
        check_size(replace(SMALL, **change))
