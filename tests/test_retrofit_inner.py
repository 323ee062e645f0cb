"""The inner maps in transformers models are their formulas, on every path."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")
from test_retrofit import make, tokens, uncompiled  # noqa: E402

from nanonexus.retrofit import INNERS, attentions, nexus  # noqa: E402


def reference(attention, x, cos, sin, allowed, order, streams, inner, gate):
    """The attention's output from explicit weights, as the docstrings define it, in float64.

    allowed (B, 1, T, T): which tokens may see which; a token's own position is on the diagonal.
    """
    def heads(linear, x=x, norm=None):
        y = linear(x).unflatten(-1, (-1, attention.head_dim))
        return (y if norm is None else norm(y)).transpose(1, 2)

    def rope(h):
        a, b = h.chunk(2, dim=-1)
        return h * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    def attn(a, b, c, allowed):
        scores = (rope(a) @ rope(b).mT * attention.scaling).masked_fill(~allowed, -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e9)).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ c

    q, k = (heads(getattr(attention, f"{n}_proj"), norm=getattr(attention, f"{n}_norm", None))
            for n in "qk")
    v = heads(attention.v_proj)
    H, K = q.size(1), k.size(1)
    group = [list(range(g * H // K, (g + 1) * H // K)) for g in range(K)]
    strict = allowed & ~torch.eye(x.size(1), dtype=torch.bool)

    def step(s, name, hq, hk):
        own = hq if name == "q" else hk
        if inner == "self":
            return attn(own, own, s, allowed)
        if inner == "past":
            return s + attn(own, own, s, strict)
        if inner == "cross" and name == "q":
            return s + attn(hq, torch.cat([hk[:, [g]] for g in range(K) for _ in group[g]], 1), s,
                            strict)
        if inner == "cross":
            return s + attn(torch.stack([hq[:, group[g]].mean(1) for g in range(K)], 1), hk, s,
                            strict)
        before = torch.cat([own[:, :, :1], own[:, :, :-1]], 2)
        follows = torch.cat([strict[:, :, :1, 0] & False, strict.diagonal(-1, 2, 3)], 2)
        return torch.where(follows[..., None], before, own)

    hq, hk = q, k
    for _ in range(order - 1):
        if inner == "tokens":
            y = attn(hq, *(shared.repeat_interleave(H // K, 1) for shared in (hk, v)), allowed)
            y = y.transpose(1, 2).flatten(2)
            hq = heads(attention.q_proj, y) if "q" in streams else hq
            hk = heads(attention.k_proj, y) if "k" in streams else hk
            continue
        hq, hk = (step(q, "q", hq, hk) if "q" in streams else hq,
                  step(k, "k", hq, hk) if "k" in streams else hk)
    hq, hk = q + gate * (hq - q), k + gate * (hk - k)
    y = attn(hq, hk.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1), allowed)
    return attention.o_proj(y.transpose(1, 2).flatten(2))


def inputs(model, **kwargs):
    """What each attention of the model is given: [(attention, its arguments)]."""
    seen = []
    hooks = [a.register_forward_pre_hook(lambda a, args, kwargs: seen.append((a, kwargs)),
                                         with_kwargs=True) for a in attentions(model)]
    with torch.no_grad():
        model(use_cache=False, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


PLACES = torch.arange(14)
CASES = {  # what the model gets besides 2 rows of 14 tokens, and which may see which
    "plain": ({}, PLACES[:, None] >= PLACES),
    "left padding": (dict(attention_mask=torch.tensor([[1] * 14, [0] * 4 + [1] * 10])), None),
    "packed": (dict(position_ids=torch.cat([torch.arange(5), torch.arange(1), torch.arange(8)])
                    .expand(2, 14)), None)}


def who_sees_whom(case, window):
    row = torch.zeros(2, 14, dtype=torch.long)  # the document of each token
    row[1, :4] = -1 if case == "left padding" else 0
    if case == "packed":
        row[:, 5:6], row[:, 6:] = 1, 2
    back = PLACES[:, None] - PLACES
    allowed = (back >= 0) & (back < window) & (row[:, None] == row[:, :, None])
    return allowed[:, None], row >= 0


SDPA, FLEX, EAGER = (("sdpa", torch.float64, 1e-9), ("flex_attention", torch.float64, 1e-9),
                     ("eager", torch.float32, 2e-4))  # its softmax is float32 always
QWEN2, QWEN3 = ("qwen2", {}, 64), ("qwen3", dict(num_key_value_heads=4), 64)
MISTRAL = "mistral", dict(sliding_window=5, num_key_value_heads=1), 5


@pytest.mark.parametrize("family, backend, case", [
    *((family, SDPA, case) for family in (QWEN2, QWEN3, MISTRAL) for case in CASES),
    (QWEN2, FLEX, "left padding"), (QWEN2, FLEX, "packed"), (MISTRAL, FLEX, "packed"),
    (QWEN2, EAGER, "left padding"), (MISTRAL, EAGER, "packed")], ids=str)
def test_each_map_is_its_formula(family, backend, case, monkeypatch):
    """Outputs and gradients: one key per query, groups of two and of four, normed ones; without a
    mask, with sliding windows, padding on the left, documents in a row (one of a single token)."""
    uncompiled(monkeypatch)
    (family, changes, window), (backend, dtype, error) = family, backend
    if family == "qwen3":
        error = 2e-6  # its norms are float32 always
    model = make(family, dtype, backend, **changes)
    allowed, real = who_sees_whom(case, window)
    for inner in INNERS[:-1] if family == "qwen3" else INNERS:
        for order, streams, gate in ((3, "qk", 0.5), (2, "q", None), (2, "k", None)):
            nexus(model, order, streams, None, gate, inner).requires_grad_(False)
            attention, given = inputs(model, input_ids=tokens(2, 14), **CASES[case][0])[-1]
            x = given["hidden_states"].clone().requires_grad_(backend != "flex_attention")
            got = attention(**given | dict(hidden_states=x))[0][real].double()
            want = reference(copy.deepcopy(attention).double(), x.double(),
                             *given["position_embeddings"], allowed, order, streams, inner,
                             1 if gate is None else gate)[real]
            torch.testing.assert_close(got, want, rtol=0, atol=error)
            if x.requires_grad:
                weights = torch.linspace(-1, 1, got.numel(), dtype=torch.double).view_as(got)
                a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, want))
                torch.testing.assert_close(a, b, rtol=0, atol=error)


def test_dynamo_traces_flex_attention_again_and_again(monkeypatch):
    """Its guards fail (torch 2.13) where one tensor is query and key at once."""
    uncompiled(monkeypatch, traced=True)
    model, seen = make("qwen2", backend="flex_attention", num_key_value_heads=4), []
    for streams in ("qk", "q"):
        nexus(model, 2, streams, inner="past").requires_grad_(False)
        for attention, given in inputs(model, input_ids=tokens(2, 14),
                                       **CASES["left padding"][0]):
            seen.append(attention(**given)[0])
    assert all(y.isfinite().all() for y in seen) and not torch.equal(seen[0], seen[2])
