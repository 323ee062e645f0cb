"""A checkpoint comes back as it was; a damaged, foreign or hostile file is refused in one line."""

from dataclasses import asdict

import pytest
import torch

from model import GPT, GPTConfig, ModelError
from nanonexus.checkpoint import load_checkpoint, save_checkpoint
from nanonexus.cli import UserError


def save(path, **changes):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=32,
                        rotary_pct=0.5, **changes))
    save_checkpoint(str(path), dict(model=gpt.state_dict(), config=asdict(gpt.config), step=3,
                                    tokenizer="bytes"))
    return gpt


def test_checkpoint_round_trip_with_overrides(tmp_path):
    gpt, idx = save(tmp_path / "c.pt"), torch.randint(61, (1, 9))
    loaded, meta = load_checkpoint(tmp_path / "c.pt")
    assert meta["step"] == 3 and meta["tokenizer"] == "bytes" and not loaded.training
    assert torch.equal(loaded(idx)[0], gpt(idx)[0])
    nexus, _ = load_checkpoint(tmp_path / "c.pt", nexus_order=2, attention="manual")
    assert not torch.allclose(nexus(idx)[0], gpt(idx)[0])


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



def test_weights_that_do_not_fit_the_config_are_named(tmp_path):
    save(tmp_path / "c.pt")
    with pytest.raises(ModelError, match="the weight embed.weight is missing, unknown or"):
        load_checkpoint(tmp_path / "c.pt", vocab_size=62)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for change in (lambda w: w.update(extra=torch.zeros(1)), lambda w: w.pop("norm.bias")):
        weights = dict(saved["model"])
        change(weights)
        torch.save(saved | dict(model=weights), tmp_path / "d.pt")
        with pytest.raises(ModelError, match="the weight (extra|norm.bias) is missing, unknown or"):
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
