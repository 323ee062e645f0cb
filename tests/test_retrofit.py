"""retrofit.py: each inner map is its formula on every path, equal to model.py, and works with all
that transformers does."""

import copy
import json
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

transformers = pytest.importorskip("transformers")
from model import ModelError  # noqa: E402
from nanonexus.hf import load_neox  # noqa: E402
from nanonexus.retrofit import FAMILIES, INNERS, Nexus, attentions, load, nexus  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SHAPE = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
exact = dict(rtol=0, atol=1e-9)


def make(family, dtype=torch.float64, backend="sdpa", **changes):
    """A random model of a family, with weights large enough for attention to be sharp."""
    torch.manual_seed(0)
    shape = dict(SHAPE)
    if family == "gpt_neox":
        shape.pop("num_key_value_heads")
    if family in ("gemma", "mixtral", "qwen3", "qwen3_moe"):
        shape["head_dim"] = 8
    config = transformers.AutoConfig.for_model(family, **shape | changes)
    config._attn_implementation = backend
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def tokens(B, T, seed=1):
    return torch.randint(3, 100, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, idx, **kwargs):
    return model(idx, **kwargs).logits


@torch.no_grad()
def in_pieces(model, idx, sizes, cache=None):
    """The logits, through a cache, which is given or grows."""
    parts = []
    for part in idx.split(sizes, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Order 1 is the original bit for bit; higher orders are causal, change something, are the same
    token by token through the cache, and leave no trace when undone."""
    # experts have no float64 products, and sum in another order for another number of tokens
    experts = family.endswith(("moe", "mixtral"))
    dtype, error = (torch.float32, 1e-4) if experts else (torch.float64, 1e-9)
    model, idx = make(family, dtype), tokens(2, 12)
    own, weights = logits(model, idx), copy.deepcopy(model.state_dict())
    for order, streams, inner in ((3, "qk", "self"), (2, "k", "cross")):
        nexus(model, order, streams, inner=inner)
        refined = logits(model, idx)
        assert (refined - own).abs().max() > 1e-3
        other = torch.cat([idx[:, :7], tokens(2, 5, seed=2)], dim=1)
        torch.testing.assert_close(logits(model, other)[:, :7], refined[:, :7], rtol=0, atol=error)
        torch.testing.assert_close(in_pieces(model, idx, [5, 1, 1, 3, 2]), refined, rtol=0,
                                   atol=error)
    assert nexus(model, 1) is model and torch.equal(logits(model, idx), own)
    assert not any(isinstance(m, Nexus) for m in model.modules())
    assert not any("nexus" in name for m in model.modules() for name in vars(m))
    assert model.state_dict().keys() == weights.keys() and not hasattr(model.config, "nexus")
    assert all(torch.equal(w, weights[key]) for key, w in model.state_dict().items())


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


SDPA, FLEX, EAGER = (("sdpa", torch.float64, 1e-9), ("flex_attention", torch.float64, 1e-9),
                     ("eager", torch.float32, 2e-4))  # its softmax is float32 always
QWEN2, QWEN3 = ("qwen2", {}, 64), ("qwen3", dict(num_key_value_heads=4), 64)
MISTRAL = "mistral", dict(sliding_window=5, num_key_value_heads=1), 5


@pytest.mark.parametrize("family, backend, case", [
    *((family, SDPA, case) for family in (QWEN2, QWEN3, MISTRAL) for case in CASES),
    *((QWEN2, FLEX, case) for case in CASES), (MISTRAL, FLEX, "packed"),
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


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("family, changes, order, streams", [
    ("qwen2", {}, 3, "qk"), ("gpt_neox", {}, 2, "k"), ("mistral", dict(sliding_window=4), 2, "q")])
def test_a_cache_changes_nothing(family, changes, order, streams, inner):
    """Token by token, in pieces, in an allocated static cache, drawn, by beams, and padded on the
    left as alone."""
    if inner == "tokens" and family == "gpt_neox":
        pytest.skip("its projections are of another form")
    model, idx = nexus(make(family, **changes), order, streams, inner=inner), tokens(2, 12)
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    static.early_initialization(2, *((4, 8) if family == "gpt_neox" else (2, 8)), torch.float64,
                                "cpu")
    whole = logits(model, idx)
    for cache, sizes in ((None, [5, 1, 3, 2, 1]), (static, [6, 1, 2, 3])):
        torch.testing.assert_close(in_pieces(model, idx, sizes, cache), whole, **exact)
    prompt, mask = idx[:, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    prompt[1, :3], mask[1, :3] = 0, 0

    def generate(ids=prompt, mask=mask, **kwargs):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6,
                              pad_token_id=0, **dict(do_sample=False) | kwargs)

    greedy = generate()
    assert torch.equal(generate(prompt[1:, 3:], mask[1:, 3:])[0], greedy[1, 3:])
    assert torch.equal(generate(cache_implementation="static"), greedy)
    for kind in ({}, dict(do_sample=True, top_k=20), dict(num_beams=3)):
        assert torch.equal(generate(**kind), generate(use_cache=False, **kind))


def test_a_cache_of_the_original_model_is_refused():
    model, idx = make("llama"), tokens(1, 6)
    with torch.no_grad():
        cache = model(idx, use_cache=True).past_key_values
        nexus(model)
        with pytest.raises(ModelError, match="filled before nexus"):
            model(idx, past_key_values=cache)


@pytest.mark.parametrize("inner, backend", [*((inner, "sdpa") for inner in INNERS),
                                            ("past", "eager")])
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


@pytest.mark.parametrize("inner", ["self", "past", "cross"])
@pytest.mark.parametrize("order, streams", [(2, "qk"), (3, "q"), (3, "k")])
def test_a_retrofitted_pythia_is_our_gpt(order, streams, inner, tmp_path):
    model = make("gpt_neox", torch.float32, intermediate_size=128)
    nexus(model, order, streams, inner=inner).save_pretrained(tmp_path)
    ours, idx = load_neox(str(tmp_path)).eval(), tokens(2, 40)
    assert (ours.config.nexus_order, ours.config.nexus_inner) == (order, inner)
    with torch.no_grad():
        want = ours(idx)
        torch.testing.assert_close(logits(model, idx), want, rtol=1e-4, atol=1e-4)
        again = load_neox(str(tmp_path), nexus_order=order, nexus_streams=streams).eval()
        assert torch.equal(again(idx), want)
    del model.config.nexus["inner"]  # as in retrofits from before there were others
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.nexus["inner"] == load_neox(str(tmp_path)).config.nexus_inner \
        == "self"
    nexus(model, order, streams, gate=0.5).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has nexus gate 0.5"):
        load_neox(str(tmp_path))


def gradients(model, idx):
    model.zero_grad()
    model(idx, labels=idx, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("inner", INNERS)
def test_gates_checkpointing_and_compilation(inner):
    """At 0 the original bit for bit, at 1 Nexus; a number per head and stream, which learns from
    the start. Gradients are the same in every way."""
    model, idx = make("qwen2"), tokens(2, 11)
    own, count = logits(model, idx), sum(p.numel() for p in model.parameters())
    for streams, heads in (("q", 4), ("k", 2), ("qk", 6)):
        full = logits(nexus(model, 2, streams, inner=inner), idx)
        gated = nexus(model, 2, streams, gate=1.0, inner=inner)
        torch.testing.assert_close(logits(gated, idx), full)
        nexus(model, 2, streams, gate=0, inner=inner)
        assert torch.equal(logits(model, idx), own)
        assert sum(p.numel() for p in model.parameters()) == count + 2 * heads
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


def test_some_layers_only():
    model = nexus(make("llama"), 2, layers=[1, 1])
    assert [isinstance(m, Nexus) for m in attentions(model)] == [False, True]
    idx, cached = tokens(1, 9), copy.deepcopy(model)
    assert torch.equal(model.generate(idx, max_new_tokens=5, do_sample=False),
                       cached.generate(idx, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("gate", [None, 0.25])
def test_saved_and_loaded_and_copied(gate, tmp_path):
    model, idx = nexus(make("qwen2", torch.float32), 3, "k", layers=[0], gate=gate), tokens(1, 9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.nexus == dict(order=3, streams="k", layers=[0], gate=gate, inner="self")
    nexus(again, 3, "k", layers=[0], gate=gate)  # the same: nothing is lost
    assert torch.equal(logits(again.eval(), idx), logits(model, idx))
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert logits(other, idx).abs().max() == 0 and logits(model, idx).abs().max() > 0
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | dict(nexus=dict(depth=2))))
    with pytest.raises(ModelError, match="config.json has no settings of nexus"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if gate is not None:
        from safetensors.torch import load_file, save_file
        weights = load_file(tmp_path / "model.safetensors")
        save_file({k: w for k, w in weights.items() if "gate.weight" not in k},
                  tmp_path / "model.safetensors", metadata=dict(format="pt"))
        with pytest.raises(ModelError, match="lacks the gate"):
            load(tmp_path)


def test_lora_on_top():
    peft = pytest.importorskip("peft")
    model, idx = nexus(make("qwen2"), 2, gate=0.1), tokens(2, 9)
    before = logits(model, idx)
    tuned = peft.get_peft_model(model, peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj"], modules_to_save=["nexus_gate"]))
    assert torch.equal(logits(tuned, idx), before)
    tuned(idx, labels=idx).loss.backward()
    learnt = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert learnt and all("lora" in name or "nexus_gate" in name for name in learnt)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    after = logits(tuned, idx)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(tuned.merge_and_unload(), idx), after, rtol=0, atol=1e-9)


def test_settings_out_of_range():
    model = make("llama")
    for settings, message in (
            (dict(order=0), "order must be"), (dict(order=2.0), "order must be"),
            (dict(streams="v"), "streams must be"), (dict(layers=[2]), "layers must be from 0 to"),
            (dict(order=1, gate=0), "a gate needs order 2"),
            (dict(inner="shared"), "inner must be one of self, past, cross, shift, tokens")):
        with pytest.raises(ModelError, match=message):
            nexus(model, **settings)
    assert not any(isinstance(m, Nexus) for m in model.modules())


def test_models_that_it_does_not_fit():
    model = torch.nn.Linear(1, 1)
    model.config = transformers.AutoConfig.for_model("phi")
    with pytest.raises(ModelError, match="qwen2, .* this model is 'phi'"):
        nexus(model)
    for model in (make("gpt_neox"), make("qwen3"), make("qwen2", head_dim=4)):
        with pytest.raises(ModelError, match="'tokens' needs heads whose outputs have the model's"):
            nexus(model, inner="tokens")
    with pytest.raises(ModelError, match="later tokens too"):
        nexus(make("gemma", use_bidirectional_attention=True))


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
