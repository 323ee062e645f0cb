"""retrofit.py: equal to model.py, and works with all that transformers does. The formulas are in
test_retrofit_inner.py."""

import copy
import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import model as model_file  # noqa: E402
from model import ModelError  # noqa: E402
from nanonexus import retrofit  # noqa: E402
from nanonexus.decoder import load, override  # noqa: E402
from nanonexus.hf import load_neox  # noqa: E402
from nanonexus.retrofit import FAMILIES, INNERS, Nexus, attentions, nexus, probe  # noqa: E402

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


@pytest.mark.parametrize("inner, order, streams", [
    ("self", 2, "qk"), ("past", 3, "q"), ("cross", 3, "k"), ("cross", 2, "qk")])
def test_a_retrofitted_pythia_is_our_gpt(inner, order, streams, tmp_path):
    model = make("gpt_neox", torch.float32, intermediate_size=128)
    nexus(model, order, streams, inner=inner).save_pretrained(tmp_path)
    ours, idx = load_neox(str(tmp_path)).eval(), tokens(2, 40)
    assert (ours.config.nexus_order, ours.config.nexus_inner) == (order, inner)
    with torch.no_grad():
        want = ours(idx)
        torch.testing.assert_close(logits(model, idx), want, rtol=1e-4, atol=1e-4)
        again = load_neox(str(tmp_path), nexus_order=order, nexus_streams=streams).eval()
        assert torch.equal(again(idx), want)
    del model.config.nexus["inner"], model.config.nexus["probe"]  # as in the first retrofits
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.nexus["inner"] == load_neox(str(tmp_path)).config.nexus_inner \
        == "self"
    nexus(model, order, streams, gate=0.5).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has nexus gate 0.5"):
        load_neox(str(tmp_path))


def uncompiled(monkeypatch, traced=False):
    """flex_attention and its masks as they are written: in float64, and soon there."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention(*args, **kwargs))
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG",
                        not traced)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask",
                        lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs))


def gradients(model, idx):
    model.zero_grad()
    model(idx, labels=idx, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("inner", INNERS)
def test_gates_checkpointing_and_compilation(inner):
    """At 0 the original bit for bit, at 1 Nexus; a number per head and stream, which learns from
    the start. Gradients are the same in every way."""
    model, idx = make("qwen2", num_hidden_layers=1), tokens(2, 11)
    own, count = logits(model, idx), sum(p.numel() for p in model.parameters())
    for streams, heads in (("q", 4), ("k", 2), ("qk", 6)):
        full = logits(nexus(model, 2, streams, inner=inner), idx)
        gated = nexus(model, 2, streams, gate=1.0, inner=inner)
        torch.testing.assert_close(logits(gated, idx), full)
        nexus(model, 2, streams, gate=0, inner=inner)
        assert torch.equal(logits(model, idx), own)
        assert sum(p.numel() for p in model.parameters()) == count + heads
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


@pytest.mark.parametrize("gate", [None, 0.25])
def test_saved_and_loaded_and_copied(gate, tmp_path):
    model, idx = nexus(make("qwen2", torch.float32), 3, "k", layers=[0], gate=gate), tokens(1, 9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.nexus == model.config.nexus and again.config.nexus.items() >= dict(
        order=3, streams="k", layers=[0], gate=gate, inner="self").items()
    nexus(again, 3, "k", layers=[0], gate=gate)  # the same: nothing is lost
    assert [isinstance(m, Nexus) for m in attentions(again)] == [True, False]
    assert torch.equal(logits(again.eval(), idx), logits(model, idx))
    torch.testing.assert_close(in_pieces(again, idx, [5, 1, 3]), logits(model, idx), rtol=0,
                               atol=1e-4)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert logits(other, idx).abs().max() == 0 and logits(model, idx).abs().max() > 0
    config = tmp_path / "config.json"
    settings = json.loads(whole := config.read_text())
    config.write_text(json.dumps(settings | dict(nexus=dict(depth=2))))
    with pytest.raises(ModelError, match="config.json has no settings of nexus"):
        load(tmp_path)
    config.write_text(whole)
    if gate is not None:
        weights = load_file(tmp_path / "model.safetensors")
        save_file({k: w for k, w in weights.items() if "gate.weight" not in k},
                  tmp_path / "model.safetensors", metadata=dict(format="pt"))
        with pytest.raises(ModelError, match="lacks the gate"):
            load(tmp_path)


def test_a_changed_map_is_another_model(tmp_path, monkeypatch):
    """Whatever reads the folder: load, model.py's GPT, a resumed run (tests/test_finetune.py)."""
    probes = [probe("llama", order, streams, gated, inner) for inner in INNERS for order in (2, 3)
              for streams in ("qk", "q", "k") for gated in (False, True)]
    assert len({tuple(some) for some in probes}) == len(probes)
    for family in ("llama", "gpt_neox"):
        nexus(make(family, torch.float32, intermediate_size=128), inner="past").save_pretrained(
            tmp_path / family)
    load_neox(str(tmp_path / "gpt_neox"))
    attend = retrofit.attend_earlier
    monkeypatch.setattr(retrofit, "attend_earlier", lambda *given: 0.9 * attend(*given))
    probe.cache_clear()
    for read, family in ((load, "llama"), (load, "gpt_neox"), (load_neox, "gpt_neox")):
        with pytest.raises(ModelError, match="retrofit.py has changed since: .*'past'"):
            read(str(tmp_path / family))
    monkeypatch.undo()
    probe.cache_clear()
    monkeypatch.setattr(retrofit, "attend_earlier", lambda *given: (  # not of the first layer
        0.9 if given[-1].attention.layer_idx else 1) * attend(*given))
    with pytest.raises(ModelError, match="retrofit.py has changed since: .*'past'"):
        load(str(tmp_path / "llama"))
    monkeypatch.undo()
    probe.cache_clear()
    monkeypatch.setattr(model_file, "attend", lambda *given, attend=model_file.attend, **kwargs:
                        0.9 * attend(*given, **kwargs))
    with pytest.raises(ModelError, match="model.py computes something else by now"):
        load_neox(str(tmp_path / "gpt_neox"))


def test_a_map_that_ignores_the_cache_or_the_documents_is_refused(monkeypatch):
    for wrong, message in (
            (lambda h, seen, context: torch.cat([h[:, :, :1], h[:, :, :-1]], 2), "a cache"),
            (lambda h, seen, context: torch.cat([seen[:, :, :1], seen], 2)[:, :, -h.size(2) - 1:-1],
             "other documents in its row")):
        monkeypatch.setattr(retrofit, "previous", wrong)
        probe.cache_clear()
        with pytest.raises(ModelError, match=f"'shift' gives other logits with {message}"):
            nexus(make("llama"), streams="k", inner="shift")
    probe.cache_clear()


def test_a_folder_without_a_weight_is_refused(tmp_path):
    make("llama", torch.float32).save_pretrained(tmp_path)
    weights = load_file(path := tmp_path / "model.safetensors")
    lost = weights.pop("model.layers.1.self_attn.q_proj.weight")
    both = {"model.layers.1.self_attn.q_proj.weight": lost, "more": lost.clone()}
    for change, what in (({}, "q_proj.weight is missing"), (both, "more is unexpected")):
        save_file(weights | change, path, metadata=dict(format="pt"))
        with pytest.raises(ModelError, match=what):
            load(tmp_path)


def test_other_settings_keep_the_gates_that_fit():
    model = nexus(make("qwen2"), gate=0.0)
    for attention in attentions(model):
        attention.nexus_gate.weight.data.fill_(0.7)
    override(model, order=3, streams=None)
    assert model.config.nexus["order"] == 3 and model.config.nexus["gate"] == 0
    assert all((attention.nexus_gate.weight == 0.7).all() for attention in attentions(model))
    override(model, order=2, inner="past", gate=0.25)
    assert all((attention.nexus_gate.weight == 0.25).all() for attention in attentions(model))


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


def test_what_cannot_be_right_is_refused(monkeypatch):
    def refused(message, model, **settings):
        with pytest.raises(ModelError, match=message):
            nexus(model, **settings)

    llama, phi = make("llama"), torch.nn.Linear(1, 1)
    for message, settings in (
            ("order must be", dict(order=0)), ("order must be", dict(order=2.0)),
            ("streams must be", dict(streams="v")), ("layers must be from 0", dict(layers=[2])),
            ("a gate needs order 2", dict(order=1, gate=0)),
            (f"inner must be one of {', '.join(INNERS)}", dict(inner="shared"))):
        refused(message, llama, **settings)
    assert not any(isinstance(m, Nexus) for m in llama.modules())
    phi.config = transformers.AutoConfig.for_model("phi")
    refused("qwen2, .* this model is 'phi'", phi)
    for model in (make("gpt_neox"), make("qwen3"), make("qwen2", head_dim=4)):
        refused("'tokens' needs heads whose outputs have the model's", model, inner="tokens")
    refused("later tokens too", make("gemma", use_bidirectional_attention=True))

    uncompiled(monkeypatch)
    idx = tokens(1, 6)
    with torch.no_grad():
        cache = llama(idx, use_cache=True).past_key_values
        with pytest.raises(ModelError, match="filled before nexus"):
            nexus(llama)(idx, past_key_values=cache)
        nexus(llama, inner="past").config._attn_implementation = "flash_attention_2"
        with pytest.raises(ModelError, match="'past' needs the attention sdpa, eager, flex_attent"):
            attentions(llama)[0](hidden_states=torch.zeros(1, 5, 32).double(),
                                 position_embeddings=(0, 0), attention_mask=None)
        model = nexus(make("qwen2", backend="flex_attention"), inner="cross")
        static = transformers.StaticCache(config=model.config, max_cache_len=16)
        with pytest.raises(ModelError, match="static cache under flex_attention"):
            model(idx, past_key_values=static)
