"""view.py: the page holds manual attention's weights; mistakes are one line."""

import base64
import json
import os
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from questions import add_inner_step
from questions import save as save_model

from model import CausalSelfAttention, GPTConfig, ModelError, attend
from nanonexus import view
from nanonexus.cli import run_script
from nanonexus.controls import CONTROLS, build, describe, replaces_loops
from nanonexus.files import write_text
from nanonexus.hf import open_model

PROMPT = "The naïve </script><!-- &amp; “river”\n"
T = len(PROMPT.encode())


def save(path, seed=0, tokenizer="bytes", **config):
    """A checkpoint whose attention is far from even: the weights of a fresh model, times 8."""
    torch.manual_seed(seed)
    model = build(GPTConfig(**dict(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=32,
                                   rotary_pct=1.0) | config))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    save_model(model, path, step=7, tokenizer=tokenizer)
    return str(path)


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["view.py", *argv])
    run_script(view.main)


class Data(HTMLParser):
    """The content of the page's data script, as a browser would extract it."""

    within, text, scripts = False, "", 0

    def handle_starttag(self, tag, attrs):
        self.within = dict(attrs).get("id") == "data"
        self.scripts += tag == "script"

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, text):
        self.text += text if self.within else ""


def read(path):
    with open(path, encoding="utf-8") as f:
        parser = Data()
        parser.feed(f.read())
    assert parser.scripts == 2
    return json.loads(parser.text)


def unpack(code, shape):
    """view.pack's inverse, by base64's own rules: (..., T, T), 0 above the diagonal."""
    raw = np.frombuffer(base64.b64decode(code + "A" * (-len(code) % 4)), np.uint8)
    raw = raw.astype(int).reshape(-1, 3)  # two numbers of 12 bits
    codes = np.stack([raw[:, 0] * 16 + raw[:, 1] // 16, raw[:, 1] % 16 * 256 + raw[:, 2]], 1)
    row, column = np.tril_indices(shape[-1])
    weights = np.zeros(shape)
    count = int(np.prod(shape[:-2])) * len(row)
    weights[..., row, column] = (codes.ravel()[:count] / 4095).reshape(*shape[:-2], -1) ** 2
    return torch.from_numpy(weights)


def manual(path, text=PROMPT):
    """All the maps of each layer, (layers, maps, heads, T, T), from a forward pass."""
    model, tokenizer, _ = open_model(path, attention="manual")
    maps = {}
    model(torch.tensor([tokenizer.encode_ordinary(text)]), maps=maps)
    return torch.cat(list(maps.values())).unflatten(0, (model.config.n_layer, -1)).double()


@pytest.mark.parametrize("T", [1, 2, 9])
def test_pack(T):
    torch.manual_seed(0)
    weights = (8 * torch.randn(2, 3, T, T)).softmax(-1).tril()
    weights[0, 0, -1, 0], weights[1, 2, 0, 0] = 1, 0
    off = (unpack(view.pack(weights), weights.shape) - weights).abs()
    assert off.max() < 2.5e-4
    assert (off[weights < 1e-4] < 2e-6).all()  # small weights keep their digits
    assert len(view.pack(weights)) == 2 * 6 * T * (T + 1) // 2


# kinds, and the places of the maps among those of the forward pass
VARIANTS = [(dict(), ["outer"], [0]),
            (dict(nexus_order=2, nexus_inner="self"), ["q", "k", "outer"], [0, 1, 2]),
            (dict(nexus_order=3, nexus_inner="past"), ["q", "k", "q", "k", "outer"], range(5)),
            (dict(nexus_order=2, nexus_inner="past", nexus_streams="k"), ["k", "outer"], [0, 1]),
            (dict(nexus_order=2, nexus_inner="shared", nexus_streams="q"), ["q", "outer"], [0, 1]),
            (dict(nexus_order=3, nexus_inner="cross"), ["inner", "inner", "outer"], [0, 2, 4]),
            (dict(nexus_order=2, nexus_inner="cross", nexus_streams="k"), ["k", "outer"], [0, 1]),
            (dict(nexus_order=2, nexus_inner="cross", control="twice"),
             ["inner", "outer", "inner", "outer"], [0, 2, 3, 5]),
            (dict(nexus_order=2, nexus_inner="tokens"), ["inner", "outer"], [0, 1])]


def check(data, want):
    """The page's maps have these weights, (layers, maps, heads, T, T)."""
    assert len(data["maps"]) == want.size(1)
    for found, weights in zip(data["maps"], want.transpose(0, 1), strict=True):
        assert (unpack(found["code"], weights.shape) - weights).abs().max() < 1e-3
    assert len({m["title"] for m in data["maps"]}) == want.size(1)


@pytest.mark.parametrize("config, kinds, places", VARIANTS)
def test_the_page_holds_manual_attentions_weights(config, kinds, places, tmp_path, monkeypatch):
    path, out = save(tmp_path / "ckpt.pt", **config), str(tmp_path / "view.html")
    run(monkeypatch, "--checkpoint", path, "--prompt", PROMPT, "--out", out)
    data, want = read(out), manual(path)
    assert [m["kind"] for m in data["maps"]] == kinds
    check(data, want[:, list(places)])
    assert ("query (" in data["legend"]) == ("q" in kinds or "inner q and k" in str(data["maps"]))
    assert ("inner attention shows" in data["legend"]) == (len(kinds) > 1)
    assert ("never from itself" in data["legend"]) == (
        config.get("nexus_inner") in ("past", "cross") or config.get("control") == "twice")
    assert ("the same map" in data["legend"]) == (places in ([0, 2, 4], [0, 2, 3, 5]))
    assert data["about"] == (describe(GPTConfig(**config)) + "; 2 layers of 2 heads, training step "
                             "7.")
    assert "".join(data["tokens"]) == ("The␣na⟨C3⟩⟨AF⟩ve␣</script><!--␣&amp;␣"
                                       "⟨E2⟩⟨80⟩⟨9C⟩river⟨E2⟩⟨80⟩⟨9D⟩↵")


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_is_shown(control, tmp_path, monkeypatch):
    order = 3 if replaces_loops(control) else 1
    path, out = save(tmp_path / "ckpt.pt", control=control, nexus_order=order), \
        str(tmp_path / "view.html")
    run(monkeypatch, "--checkpoint", path, "--prompt", PROMPT, "--out", out)
    data, want = read(out), manual(path)
    check(data, want[:, [0, 2, 4]] if control.startswith("cross") else want)  # equal ones once
    assert data["maps"][-1]["title"] == "outer" and control in data["about"]
    assert ("a layer applies before its own" in data["legend"]) == (control == "twice")
    if control.startswith("tokens"):
        assert [m["title"] for m in data["maps"]] == ["inner h, loop 1", "inner h, loop 2", "outer"]
        assert data["legend"].startswith("Here a token gathers from other tokens first")


def some(n, h, s, ctx, name):
    return s + attend(h[n], h[n], s, ctx, name, strict=n == "k")


def own_name(n, h, s, ctx, name):  # in the second layer alone
    return s + attend(h[n], h[n], s, ctx, f"{n} to all") if ctx.layer else s


@pytest.mark.parametrize("step, titles, legend", [
    (some, ["inner q, loop 1", "inner k, loop 1", "outer"], "In inner k, loop 1, it gathers from "
     "those before it, in the others from itself as well."),
    (own_name, ["q to all", "k to all", "outer"], "It gathers from those before it, and from")])
def test_an_added_inner_step_is_shown(step, titles, legend, tmp_path, monkeypatch):
    """As one adds it to model.py: a word of nexus_inner and a case of inner_step."""
    add_inner_step(monkeypatch, "new")
    monkeypatch.setattr(CausalSelfAttention, "inner_step", lambda self, *args: step(*args))
    path, out = save(tmp_path / "ckpt.pt", nexus_order=2, nexus_inner="new"), \
        str(tmp_path / "view.html")
    run(monkeypatch, "--checkpoint", path, "--prompt", PROMPT, "--out", out)
    data = read(out)
    if step is own_name:  # a layer without such a map shows zeros
        model, _, _ = open_model(path, attention="manual")
        model(torch.tensor([list(PROMPT.encode())]), maps=(maps := {}))
        zero = torch.zeros(1, 2, T, T)
        want = torch.stack([torch.cat([maps.get((layer, name), zero) for name in titles])
                            for layer in (0, 1)]).double()
        assert not want[0, :2].any() and want[1, :2].any()
    else:
        want = manual(path)
    check(data, want)
    assert [m["title"] for m in data["maps"]] == titles and data["about"].startswith("order 2, new")
    assert legend in data["legend"] and "query (" in data["legend"] and "key (" in data["legend"]


@pytest.mark.parametrize("weights, message", [
    (torch.full((1, 2, 3, 3), 1.5), "a weight from 0 to 1"),
    (torch.full((1, 2, 3, 3), -0.1), "a weight from 0 to 1"),
    (torch.zeros(1, 2, 3, 4), "each pair of 3 tokens"),
    (torch.zeros(1, 1, 3, 3), "each of 2 heads"),
    (None, "nothing to show")])
def test_weights_that_cannot_be_shown_are_refused(weights, message):
    def hidden_states(idx, maps):
        maps.update({} if weights is None else {(0, "outer"): weights})

    config = GPTConfig(n_layer=1, n_head=2)
    with pytest.raises(ModelError, match=message):
        view.attention_maps(SimpleNamespace(config=config, hidden_states=hidden_states), [1, 2, 3])


def test_maps_of_two_tokens_are_not_taken_for_one(tmp_path):
    """Strict maps of two tokens are all equal, whatever the inner step."""
    model, _, _ = open_model(save(tmp_path / "a.pt", nexus_order=2, nexus_inner="past"),
                             attention="manual")
    assert list(view.attention_maps(model, [1, 2])) == ["q1", "k1", "outer"]


def test_chosen_layers_and_the_baseline(tmp_path, monkeypatch, capsys):
    path, out = save(tmp_path / "a.pt", n_layer=3, nexus_order=2, nexus_inner="self"), \
        str(tmp_path / "view.html")
    base = save(tmp_path / "b.pt", n_layer=3, seed=1)
    run(monkeypatch, "--checkpoint", path, "--baseline", base, "--prompt", PROMPT, "--out", out,
        "--layers", "3,1")
    data = read(out)
    assert data["layers"] == [3, 1] and data["maps"][-1]["kind"] == "baseline"
    for found, want in ((data["maps"][-2], manual(path)), (data["maps"][-1], manual(base))):
        assert (unpack(found["code"], (2, 2, T, T)) - want[[2, 0], -1]).abs().max() < 1e-3
    assert f"{T} tokens, 4 maps in each of 2 layers" in capsys.readouterr().out


def test_size(tmp_path, monkeypatch):
    """64 tokens of a model with Pythia-70M's 6 layers of 8 heads, order 3, with a baseline."""
    shape = dict(n_layer=6, n_head=8, n_embd=64)
    path = save(tmp_path / "a.pt", nexus_order=3, nexus_inner="self", **shape)
    base, out = save(tmp_path / "b.pt", **shape), str(tmp_path / "view.html")
    run(monkeypatch, "--checkpoint", path, "--baseline", base, "--prompt", "x" * 64, "--out", out)
    assert 1e6 < os.path.getsize(out) < 2e6


# a tokenizer may have them as one token
EVIL = ["</script><script>throw 1</script>", "<!--<script>", "{{data}}", "\u2028\\", "<img src=x>"]


def test_a_token_cannot_end_the_data(tmp_path):
    write_text(tmp_path / "view.html", view.page(dict(tokens=EVIL)))
    assert read(tmp_path / "view.html") == dict(tokens=EVIL)


@pytest.mark.parametrize("token, text", [
    (b"the", "the"), (b" the", " the"), (b"  ", "␣␣"), (b" \n", "␣↵"), (b"a\tb", "a⇥b"),
    (b"\xc3", "⟨C3⟩"), ("é".encode(), "é"), (b"\x00", "⟨U+0000⟩"),
    ("\u202ea\u2028".encode(), "⟨U+202E⟩a⟨U+2028⟩"), (b"<", "<")])
def test_spell(token, text):
    assert view.spell(token) == text


@pytest.mark.parametrize("argv, message", [
    (["--prompt", ""], "--prompt: expected a value"), ([], "--prompt"),
    (["--prompt", "x" * 65], "the prompt has 65 tokens, the model's context is 64"),
    (["--prompt", "x" * 257, "--checkpoint", "long.pt"], "257 tokens, a page shows at most 256"),
    (["--prompt", "a", "--checkpoint", "none.pt"], "no checkpoint at none.pt"),
    (["--prompt", "a", "--layers", "3"], "the model has 2 layers, there is no 3"),
    (["--prompt", "a", "--layers", "0"], "--layers"),
    (["--prompt", "a", "--out", "ckpt.pt/view.html"], "ckpt.pt"),
    (["--prompt", "a", "--out", "ckpt.pt"], "ckpt.pt is read as ckpt.pt"),
    (["--prompt", "a", "--baseline", "heads.pt", "--out", "heads.pt"], "is read as heads.pt"),
    (["--prompt", "a", "--baseline", "none.pt"], "no checkpoint at none.pt"),
    (["--prompt", "a", "--baseline", "layers.pt"], "layers.pt has n_layer 3, the checkpoint 2"),
    (["--prompt", "a", "--baseline", "heads.pt"], "heads.pt has n_head 4, the checkpoint 2"),
    (["--prompt", "a", "--baseline", "words.pt"], "words.pt has a different tokenizer"),
    (["--prompt", "x" * 9, "--baseline", "short.pt"], "9 tokens, the context of short.pt is 8")])
def test_mistakes(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("ckpt.pt"), save("long.pt", block_size=512), save("short.pt", block_size=8)
    save("layers.pt", n_layer=3), save("heads.pt", n_head=4)
    if "words.pt" in argv:  # "a" is id 97 of bytes, and of this one
        from nanonexus.tokenizer import train_bpe

        save("words.pt", tokenizer="bpe:300")
        saved = torch.load("words.pt")
        torch.save(saved | dict(tokenizer_json=train_bpe(["a b c " * 9], 300)), "words.pt")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *([] if "--checkpoint" in argv else ["--checkpoint", "ckpt.pt"]), *argv)
    out = capsys.readouterr()
    assert end.value.code == 2 and message in out.err and out.err.count("\n") == 1
    assert out.out == "" and not os.path.exists("view.html")
