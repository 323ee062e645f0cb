"""A checkpoint comes back as it was; a damaged, foreign or hostile file is refused in one line."""

from dataclasses import replace

import pytest
import torch
from questions import save as save_gpt

import model as ours
from model import CausalSelfAttention, GPTConfig, ModelError
from nanonexus import checkpoint
from nanonexus.checkpoint import PARTS, load_checkpoint
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
def test_a_control_comes_back_as_itself(tmp_path, name):
    """Also one without weights of its own, and never as the plain baseline."""
    gpt = save(tmp_path / "c.pt", control=name, nexus_order=1 + replaces_loops(name))
    loaded, _ = load_checkpoint(tmp_path / "c.pt")
    idx = torch.randint(61, (1, 9))
    assert torch.equal(loaded(idx), gpt(idx)) and type(loaded.blocks[0]) is type(gpt.blocks[0])
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    saved["config"]["control"] = ""
    torch.save(saved, tmp_path / "d.pt")
    with pytest.raises(ModelError, match="logits differ by|the weight .* (is|has no)"):
        load_checkpoint(tmp_path / "d.pt")


def edits():
    """Changes of model.py that add no weight: {what: (object, attribute, new value)}."""
    layer, attend, project = ours.output_layer, ours.attend, CausalSelfAttention.project

    def normed(self, x, parts="qkv"):
        return [torch.nn.functional.rms_norm(s, s.shape[-1:]) if n in "qk" else s
                for n, s in zip(parts, project(self, x, parts), strict=True)]

    def local(q, k, v, ctx, name="outer", strict=False):  # which only a long sequence meets
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        mask, past = mask & ~mask.tril(-20), 0 if ctx.cache is None else ctx.cache.past
        return attend(q, k, v, ctx._replace(
            mask=mask[past:past + q.size(2), :past + q.size(2)]), name, strict)

    return {
        "a window": (ours, "attend", local), "a soft-cap of 30": (checkpoint, "output_layer",
                             lambda h, w: 30 * torch.tanh(layer(h, w) / 30)),
        "another mask": (ours, "attend", lambda *args, **kwargs: attend(
            *args, **kwargs | dict(strict=True))),
        "QK-norm": (CausalSelfAttention, "project", normed)}


def test_a_changed_model_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "c.pt")
    for edit in edits().values():
        load_checkpoint(tmp_path / "c.pt")
        with monkeypatch.context() as patch:
            patch.setattr(*edit)
            with pytest.raises(ModelError, match="model.py has changed since: its logits differ"):
                load_checkpoint(tmp_path / "c.pt")
            save(tmp_path / "d.pt")  # and its own is taken
            load_checkpoint(tmp_path / "d.pt")


def test_positions_that_begin_again_with_a_cache_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "c.pt")

    def absolute(q, k, v, ctx, name="outer", strict=False, attend=ours.attend):
        return attend(q + torch.arange(q.size(2))[:, None] / 10, k, v, ctx, name, strict)

    monkeypatch.setattr(ours, "attend", absolute)
    with pytest.raises(ModelError, match="logits with a cache differ by"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_field_that_the_file_lacks_must_have_had_its_default(tmp_path):
    save(tmp_path / "c.pt", nexus_order=2, nexus_inner="past")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for lost, fine in (("gelu", True), ("nexus_inner", False)):
        config = {key: value for key, value in saved["config"].items() if key != lost}
        torch.save(saved | dict(config=config), tmp_path / "d.pt")
        if fine:
            load_checkpoint(tmp_path / "d.pt")
        else:
            with pytest.raises(ModelError, match="logits differ .* knows nothing of nexus_inner"):
                load_checkpoint(tmp_path / "d.pt")


def test_the_first_format_loads_with_a_note_and_a_later_one_does_not(tmp_path, capsys):
    gpt = make(nexus_order=2, nexus_inner="self")
    config = {key: value for key, value in vars(gpt.config).items()
              if key not in ("nexus_inner", "control")} | dict(checkpoint_attention=False)
    old = dict(model=gpt.state_dict(), config=config, step=3, tokenizer="bytes")
    torch.save(old, tmp_path / "old.pt")
    loaded, meta = load_checkpoint(tmp_path / "old.pt")
    assert loaded.config == gpt.config and meta["step"] == 3
    assert "written by an earlier version" in capsys.readouterr().err
    torch.save(old | dict(format=3), tmp_path / "new.pt")
    with pytest.raises(ModelError, match="has the format 3, written by a later version"):
        load_checkpoint(tmp_path / "new.pt")


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def test_bad_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(Evil(), "evil.pt")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    for path, message in (("none.pt", "no checkpoint at"), ("cut.pt", "damaged"),
                          ("empty.pt", "damaged"), ("text.pt", "damaged"), ("evil.pt", "damaged"),
                          ("other.pt", "not written by train.py")):
        with pytest.raises(ModelError, match=message) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil.txt").exists()



def test_a_part_of_another_kind_is_refused(tmp_path):
    save(tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for change in (*({part: wrong} for part in PARTS for wrong in (None, [None], torch.zeros(2))
                     if not isinstance(wrong, PARTS[part])), dict(model=dict(x=1)), dict(format=3),
                   dict(probe=torch.zeros(2)), dict(config={"vocab_size": 10**400}),
                   dict(config={1: 1})):
        torch.save(saved | change, tmp_path / "d.pt")
        with pytest.raises(ModelError, match="d.pt|more than a trillion"):
            load_checkpoint(tmp_path / "d.pt")
    del saved["probe"]
    torch.save(saved, tmp_path / "d.pt")
    with pytest.raises(ModelError, match="lacks the logits"):
        load_checkpoint(tmp_path / "d.pt")


def test_weights_that_do_not_fit_the_config_are_named(tmp_path):
    save(tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"embed.weight is \(61, 32\), not \(62, 32\)"):
        load_checkpoint(tmp_path / "c.pt", vocab_size=62)
    with pytest.raises(ModelError, match="no control 'shift': choose from key-shift"):
        load_checkpoint(tmp_path / "c.pt", control="shift")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for change in (lambda w: w.update(extra=torch.zeros(1)), lambda w: w.pop("norm.bias")):
        weights = dict(saved["model"])
        change(weights)
        torch.save(saved | dict(model=weights), tmp_path / "d.pt")
        with pytest.raises(ModelError, match="(extra has no place|norm.bias is missing)"):
            load_checkpoint(tmp_path / "d.pt")
    saved["config"]["n_expert"] = 8
    torch.save(saved, tmp_path / "c.pt")
    with pytest.raises(ModelError, match="a config that is not ours.*n_expert"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    save(tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt.partial").mkdir()  # where the new one would be written
    with pytest.raises(UserError, match="the last one is untouched"):
        save(tmp_path / "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == before
    with pytest.raises(UserError, match="there is none yet"):
        save(tmp_path / "no-folder/c.pt")


@pytest.mark.parametrize("inner", ["separate", "tokens"])
def test_readings_that_were_controls_are_still_read(inner, tmp_path):
    save(tmp_path / "c.pt", nexus_order=2, nexus_inner=inner)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    saved["config"] |= dict(control=inner, nexus_inner="cross")  # as they were called
    torch.save(saved | dict(args=dict(control=inner, lr=1.0)), tmp_path / "c.pt")
    model, meta = load_checkpoint(tmp_path / "c.pt")
    assert (model.config.nexus_inner, model.config.control) == (inner, "")
    assert meta["args"] == dict(control="", nexus_inner=inner, lr=1.0)
