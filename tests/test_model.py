"""Every attention path against an explicit float64 reference; causality; the cache; counts."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from questions import add_inner_step
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    AttnContext,
    CausalSelfAttention,
    GPTConfig,
    ModelError,
    apply_rotary_emb,
    attend,
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
    rows = []
    for t in range(len(a)):
        seen = range(t + own)
        if not seen:
            rows.append(torch.zeros_like(c[0]))
            continue
        scores = torch.stack([a[t] @ b[j] for j in seen]) / math.sqrt(a.size(1))
        weights = torch.exp(scores) / torch.exp(scores).sum()
        rows.append(sum(weights[j] * c[j] for j in seen))
    return torch.stack(rows)


def reference_attention(attn, x):
    """What CausalSelfAttention(config) should give for x (T, C), from its weights alone."""
    c = attn.config
    D, R = c.n_embd // c.n_head, c.rotary_dim
    weights, biases = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
    streams = {n: x @ w.T + b for n, w, b in zip("qkv", weights, biases, strict=True)}

    def heads(a, b, c, own=True):
        parts = [reference_attn(a[:, i:i + D], b[:, i:i + D], c[:, i:i + D], R, own)
                 for i in range(0, a.size(1), D)]
        return torch.cat(parts, dim=1)

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
                (wq, wk, wv), (bq, bk, bv) = weights, biases
                new[n] = heads(h[n] @ wq.T + bq, h[n] @ wk.T + bk, s @ wv.T + bv)
            elif c.nexus_inner == "separate":
                wq, wk, wv = attn.inner[n].weight.chunk(3)
                new[n] = heads(h[n] @ wq.T, h[n] @ wk.T, s @ wv.T)
            elif c.nexus_inner == "tokens":  # gather first, one map for both streams
                w, b = dict(zip("qkv", weights, strict=True)), dict(zip("qkv", biases, strict=True))
                new[n] = heads(h["q"], h["k"], streams["v"]) @ w[n].T + b[n]
        h.update(new)
    streams.update(h)
    y = heads(streams["q"], streams["k"], streams["v"])
    return y @ attn.proj.weight.T + attn.proj.bias


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
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    attn, x = base.blocks[0].attn, torch.randn(2, 20, SMALL.n_embd)
    q, k, v = (s.view(2, 20, 2, 16).transpose(1, 2) for s in attn.qkv(x).split(32, dim=-1))
    rope = base.rope[:, :20]
    y = torch.nn.functional.scaled_dot_product_attention(
        apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope), v, is_causal=True)
    plain = attn.proj(y.transpose(1, 2).reshape(2, 20, 32))
    assert torch.equal(attn(x, context(base, 20)), plain)


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


def maps_of(variant):
    """Of a loop: "tokens" has one map for both streams."""
    return "h" if variant.get("nexus_inner") == "tokens" else variant.get("nexus_streams", "")


@pytest.mark.parametrize("variant", ALL, ids=name)
def test_the_cache_and_the_flops_are_those_of_the_attentions(variant):
    T, gpt, cache = 12, make(attention="manual", **variant), KVCache(12)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens(1, T), cache=cache).sum().backward()
    c, attentions = gpt.config, 1 + len(maps_of(variant)) * (variant["nexus_order"] - 1)
    heads = sum(buffer.size(1) for buffer in cache.entries.values())
    assert heads == c.n_layer * c.n_head * 2 * attentions
    # torch counts the attention that the causal mask hides, flops_per_token does not
    hidden = 3 * c.n_layer * attentions * 2 * c.n_embd * T
    assert counter.get_total_flops() == T * (gpt.flops_per_token(T) + hidden)


@pytest.mark.parametrize("backend", ["sdpa", "manual", "flex"])
def test_an_added_step_has_all_that_past_has(monkeypatch, backend):
    """Its strict mask, in documents and in a cache, its maps and its FLOPs, with nothing else to
    write than the step itself."""
    add_inner_step(monkeypatch, "again")
    models = [make(attention=backend, n_layer=1, nexus_order=3, nexus_inner=inner)
              for inner in ("past", "again")]
    models[1].load_state_dict(models[0].state_dict())
    idx, docs = tokens(2, 20), (torch.arange(20) > 6).long().expand(2, -1)
    found = []
    for gpt in models:
        maps, cache = {} if backend == "manual" else None, KVCache(24)
        with torch.no_grad():
            outputs = [gpt(idx), gpt(idx, docs=docs), gpt(idx, maps=maps)]
            outputs += [gpt(part, cache=cache) for part in idx.split([7, 1, 12], 1)]
        found.append((outputs, list(maps or {}), list(cache.entries), gpt.flops_per_token(24)))
    assert all(map(torch.equal, found[0][0], found[1][0])) and found[0][1:] == found[1][1:]
    with pytest.raises(ModelError, match="self, .*, cross, again"):
        make(nexus_inner="another")


def test_attentions_of_one_name_are_told_apart(monkeypatch):
    """A step that attends twice under one name would overwrite its own cache."""
    def twice(self, n, h, s, ctx, name):
        return attend(h[n], h[n], attend(h[n], h[n], s, ctx, name), ctx, name)

    monkeypatch.setattr(CausalSelfAttention, "inner_step", twice)
    with pytest.raises(AssertionError, match="two attentions of layer 0 have one name"):
        make(nexus_order=2)(tokens(1, 5), cache=KVCache(8))


def test_more_tokens_than_fit_are_refused():
    gpt, cache = make(), KVCache(10)
    gpt(tokens(1, 8), cache=cache)
    with pytest.raises(ModelError, match="11 tokens are more than the context of 10"):
        gpt(tokens(1, 3), cache=cache)
    with pytest.raises(ModelError, match="25 tokens exceed the context of 24"):
        gpt(tokens(1, 25))


@pytest.mark.parametrize("variant", ALL, ids=name)
def test_maps_are_the_attention_of_every_loop(variant):
    gpt, idx, maps = make(attention="manual", n_layer=1, **variant), tokens(1, 9), {}
    gpt(idx, maps=maps)
    loops = range(1, variant["nexus_order"])
    assert list(maps) == [(0, f"{n}{i}") for i in loops for n in maps_of(variant)] + [(0, "outer")]
    for weights in maps.values():
        own = int(weights[..., 0, 0].max() > 0)  # may a token look at itself?
        assert weights.shape == (1, 2, 9, 9) and weights.triu(own).abs().max() == 0
        rows = weights.sum(-1)
        torch.testing.assert_close(rows[..., 1:], torch.ones_like(rows[..., 1:]))
        assert (rows[..., 0] == own).all()
    attn, x = gpt.blocks[0].attn, gpt.blocks[0].norm1(gpt.embed(idx))
    v, = attn.project(x, "v")  # the outer map makes the output
    y = attn.proj((maps[0, "outer"] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, attn(x, context(gpt, 9)))


def test_rotary_gradient_and_relative_positions():
    gpt = make()
    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, *gpt.rope[:, :5]), x)
    q, k = torch.randn(16), torch.randn(16)
    turn = [apply_rotary_emb(torch.stack([s] * 24), *gpt.rope) for s in (q, k)]
    scores = turn[0] @ turn[1].T  # depends on the distance alone
    for distance in (0, 3, 17):
        line = scores.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32():
    torch.set_default_dtype(torch.float32)
    for variant in ALL:
        gpt, idx = GPT(replace(SMALL, n_layer=1, **variant)), tokens(2, 24)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gpt(idx, idx)
        assert loss.dtype == torch.float32
        assert 0 < abs(loss.item() - gpt(idx, idx).item()) < 0.02


# --- sizes ---------------------------------------------------------------------------------------

COUNTS = {"pythia-70m": (70_426_624, 18_915_328), "pythia-160m": (162_322_944, 85_056_000),
          "pythia-410m": (405_334_016, 302_311_424), "pythia-1b": (1_011_781_632, 805_736_448)}


def test_parameter_counts_are_pythias():
    for preset, counts in COUNTS.items():
        for m, inner in [(1, INNER[0]), *((2, inner) for inner in INNER if preset == "pythia-70m")]:
            config = preset_config(preset, nexus_order=m, nexus_inner=inner)
            with torch.device("meta"):
                gpt, own = GPT(config), 6 * config.n_layer * config.n_embd**2
            own *= inner == "separate"  # the only one with weights
            assert (gpt.num_params() - own, gpt.num_params(embeddings=False) - own) == counts
    gpt.head.weight = gpt.embed.weight  # tied ones count once
    assert gpt.num_params() - gpt.num_params(embeddings=False) == gpt.embed.weight.numel()


def test_initialisation_is_gpt_neox():
    config = preset_config("pythia-70m")
    torch.set_default_dtype(torch.float32)
    for key, p in GPT(config).named_parameters():
        if p.dim() == 2:
            wang = key.endswith(("attn.proj.weight", "mlp.down.weight"))
            assert abs(p.std().item() / (0.01473 if wang else 0.02795) - 1) < 0.01, key
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in key and "weight" in key))), key


# --- configurations -------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(n_layer=0), "n_layer must be int, at least 1"), (dict(n_embd="32"), "n_embd must be int"),
    (dict(n_head=3), "multiple of n_head"), (dict(rotary_pct=1.5), "rotary_pct"),
    (dict(rotary_pct=0.2), "even"), (dict(dropout=math.nan), "dropout"),
    (dict(nexus_streams="v"), "qk, q, k"), (dict(parallel_residual=1), "must be bool")])
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ModelError, match=message):
        replace(SMALL, **change)


def test_absurd_sizes_are_refused_before_they_are_built():
    for change in (dict(n_layer=10**9), dict(block_size=10**12)):
        with pytest.raises(ModelError, match="more than a trillion"):
            check_size(replace(SMALL, **change))
    check_size(preset_config("pythia-1b"))
