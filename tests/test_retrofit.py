"""retrofit.py: equal to model.py and to the formula, and works with all that transformers does."""

import copy
import json
import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

transformers = pytest.importorskip("transformers")
from model import ModelError  # noqa: E402
from nanonexus.hf import load_neox  # noqa: E402
from nanonexus.retrofit import FAMILIES, Nexus, attentions, load, nexus  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SHAPE = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Order 1 is the original bit for bit; higher orders are causal, change something, are the same
    token by token through the cache, and leave no trace when undone."""
    # experts have no float64 products, and sum in another order for another number of tokens
    experts = family.endswith(("moe", "mixtral"))
    dtype, error = (torch.float32, 1e-4) if experts else (torch.float64, 1e-9)
    model, idx = make(family, dtype), tokens(2, 12)
    own, weights = logits(model, idx), copy.deepcopy(model.state_dict())
    for order, streams in ((2, "qk"), (3, "k"), (3, "q")):
        nexus(model, order, streams)
        refined = logits(model, idx)
        assert (refined - own).abs().max() > 1e-3
        other = torch.cat([idx[:, :7], tokens(2, 5, seed=2)], dim=1)
        torch.testing.assert_close(logits(model, other)[:, :7], refined[:, :7], rtol=0, atol=error)
        cache, parts = None, []
        for part in idx.split([5, 1, 1, 3, 2], dim=1):
            with torch.no_grad():
                out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), refined, rtol=0, atol=error)
    assert nexus(model, 1) is model and torch.equal(logits(model, idx), own)
    assert not any(isinstance(m, Nexus) for m in model.modules())
    assert not any("nexus" in name for m in model.modules() for name in vars(m))
    assert model.state_dict().keys() == weights.keys() and not hasattr(model.config, "nexus")
    assert all(torch.equal(w, weights[key]) for key, w in model.state_dict().items())


@pytest.mark.parametrize("streams", ["qk", "q", "k"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_retrofitted_pythia_is_our_gpt(order, streams, tmp_path):
    model = make("gpt_neox", torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    model.config.intermediate_size = 128
    model = transformers.GPTNeoXForCausalLM(model.config).eval()
    model.save_pretrained(tmp_path)
    ours, idx = load_neox(str(tmp_path), nexus_order=order, nexus_streams=streams), tokens(2, 40)
    with torch.no_grad():
        want = ours.eval()(idx)
    torch.testing.assert_close(logits(nexus(model, order, streams), idx), want, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)  # and a model retrofitted there is read as such here
    again = load_neox(str(tmp_path))
    assert again.config.nexus_order == order
    with torch.no_grad():
        assert torch.equal(again.eval()(idx), want)
    if order == 2:
        nexus(model, order, streams, gate=0.5).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="has nexus gate 0.5"):
            load_neox(str(tmp_path))


def reference(attention, x, cos, sin, allowed, order, streams):
    """The attention's output by the formula: loops of softmax(mask + rope(h) rope(h)^T scale) s."""
    B, T, _ = x.shape

    def heads(linear, norm=None):
        y = linear(x).view(B, T, -1, attention.head_dim)
        return (y if norm is None else norm(y)).transpose(1, 2)

    def rope(h):
        a, b = h.chunk(2, dim=-1)
        return h * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    def attend(q, k, v):
        scores = (rope(q) @ rope(k).mT * attention.scaling).masked_fill(~allowed, -math.inf)
        return scores.softmax(-1) @ v

    q = heads(attention.q_proj, getattr(attention, "q_norm", None))
    k = heads(attention.k_proj, getattr(attention, "k_norm", None))
    v, s, t = heads(attention.v_proj), q, k
    for _ in range(order - 1):
        q = attend(q, q, s) if "q" in streams else q
        k = attend(k, k, t) if "k" in streams else k
    groups = q.size(1) // k.size(1)
    y = attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    return attention.o_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend, dtype, error", [
    ("sdpa", torch.float64, 1e-9), ("flex_attention", torch.float64, 1e-9),
    ("eager", torch.float32, 1e-4)])  # its softmax is float32 always
@pytest.mark.parametrize("family, changes, window", [
    ("qwen2", {}, 64), ("qwen3", {}, 64), ("llama", dict(attention_bias=True), 64),
    ("mistral", dict(sliding_window=5), 5)])
def test_each_attention_is_the_formula(family, changes, window, backend, dtype, error, monkeypatch):
    """Grouped queries, norms, the sliding window, and padding on the left."""
    monkeypatch.setattr(  # not compiled: slower, and in float64
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention(*args, **kwargs))
    model, idx = make(family, dtype, backend, **changes), tokens(2, 14)
    padding = torch.ones_like(idx)
    padding[1, :4] = 0
    past = torch.arange(14)[:, None] - torch.arange(14)
    allowed = (past >= 0) & (past < window) & padding[:, None, None, :].bool()
    allowed |= torch.eye(14, dtype=torch.bool)  # padding sees itself here: no row without a sum
    for order, streams in ((1, "qk"), (2, "qk"), (3, "q"), (3, "k")):
        nexus(model, order, streams)
        for attention in attentions(model):
            seen = []
            hook = attention.register_forward_hook(
                lambda module, args, kwargs, out, seen=seen: seen.append((kwargs, out[0])),
                with_kwargs=True)
            logits(model, idx, attention_mask=padding)
            hook.remove()
            with torch.no_grad():
                want = reference(attention, seen[0][0]["hidden_states"],
                                 *seen[0][0]["position_embeddings"], allowed, order, streams)
            real = padding.bool()
            torch.testing.assert_close(seen[0][1][real], want[real], rtol=0, atol=error)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("order", [2, 3])
def test_generation(family, order):
    """Greedy, sampled and by beams: with and without a cache, a static one too, and in a batch that
    is padded on the left as each prompt alone."""
    model = nexus(make(family, **dict(sliding_window=6) if family == "mistral" else {}), order)
    idx, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    idx[1, :3], mask[1, :3] = 0, 0
    kinds = [dict(do_sample=False), dict(do_sample=True, top_k=20),
             dict(do_sample=False, num_beams=3)]

    def generate(ids, mask, **kwargs):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=10, min_new_tokens=10,
                              pad_token_id=0, **kwargs)

    for kind in kinds:
        cached = generate(idx, mask, **kind)
        assert torch.equal(cached, generate(idx, mask, use_cache=False, **kind))
    greedy = generate(idx, mask, **kinds[0])
    assert torch.equal(generate(idx, mask, cache_implementation="static", **kinds[0]), greedy)
    alone = generate(idx[1:, 3:], mask[1:, 3:], **kinds[0])
    assert torch.equal(alone[0], greedy[1, 3:])


def test_a_cache_of_the_original_model_is_refused():
    model, idx = make("llama"), tokens(1, 6)
    with torch.no_grad():
        cache = model(idx, use_cache=True).past_key_values
        nexus(model)
        with pytest.raises(ModelError, match="filled before nexus"):
            model(idx, past_key_values=cache)


def test_a_static_cache_that_is_already_allocated():
    model, idx = nexus(make("qwen2"), 3), tokens(2, 9)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(2, 2, 8, torch.float64, "cpu")
    with torch.no_grad():
        first = model(idx[:, :6], past_key_values=cache).logits
        second = model(idx[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), logits(model, idx), rtol=0, atol=1e-9)


def test_packed_examples_do_not_see_each_other():
    model, idx = nexus(make("qwen2"), 3), tokens(1, 15)
    model.config.use_cache = False
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    packed = logits(model, idx, position_ids=positions)
    torch.testing.assert_close(packed[:, 6:], logits(model, idx[:, 6:]), rtol=0, atol=1e-9)
    idx[:, :6] = tokens(1, 6, seed=5)
    assert torch.equal(logits(model, idx, position_ids=positions)[:, 6:], packed[:, 6:])


@pytest.mark.parametrize("streams, heads", [("qk", 6), ("q", 4), ("k", 2)])
def test_gates(streams, heads):
    """At 0 the original, at 1 Nexus; a number per head and stream, which learns from the start."""
    model, idx = make("qwen2"), tokens(2, 10)
    own, count = logits(model, idx), sum(p.numel() for p in model.parameters())
    full = logits(nexus(model, 2, streams), idx)
    torch.testing.assert_close(logits(nexus(model, 2, streams, gate=1.0), idx), full)
    nexus(model, 2, streams, gate=0)
    assert torch.equal(logits(model, idx), own)
    assert sum(p.numel() for p in model.parameters()) == count + 2 * heads
    model(idx, labels=idx).loss.backward()
    for attention in attentions(model):
        assert (attention.nexus_gate.weight.grad != 0).all()


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


def gradients(model, idx):
    model.zero_grad()
    model(idx, labels=idx, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing_and_compilation_change_nothing():
    model, idx = nexus(make("qwen3"), 3, gate=0.5).train(), tokens(2, 11)
    plain = gradients(model, idx)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, idx), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(model, idx), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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


@pytest.mark.parametrize("settings, message", [
    (dict(order=0), "order must be"), (dict(order=2.0), "order must be"),
    (dict(streams="v"), "streams must be"), (dict(layers=[2]), "layers must be from 0 to 1"),
    (dict(order=1, gate=0), "a gate needs order 2")])
def test_settings_out_of_range(settings, message):
    model = make("llama")
    with pytest.raises(ModelError, match=message):
        nexus(model, **settings)
    assert not any(isinstance(m, Nexus) for m in model.modules())


@pytest.mark.parametrize("family, shape", [
    ("gpt2", dict(n_layer=1, n_embd=16, n_head=2)), ("bert", {}), ("phi", {}), ("t5", {})])
def test_models_that_it_does_not_fit(family, shape):
    config = transformers.AutoConfig.for_model(family, **shape)
    model = torch.nn.Linear(1, 1)
    model.config = config
    with pytest.raises(ModelError, match=f"qwen2, .* this model is '{family}'"):
        nexus(model)
