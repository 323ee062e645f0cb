"""A checkpoint comes back as it was; a damaged, foreign or hostile file is refused in one line."""

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from questions import save as save_gpt

import model as ours
from model import CausalSelfAttention, GPTConfig, ModelError
from nanonexus import checkpoint
from nanonexus.checkpoint import PARTS, check_new, load_checkpoint, probe
from nanonexus.cli import UserError
from nanonexus.controls import CONTROLS, build, replaces_loops

SMALL = GPTConfig(vocab_size=61, block_size=24, n_layer=1, n_head=2, n_embd=32, rotary_pct=0.5)


def make(**changes):
    """A model whose logits are as large as trained ones, up to about 15."""
    torch.manual_seed(0)
    gpt = build(replace(SMALL, **changes))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.4)
    gpt.head.weight.data.mul_(5)
    return gpt


def save(path, **changes):
    gpt = make(**changes)
    save_gpt(gpt, path, step=3)
    return gpt


def test_checkpoint_round_trip_with_overrides(tmp_path):
    gpt, idx = save(tmp_path / "c.pt"), torch.randint(61, (1, 9))
    loaded, meta = load_checkpoint(tmp_path / "c.pt")
    assert meta["step"] == 3 and meta["tokenizer"] == "bytes" and not loaded.training
    assert torch.equal(loaded(idx), gpt(idx))
    nexus, meta = load_checkpoint(tmp_path / "c.pt", nexus_order=2, attention="manual")
    assert not torch.allclose(nexus(idx), gpt(idx)) and meta["config"]["nexus_order"] == 1
    manual, _ = load_checkpoint(tmp_path / "c.pt", attention="manual")
    torch.testing.assert_close(manual(idx), gpt(idx), rtol=0, atol=1e-4)
    save_gpt(gpt.double(), tmp_path / "d.pt")  # another dtype is no change
    load_checkpoint(tmp_path / "d.pt")


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_comes_back_as_itself(change, tmp_path, name):
    """Also one without weights of its own, and never as the plain baseline."""
    gpt = save(tmp_path / "c.pt", control=name, nexus_order=1 + replaces_loops(name))
    loaded, _ = load_checkpoint(tmp_path / "c.pt")
    idx = torch.randint(61, (1, 9))
    assert torch.equal(loaded(idx), gpt(idx)) and type(loaded.blocks[0]) is type(gpt.blocks[0])
    with pytest.raises(ModelError, match="logits differ by|the weight .* (is|has no)"):
        load_checkpoint(change(config=asdict(gpt.config) | dict(control="")))


def normed(self, x, parts="qkv", project=CausalSelfAttention.project):
    return [torch.nn.functional.rms_norm(s, s.shape[-1:]) if n in "qk" else s
            for n, s in zip(parts, project(self, x, parts), strict=True)]


def local(q, k, v, ctx, *args, attend=ours.attend):  # which only a long sequence meets
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask, past = mask & ~mask.tril(-20), 0 if ctx.cache is None else ctx.cache.past
    return attend(q, k, v, ctx._replace(mask=mask[past:past + q.size(2), :past + q.size(2)]), *args)


def absolute(q, k, v, ctx, *args, attend=ours.attend):
    return attend(q + torch.arange(q.size(2))[:, None] / 10, k, v, ctx, *args)


@pytest.mark.parametrize("edit", [
    (ours, "attend", local), (ours, "attend", partial(ours.attend, strict=True)),
    (checkpoint, "output_layer", lambda h, w: 30 * torch.tanh(ours.output_layer(h, w) / 30)),
    (CausalSelfAttention, "project", normed), (ours, "attend", absolute)],
    ids=["a window", "another mask", "a soft-cap", "QK-norm", "positions from 0 after a cache"])
def test_a_model_py_that_was_changed_without_a_new_weight_is_refused(tmp_path, monkeypatch, edit):
    save(tmp_path / "c.pt")
    load_checkpoint(tmp_path / "c.pt")
    monkeypatch.setattr(*edit)
    if edit[2] is absolute:  # and no checkpoint of it can be made
        with pytest.raises(ModelError, match="logits with a cache differ by"):
            load_checkpoint(tmp_path / "c.pt")
    else:
        with pytest.raises(ModelError, match="model.py has changed since: its logits differ"):
            load_checkpoint(tmp_path / "c.pt")
        save(tmp_path / "d.pt")  # and its own is taken
        load_checkpoint(tmp_path / "d.pt")


@pytest.fixture
def change(tmp_path):
    """change(lost=..., part=...): the path of a copy of c.pt with other parts, one lost."""
    def change(lost=None, **parts):
        saved = torch.load(tmp_path / "c.pt", weights_only=True) | parts
        saved.pop(lost, None)
        torch.save(saved, tmp_path / "d.pt")
        return tmp_path / "d.pt"

    return change


def test_earlier_formats_load_and_a_later_one_does_not(change, tmp_path, capsys):
    gpt = save(tmp_path / "c.pt", nexus_order=2, nexus_inner="past")
    config = asdict(gpt.config)
    load_checkpoint(change(config={k: v for k, v in config.items() if k != "gelu"}))
    config.pop("nexus_inner")  # whose default it did not have
    with pytest.raises(ModelError, match="logits differ .* knows nothing of nexus_inner"):
        load_checkpoint(change(config=config))
    config.pop("control")
    path = change("probe", config=config | dict(checkpoint_attention=False), format=1)
    loaded, meta = load_checkpoint(path)
    assert loaded.config == replace(gpt.config, nexus_inner="self") and meta["step"] == 3
    assert "written by an earlier version" in capsys.readouterr().err
    with pytest.raises(ModelError, match="has the format 3, written by a later version"):
        load_checkpoint(change(format=3))


@pytest.mark.parametrize("inner", ["separate", "tokens"])
def test_readings_that_were_controls_are_still_read(change, inner, tmp_path):
    gpt = save(tmp_path / "c.pt", nexus_order=2, nexus_inner=inner)
    old = asdict(gpt.config) | dict(control=inner, nexus_inner="cross")  # as they were called
    model, meta = load_checkpoint(change(config=old, args=dict(control=inner, lr=1.0)))
    assert model.config == gpt.config
    assert meta["args"] == dict(control="", nexus_inner=inner, lr=1.0)


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


class Positions(torch.nn.Embedding):
    """Learned positions, initially 0, that forget how many tokens the cache has."""

    def __init__(self, weight):
        super().__init__(*weight.shape)
        self.position = torch.nn.Parameter(torch.zeros(99, weight.size(1)))

    def forward(self, idx):
        return super().forward(idx) + self.position[:idx.size(1)]


def test_a_wrong_cache_shows_before_its_parameters_have_learnt():
    gpt = make()
    check_new(gpt)
    gpt.embed = Positions(gpt.embed.weight)
    before = gpt.state_dict()["embed.position"].clone()
    probe(gpt)
    with pytest.raises(ModelError, match="logits with a cache differ"):
        check_new(gpt)
    assert torch.equal(gpt.embed.position, before)


class Average(CausalSelfAttention):
    def prepare(self, q, k, v, ctx):  # by a learnt share, which starts at zero, of all tokens
        return q, k + self.share * ctx.remember("mean", k).cumsum(2)[:, :, -k.size(2):], v


def test_a_leak_between_documents_shows_before_training():
    for attention in ("sdpa", "manual"):
        gpt = make(attention=attention)
        check_new(gpt, documents=True)
        for block in gpt.blocks:
            block.attn.__class__ = Average
            block.attn.share = torch.nn.Parameter(torch.zeros(()))
        check_new(gpt)
        with pytest.raises(ModelError, match="a document change the hidden states of the next"):
            check_new(gpt, documents=True)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    for name, content in (("cut.pt", whole[:len(whole) // 2]), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(content)
    torch.save(Evil(), "evil.pt")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    for path, message in (("none.pt", "no checkpoint at"), ("cut.pt", "damaged"),
                          ("text.pt", "damaged"), ("evil.pt", "damaged"),
                          ("other.pt", "not written by train.py")):
        with pytest.raises(ModelError, match=message) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil.txt").exists()


def test_parts_that_are_wrong_or_do_not_fit_are_named(change, tmp_path):
    gpt = save(tmp_path / "c.pt")
    model, config = gpt.state_dict(), asdict(gpt.config)
    short = {name: w for name, w in model.items() if name != "norm.bias"}
    for parts, message in [
            *(({part: wrong}, f"damaged: its {part} is a") for part in PARTS
              for wrong in ([None], torch.zeros(2)) if not isinstance(wrong, PARTS[part])),
            (dict(lost="probe"), "lacks the logits"), (dict(probe=torch.zeros(2)), "differ by inf"),
            (dict(model=dict(x=1)), "is missing"), (dict(model=short), "norm.bias is missing"),
            (dict(model=model | dict(extra=torch.zeros(1))), "extra has no place"),
            (dict(config=config | dict(vocab_size=10**400)), "more than a trillion"),
            (dict(config={1: 1}), "that is not ours"),
            (dict(config=config | dict(n_expert=8)), "that is not ours.*n_expert")]:
        with pytest.raises(ModelError, match=message):
            load_checkpoint(change(**parts))
    with pytest.raises(ModelError, match=r"embed.weight is \(61, 32\), not \(62, 32\)"):
        load_checkpoint(tmp_path / "c.pt", vocab_size=62)
    with pytest.raises(ModelError, match="no control 'shift': choose from key-shift"):
        load_checkpoint(tmp_path / "c.pt", control="shift")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    save(tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt.partial").mkdir()  # where the new one would be written
    with pytest.raises(UserError, match="the last one is untouched"):
        save(tmp_path / "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == before
    with pytest.raises(UserError, match="there is none yet"):
        save(tmp_path / "no-folder/c.pt")
