"""view.py: the page holds manual attention's weights and no more; in a browser, it shows them."""

import base64
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanonexus import view
from nanonexus.cli import run_script
from nanonexus.files import write_text
from nanonexus.hf import open_model

PROMPT = "The naïve </script><!-- &amp; “river”\n"
T = len(PROMPT.encode())


def save(path, seed=0, tokenizer="bytes", **config):
    """A checkpoint whose attention is far from even: the weights of a fresh model, times 8."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=32,
                                 rotary_pct=1.0) | config))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), step=7, tokens=0,
                    tokenizer=tokenizer), path)
    return str(path)


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["view.py", *argv])
    run_script(view.main)


class Data(HTMLParser):
    """What stands in the page's script of data, as a browser would cut it out."""

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
    maps = []
    model(torch.tensor([tokenizer.encode_ordinary(text)]), maps=maps)
    return torch.cat(maps).unflatten(0, (model.config.n_layer, -1)).double()


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
            (dict(nexus_order=2), ["q", "k", "outer"], [0, 1, 2]),
            (dict(nexus_order=3, nexus_inner="past"), ["q", "k", "q", "k", "outer"], range(5)),
            (dict(nexus_order=3, nexus_inner="past", nexus_streams="k"), ["k", "k", "outer"],
             range(3)),
            (dict(nexus_order=2, nexus_inner="shared", nexus_streams="q"), ["q", "outer"], [0, 1]),
            (dict(nexus_order=3, nexus_inner="cross"), ["both", "both", "outer"], [0, 2, 4]),
            (dict(nexus_order=2, nexus_inner="cross", nexus_streams="k"), ["both", "outer"],
             [0, 1])]


@pytest.mark.parametrize("config, kinds, places", VARIANTS)
def test_the_page_holds_manual_attentions_weights(config, kinds, places, tmp_path, monkeypatch):
    path, out = save(tmp_path / "ckpt.pt", **config), str(tmp_path / "view.html")
    run(monkeypatch, "--checkpoint", path, "--prompt", PROMPT, "--out", out)
    data, want = read(out), manual(path)
    assert [m["kind"] for m in data["maps"]] == kinds
    for found, place in zip(data["maps"], places, strict=True):
        shape = (2, 2, T, T)
        assert (unpack(found["code"], shape) - want[:, place]).abs().max() < 1e-3
    assert len({m["title"] for m in data["maps"]}) == len(kinds)
    assert ("query" in data["legend"]) == ("q" in config.get("nexus_streams", "qk") and len(
        kinds) > 1) and ("inner attention shows" in data["legend"]) == (len(kinds) > 1)
    assert f"order {config.get('nexus_order', 1)}" in data["about"] and "step 7" in data["about"]
    assert "".join(data["tokens"]) == ("The␣na⟨C3⟩⟨AF⟩ve␣</script><!--␣&amp;␣"
                                       "⟨E2⟩⟨80⟩⟨9C⟩river⟨E2⟩⟨80⟩⟨9D⟩↵")


def test_chosen_layers_and_the_baseline(tmp_path, monkeypatch, capsys):
    path, out = save(tmp_path / "a.pt", n_layer=3, nexus_order=2), str(tmp_path / "view.html")
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
    path = save(tmp_path / "a.pt", nexus_order=3, **shape)
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
    (["--prompt", ""], "the prompt is empty"), ([], "--prompt"),
    (["--prompt", "x" * 65], "the prompt has 65 tokens, the model's context is 64"),
    (["--prompt", "x" * 257, "--checkpoint", "long.pt"], "257 tokens, a page shows at most 256"),
    (["--prompt", "a", "--checkpoint", "none.pt"], "no checkpoint at none.pt"),
    (["--prompt", "a", "--layers", "3"], "the model has 2 layers, none of number 3"),
    (["--prompt", "a", "--layers", "0"], "--layers"),
    (["--prompt", "a", "--out", "none/view.html"], "none/view.html"),
    (["--prompt", "a", "--baseline", "none.pt"], "no checkpoint at none.pt"),
    (["--prompt", "a", "--baseline", "layers.pt"], "layers.pt has n_layer 3, the checkpoint 2"),
    (["--prompt", "a", "--baseline", "heads.pt"], "heads.pt has n_head 4, the checkpoint 2"),
    (["--prompt", "a", "--baseline", "words.pt"], "words.pt has another tokenizer"),
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


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright's package")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(page's path, checkpoint, baseline or None) of each variant; two with a baseline."""
    folder, made = tmp_path_factory.mktemp("pages"), []
    with pytest.MonkeyPatch.context() as patch:
        base = save(folder / "base.pt", seed=1)
        for i, (config, *_) in enumerate(VARIANTS):
            path, out = save(folder / f"{i}.pt", **config), str(folder / f"{i}.html")
            flags = ["--baseline", base] if i < 2 else []
            run(patch, "--checkpoint", path, "--prompt", PROMPT, "--out", out, *flags)
            made.append((out, path, base if flags else None))
    return made


def open_page(browser, path, width=1200, **options):
    """A page, and the list of what it complains of."""
    page, errors = browser.new_page(viewport=dict(width=width, height=800), **options), []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:"))
            else errors.append(r.url))
    page.goto("file://" + path)
    return page, errors


ALL_WEIGHTS = """() => JSON.stringify(maps.map(map => data.layers.map((_, layer) =>
    [MEAN, 0, 1].map(head => data.tokens.map((_, row) => data.tokens.map((_, column) =>
        weight(map, layer, head, row, column)))))))"""


def test_the_browser_has_manual_attentions_weights(browser, pages):
    page, errors = open_page(browser, pages[0][0])
    for (path, checkpoint, base), (*_, places) in zip(pages, VARIANTS, strict=True):
        page.goto("file://" + path)
        want = manual(checkpoint)[:, list(places)].transpose(0, 1)  # (maps, layers, H, T, T)
        if base:
            other = manual(base)[:, -1:].transpose(0, 1)
            want = torch.cat([want, other, want[-1:] - other])
        want = torch.cat([want.mean(2, keepdim=True), want], 2)
        found = torch.tensor(json.loads(page.evaluate(ALL_WEIGHTS)), dtype=torch.double)
        assert found.shape == want.shape and (found - want).abs().max() < 1e-3
        assert page.locator("figure").count() == len(want) and not errors
        assert page.evaluate("tokens.map(token => token.textContent)") == read(path)["tokens"]
    page.close()


def test_a_token_is_text_and_nothing_else(browser, pages, tmp_path):
    data = read(pages[0][0])
    data["tokens"][:len(EVIL)] = EVIL
    write_text(tmp_path / "view.html", view.page(data))
    page, errors = open_page(browser, str(tmp_path / "view.html"))
    page.locator("#tokens span").nth(6).hover()
    assert page.evaluate("tokens.map(token => token.textContent)") == data["tokens"]
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0 and not errors
    page.close()


def shown(page):
    """The weights that the tokens tell, of those that are read."""
    labels = page.evaluate("tokens.map(token => token.getAttribute('aria-label'))")
    return [float(found[1].replace("−", "-")) for label in labels
            if (found := re.search(r"of \d+, ([-+−]?\d\.\d{3})$", label))]


def test_hover_keys_and_buttons_change_what_is_shown(browser, pages):
    path, checkpoint, base = pages[1]
    page, errors = open_page(browser, path)
    want, tokens = manual(checkpoint), page.locator("#tokens span")

    def check(layer, place, head, row, weights=want):
        w = weights[layer, place].mean(0) if head is None else weights[layer, place, head]
        assert np.abs(np.array(shown(page)) - w[row, :row + 1].numpy()).max() < 1e-3
        assert tokens.nth(row).get_attribute("aria-selected") == "true"
        assert page.locator("[aria-selected=true]").count() == 1
        assert f"Token {row + 1}," in page.locator("#summary").inner_text()

    check(0, -1, None, T - 1)
    before = page.locator("#tokens").screenshot(), page.locator("#maps").screenshot()
    tokens.nth(5).hover()
    check(0, -1, None, 5)
    after = page.locator("#tokens").screenshot(), page.locator("#maps").screenshot()
    assert before[0] != after[0] and before[1] != after[1]

    tokens.nth(20).click()  # holds it: now a hover tells another token's weight
    tokens.nth(4).hover()
    check(0, -1, None, 20)
    assert float(page.locator("#tip").inner_text().split(": ")[1]) == shown(page)[4]
    page.keyboard.press("Escape")
    tokens.nth(7).hover()
    check(0, -1, None, 7)

    tokens.nth(7).focus()
    page.keyboard.press("ArrowRight")
    check(0, -1, None, 8)
    assert tokens.nth(8).evaluate("e => e === document.activeElement")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowDown")
    check(1, -1, 1, 8)
    for _ in range(3):  # the last head, the first layer, the first token: no further
        page.keyboard.press("Shift+ArrowDown")
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    check(0, -1, 1, 0)

    page.keyboard.press("End")
    page.locator("[name=map]").first.focus()
    page.keyboard.press("Space")  # inner q
    check(0, 0, 1, T - 1)
    page.keyboard.press("ArrowRight")  # inner k
    check(0, 1, 1, T - 1)
    page.get_by_role("radio", name="outer − baseline").check()
    check(0, -1, 1, T - 1, want[:, -1:] - manual(base)[:, -1:])

    canvas = page.locator("canvas").nth(1)  # a click on inner k's map, in the middle of a row
    box = canvas.bounding_box()
    size = box["width"] - 37
    canvas.click(position=dict(x=34 + size * 3.5 / T, y=3 + size * 10.5 / T))
    check(0, 1, 1, 10)
    assert float(page.locator("#tip").inner_text().split(": ")[1]) == shown(page)[3]
    assert not errors
    page.close()


def test_a_tap(browser, pages):
    page, errors = open_page(browser, pages[1][0], width=400, has_touch=True)
    for token in (3, 30, 11):
        page.locator("#tokens span").nth(token).tap()
        assert len(shown(page)) == token + 1
    assert not errors
    page.close()


LUMINANCE = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c =>
    c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = e => { const c = parse(getComputedStyle(e).backgroundColor);
    return c[3] === 0 ? behind(e.parentElement) : c; };
  return [...document.querySelectorAll("h1, h2, p, em, kbd, label span, legend, #tokens span, "
      + "#scale span, figcaption, figure p")].map(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent, light(behind(e))];
  });
})()"""


def test_contrast_in_light_and_dark(browser, pages):
    """4.5 at least (WCAG AA) for all text, under all weights of every map."""
    for scheme in ("light", "dark"):
        page, errors = open_page(browser, pages[1][0], color_scheme=scheme, reduced_motion="reduce")
        assert page.evaluate("getComputedStyle(tokens[0]).transitionDuration") in ("0s", "")
        for name in page.evaluate("maps.map((_, i) => i)"):
            page.evaluate(f"choose({{map: {name}, token: T - 2}})")
            # weights up to 1 (-1) in the first tokens, whatever this model has
            page.evaluate("""[1, .5, .1].forEach((w, i) => { for (const s of [1, -1])
                tokens[2 * i + (s > 0)].style.backgroundColor =
                    css(colour(maps[state.map], s * w, theme.depth)); })""")
            found = page.evaluate(LUMINANCE)
            assert len(found) > 60 and min(found)[0] >= 4.5, min(found)
        dark = found[0][2] < .1  # behind the title
        assert dark == (scheme == "dark") and not errors
        page.emulate_media(color_scheme="light" if dark else "dark")  # changes while it is open
        page.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(done), 100))")
        assert min(page.evaluate(LUMINANCE))[0] >= 4.5
        page.close()


def test_narrow_and_named(browser, pages):
    for path, *_ in pages[:2]:  # of order 1, and with all there is
        page, errors = open_page(browser, path, width=400)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.locator("#tokens span").last.hover()  # the tooltip stays inside, too
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        for canvas in page.locator("canvas").all():
            assert canvas.bounding_box()["width"] >= 150
            assert canvas.get_attribute("aria-label") and canvas.get_attribute("role") == "img"
        for radio in page.locator("input").all():
            assert radio.evaluate("e => e.labels.length === 1 && e.labels[0].innerText > ''")
        page.keyboard.press("Tab")  # focus can be seen
        assert page.evaluate("""getComputedStyle(document.activeElement.nextSibling
            ?? document.activeElement).outlineWidth""") == "3px"
        assert not errors
        page.close()
