"""The inner maps but self in transformers models: the formulas, on every path."""

import copy
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

transformers = pytest.importorskip("transformers")
from test_retrofit import gradients, logits, make, tokens  # noqa: E402

from model import ModelError  # noqa: E402
from nanonexus.hf import load_neox  # noqa: E402
from nanonexus.retrofit import INNERS, attentions, load, nexus  # noqa: E402

OURS = INNERS[1:]
exact = dict(rtol=0, atol=1e-9)


def reference(attention, x, cos, sin, allowed, order, streams, inner, gate):
    """The attention's output from explicit weights, as the docstrings define it, in float64.

    allowed (B, 1, T, T): which tokens may see which; a token's own position is on the diagonal.
    """
    def heads(linear, x=x):
        return linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def rope(h):
        a, b = h.chunk(2, dim=-1)
        return h * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    def attn(a, b, c, allowed):
        scores = (rope(a) @ rope(b).mT * attention.scaling).masked_fill(~allowed, -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e9)).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ c

    q, k, v = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    H, K = q.size(1), k.size(1)
    group = [list(range(g * H // K, (g + 1) * H // K)) for g in range(K)]
    strict = allowed & ~torch.eye(x.size(1), dtype=torch.bool)

    def step(s, name, hq, hk):
        own = hq if name == "q" else hk
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


def uncompiled(monkeypatch, traced=False):
    """flex_attention and its masks as they are written: in float64, and soon there."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention(*args, **kwargs))
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG",
                        not traced)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask",
                        lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs))


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


@pytest.mark.parametrize("backend, dtype, error", [
    ("sdpa", torch.float64, 1e-9), ("flex_attention", torch.float64, 1e-9),
    ("eager", torch.float32, 2e-4)])  # its softmax is float32 always
@pytest.mark.parametrize("family, changes, window", [
    ("qwen2", {}, 64), ("qwen2", dict(num_key_value_heads=4), 64),
    ("mistral", dict(sliding_window=5, num_key_value_heads=1), 5)])
@pytest.mark.parametrize("case", ["plain", "left padding", "packed"])
def test_each_map_is_its_formula(case, family, changes, window, backend, dtype, error, monkeypatch):
    """Outputs and gradients: one key per query, groups of two and of four; without a mask, with
    sliding windows, padding on the left, documents in a row (one of a single token)."""
    uncompiled(monkeypatch)
    model = make(family, dtype, backend, **changes)
    allowed, real = who_sees_whom(case, window)
    for inner in OURS:
        for order, streams, gate in ((2, "qk", None), (3, "qk", 0.5), (2, "q", None),
                                     (3, "k", None)):
            nexus(model, order, streams, None, gate, inner).requires_grad_(False)
            for attention, given in inputs(model, input_ids=tokens(2, 14), **CASES[case][0]):
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


@pytest.mark.parametrize("inner", OURS)
@pytest.mark.parametrize("family, changes", [
    ("qwen2", {}), ("gpt_neox", {}), ("mistral", dict(sliding_window=4))])
def test_a_cache_changes_nothing(family, changes, inner):
    """Token by token, in pieces, in an allocated static cache, by beams, padded on the left."""
    if inner == "tokens" and family == "gpt_neox":
        pytest.skip("its projections are of another form")
    model, idx = make(family, **changes), tokens(2, 12)
    own = logits(model, idx)
    for order, streams in ((2, "qk"), (3, "k"), (2, "q")):
        nexus(model, order, streams, inner=inner)
        whole = logits(model, idx)
        assert (whole - own).abs().max() > 1e-3
        static = transformers.StaticCache(config=model.config, max_cache_len=16)
        static.early_initialization(2, *((4, 8) if family == "gpt_neox" else (2, 8)),
                                    torch.float64, "cpu")
        for cache, sizes in ((None, [1] * 12), (None, [5, 1, 3, 2, 1]), (static, [6, 1, 2, 3])):
            parts = []
            for part in idx.split(sizes, dim=1):
                with torch.no_grad():
                    out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, **exact)
    prompt, mask = idx[:, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    prompt[1, :3], mask[1, :3] = 0, 0
    settings = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    greedy = model.generate(prompt, attention_mask=mask, **settings)
    alone = model.generate(prompt[1:, 3:], attention_mask=mask[1:, 3:], **settings)
    assert torch.equal(alone[0], greedy[1, 3:])
    for kind in (dict(use_cache=False), dict(cache_implementation="static")):
        assert torch.equal(model.generate(prompt, attention_mask=mask, **settings, **kind), greedy)
    beams = [model.generate(prompt, attention_mask=mask, num_beams=3, use_cache=use, **settings)
             for use in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("inner", OURS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_packed_examples_and_custom_masks(inner, backend):
    """Documents in a row are each as if alone, also by a boolean or additive mask (1, 1, T, T)."""
    dtype, error = (torch.float64, 1e-9) if backend == "sdpa" else (torch.float32, 2e-4)
    model, idx = nexus(make("qwen2", dtype, backend), 3, inner=inner), tokens(1, 15)
    model.config.use_cache = False
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    packed = logits(model, idx, position_ids=positions)
    alone = torch.cat([logits(model, idx[:, :6]), logits(model, idx[:, 6:])], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=error)
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(9, 9)).tril().bool()[None, None]
    masks = [torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
             for low in (torch.finfo(dtype).min, -1e5)]
    for own in [mask, *masks] if backend == "sdpa" else masks:
        mine = logits(model, idx, position_ids=positions, attention_mask=own)
        torch.testing.assert_close(mine, alone, rtol=0, atol=error)


@pytest.mark.parametrize("inner", ["past", "cross"])
@pytest.mark.parametrize("order, streams", [(2, "qk"), (3, "qk"), (3, "q"), (2, "k")])
def test_a_retrofitted_pythia_is_our_gpt(order, streams, inner, tmp_path):
    torch.manual_seed(0)
    config = make("gpt_neox").config
    config.intermediate_size = 128
    model = transformers.GPTNeoXForCausalLM(config).float().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else None
    nexus(model, order, streams, inner=inner).save_pretrained(tmp_path)
    ours, idx = load_neox(str(tmp_path)).eval(), tokens(2, 40)
    assert (ours.config.nexus_order, ours.config.nexus_inner) == (order, inner)
    with torch.no_grad():
        want = ours(idx)
    torch.testing.assert_close(logits(model, idx), want, rtol=1e-4, atol=1e-4)
    again = load(tmp_path).eval()
    assert again.config.nexus["inner"] == inner
    assert torch.equal(logits(again, idx), logits(model, idx))
    settings = model.config.nexus
    del settings["inner"]  # as in retrofits from before there were others
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.nexus["inner"] == "self"
    assert load_neox(str(tmp_path)).config.nexus_inner == "self"


@pytest.mark.parametrize("inner", OURS)
def test_a_gate_from_0_checkpointing_and_compilation(inner):
    """The original bit for bit, and gates that learn; the same gradients in every way."""
    model, idx = make("qwen2" if inner == "tokens" else "qwen3"), tokens(2, 11)
    own = logits(model, idx)
    nexus(model, 2, gate=0, inner=inner)
    assert torch.equal(logits(model, idx), own)
    model(idx, labels=idx).loss.backward()
    assert all((a.nexus_gate.weight.grad != 0).all() for a in attentions(model))
    nexus(model, 3, gate=0.5, inner=inner).train()
    plain = gradients(model, idx)
    if inner == "cross":  # expensive, and the others are not special here
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for a, b in zip(gradients(compiled, idx), plain, strict=True):
            torch.testing.assert_close(a, b, **exact)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(model, idx), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_cannot_be_right_is_refused(monkeypatch):
    uncompiled(monkeypatch)
    model, idx = nexus(make("qwen2"), inner="past"), tokens(1, 5)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="'past' needs the attention sdpa, eager, flex_attention"):
        attentions(model)[0](hidden_states=torch.zeros(1, 5, 32).double(),
                             position_embeddings=(0, 0), attention_mask=None)
    model = nexus(make("qwen2", backend="flex_attention"), inner="cross")
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ModelError, match="static cache under flex_attention"), torch.no_grad():
        model(idx, past_key_values=static)
    with pytest.raises(ModelError, match="inner must be one of self, past, cross, shift, tokens"):
        nexus(model, inner="shared")
    for model in (make("gpt_neox"), make("qwen3"), make("qwen2", head_dim=4)):
        with pytest.raises(ModelError, match="'tokens' needs heads whose outputs have the model's"):
            nexus(model, inner="tokens")
    model = make("gemma", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="later tokens too"):
        nexus(model)
