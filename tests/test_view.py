"""view.py: the page holds manual attention's weights, and a real browser shows them, accessibly."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from questions import done
from questions import save as save_model

from common import INNERS

from model import GPTConfig, ModelError
from nanonexus import view
from nanonexus.controls import CONTROLS, build, describe, replaces_loops
from nanonexus.files import write_text
from nanonexus.hf import open_model

PROMPT = "The naïve </script><!-- &amp; “river”\n"
T = len(PROMPT.encode())
# a tokenizer may have them as one token
EVIL = ["</script><script>throw 1</script>", "<!--<script>", "{{data}}", "\u2028\\", "<img src=x>"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def save(path, seed=0, tokenizer="bytes", source=None, **config):
    """A checkpoint whose attention is far from even: the weights of a fresh model, times 8."""
    torch.manual_seed(seed)
    model = build(GPTConfig(**dict(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=32,
                                   rotary_pct=1.0) | config))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    save_model(model, path, step=7, tokenizer=tokenizer, tokenizer_json=source)
    return str(path)


def run(checkpoint, out, *argv):
    """The data of the page that the command writes."""
    done(view.main, "--checkpoint", checkpoint, "--prompt", PROMPT, "--out", out, *argv)
    return read(out)


def read(path):
    """The page's data: what is in its script up to the first end of one."""
    html = path.read_text(encoding="utf-8")
    assert html.count("</script") == 2
    return json.loads(re.search(r'<script[^>]* id="?data"?[^>]*>(.*?)</script', html, re.S)[1])


def unpack(code, shape):
    """view.pack's inverse: (..., T, T), 0 above the diagonal."""
    digits = np.array([view.DIGITS.tobytes().index(c) for c in code.encode()]).reshape(-1, 2)
    row, column = np.tril_indices(shape[-1])
    weights = np.zeros(shape)
    weights[..., row, column] = ((digits @ [64, 1] / 4095) ** 2).reshape(*shape[:-2], -1)
    return torch.from_numpy(weights)


def manual(path):
    """The maps of each layer, (layers, maps, heads, T, T), from a forward pass; those of q and k
    once, if they are equal."""
    model, tokenizer, _ = open_model(path, attention="manual")
    found, kept = {}, []
    model(torch.tensor([tokenizer.encode_ordinary(PROMPT)]), maps=found)
    maps = torch.cat(list(found.values())).unflatten(0, (model.config.n_layer, -1)).double()
    for (_, name), one in zip(found, maps.unbind(1), strict=False):
        if name[0] != "k" or not any(torch.equal(one, other) for other in kept):
            kept.append(one)
    return torch.stack(kept, 1)


def check(data, want):
    """The page's maps have these weights, (layers, maps, heads, T, T)."""
    assert len({m["title"] for m in data["maps"]}) == len(data["maps"]) == want.size(1)
    for found, weights in zip(data["maps"], want.transpose(0, 1), strict=True):
        assert (unpack(found["code"], weights.shape) - weights).abs().max() < 1e-3


def test_small_weights_keep_their_digits():
    weights = (8 * torch.randn(2, 3, 9, 9)).softmax(-1).tril()
    weights[0, 0, -1, 0], weights[1, 2, 0, 0] = 1, 0
    off = (unpack(view.pack(weights), weights.shape) - weights).abs()
    assert off.max() < 2.5e-4 and (off[weights < 1e-4] < 3e-6).all()


@pytest.mark.parametrize("config", [
    *(dict(nexus_order=2 + i % 2, nexus_inner=inner, nexus_streams=("qk", "k", "q")[i // 2 % 3])
      for i, inner in enumerate(INNERS)),
    *(dict(control=c, nexus_order=3 if replaces_loops(c) else 1) for c in CONTROLS)], ids=str)
def test_the_page_holds_manual_attentions_weights(config, tmp_path):
    path = save(tmp_path / "ckpt.pt", **config)
    data = run(path, tmp_path / "view.html")
    check(data, manual(path))
    assert data["maps"][-1]["kind"] == data["maps"][-1]["title"] == "outer"
    assert data["about"].startswith(describe(GPTConfig(**config)) + "; 2 layers of 2 heads, ")
    assert data["about"].endswith("step 7.")
    assert "".join(data["tokens"]) == ("The␣na⟨C3⟩⟨AF⟩ve␣</script><!--␣&amp;␣"
                                       "⟨E2⟩⟨80⟩⟨9C⟩river⟨E2⟩⟨80⟩⟨9D⟩↵")


@pytest.mark.parametrize("names, words", [
    ("", "records no others"), ("q1", "query .*before it, and from itself"),
    ("q1 K1", "query .* and its key .*In inner k, loop 1, "), ("K1", "key .*never from itself"),
    ("qk1", "have the same map"), ("h1", "Here a token gathers")])
def test_the_legend_is_read_from_the_maps(names, words):
    maps = {name.lower().replace("_", " "): torch.ones(1, 1, 3, 3).tril(-name.count("K"))
            for name in [*names.split(), "outer"]}
    assert re.search(words, view.explain(maps))


def model_of(found, layers=1):
    """What attention_maps needs of a model whose maps are these."""
    return SimpleNamespace(config=GPTConfig(n_layer=layers, n_head=2),
                           hidden_states=lambda idx, maps: maps.update(found))


def test_a_map_that_a_layer_lacks_is_0_there():
    outer, own = torch.full((2, 1, 2, 3, 3), 1 / 3), torch.eye(3).expand(1, 2, 3, 3)
    maps = view.attention_maps(model_of({(0, "outer"): outer[0], (1, "own q"): own,
                                         (1, "outer"): outer[1]}, layers=2), [1, 2, 3])
    assert list(maps) == ["own q", "outer"]
    assert torch.equal(maps["own q"], torch.stack([torch.zeros(2, 3, 3), own[0]]))


def test_weights_that_cannot_be_shown_are_refused():
    for found, message in (({(0, "outer"): torch.full((1, 2, 3, 3), -0.1)}, "a weight from 0 to 1"),
                           ({(0, "outer"): torch.zeros(1, 2, 3, 4)}, "each pair of 3 tokens"),
                           ({(layer, "outer"): torch.full((1, 2, 3, 3), 0.3)
                             for layer in range(9)}, "the model has 9 attentions in . layers"),
                           ({}, "nothing to show")):
        with pytest.raises(ModelError, match=message):
            view.attention_maps(model_of(found), [1, 2, 3])


def test_chosen_layers_and_the_baseline(tmp_path):
    path, base = (save(tmp_path / f"{seed}.pt", seed, n_layer=3) for seed in (0, 1))
    data = run(path, tmp_path / "a.html", "--baseline", base, "--layers", "3,1")
    assert data["layers"] == [3, 1] and [m["kind"] for m in data["maps"]] == ["outer", "baseline"]
    check(data, torch.cat([manual(path), manual(base)], 1)[[2, 0]])


def test_the_strict_maps_of_two_tokens_are_not_taken_for_one(tmp_path):
    path = save(tmp_path / "c.pt", nexus_order=2, nexus_inner="past")
    maps = view.attention_maps(open_model(path, attention="manual")[0], [1, 2])
    assert list(maps) == ["q1", "k1", "outer"]


def test_invisible_characters_are_spelt_and_a_token_cannot_end_the_data(tmp_path):
    tokens = [b" the", b" \n", b"a\tb", b"\xc3", "é".encode(), "\0\u202ea\u2028".encode()]
    assert [*map(view.spell, tokens)] == [" the", "␣↵", "a⇥b", "⟨C3⟩", "é",
                                          "⟨U+0000⟩⟨U+202E⟩a⟨U+2028⟩"]
    write_text(tmp_path / "view.html", view.page(dict(tokens=EVIL)))
    assert read(tmp_path / "view.html") == dict(tokens=EVIL)


# --- in a browser ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright's package")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p, p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(a page of order 2 with a baseline, its weights (maps, layers, heads, T, T), the difference
    from the baseline included)"""
    folder = tmp_path_factory.mktemp("page")
    path, base = save(folder / "a.pt", nexus_order=2), save(folder / "b.pt", seed=1)
    run(path, folder / "view.html", "--baseline", base)
    ours, theirs = manual(path), manual(base)
    return folder / "view.html", torch.cat([ours, theirs, ours[:, -1:] - theirs], 1).transpose(0, 1)


@pytest.fixture
def open_page(browser):
    """A page, which must have no errors and ask for nothing."""
    errors = []

    def open_page(path, width=1200, **options):
        page = browser.new_page(viewport=dict(width=width, height=800), **options)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:"))
                else errors.append(r.url))
        page.goto(f"file://{path}")
        return page

    yield open_page
    assert not errors


ALL_WEIGHTS = """() => JSON.stringify(maps.map(map => data.layers.map((_, layer) =>
    [MEAN, 0, 1].map(head => data.tokens.map((_, row) => data.tokens.map((_, column) =>
        weight(map, layer, head, row, column)))))))"""
PAINTED = """row => {  // the maps have the colours of their weights
    const copy = new OffscreenCanvas(T, T).getContext("2d", { willReadFrequently: true });
    return maps.every(map => {
        copy.drawImage(map.picture, 0, 0);
        return copy.getImageData(row, row, 1, 1).data.join()
            === `${colour(map, now(map, row, row))},255`;
    });
}"""


def announced(page):
    """The weights that the tokens announce, of those already read."""
    labels = page.evaluate("tokens.map(token => token.getAttribute('aria-label'))")
    return [float(found[1].replace("−", "-")) for label in labels
            if (found := re.search(r"of \d+, ([-+−]?\d\.\d{3})$", label))]


def test_hover_keys_and_buttons_change_what_is_shown(open_page, shown):
    path, want = shown
    page = open_page(path)
    tokens, tip = page.locator("#tokens span"), page.locator("#tip")
    found = torch.tensor(json.loads(page.evaluate(ALL_WEIGHTS)), dtype=torch.double)
    means = torch.cat([want.mean(2, keepdim=True), want], 2)
    assert found.shape == means.shape and (found - means).abs().max() < 1e-3

    for what, layer, place, head, row in [
            ("", 0, 2, None, T - 1), ("hover:5", 0, 2, None, 5),
            ("click:20 hover:4", 0, 2, None, 20),  # a click holds it
            ("Escape hover:7", 0, 2, None, 7), ("focus:7 ArrowRight", 0, 2, None, 8),
            ("ArrowDown Shift+ArrowDown Shift+ArrowDown", 1, 2, 1, 8),
            # the last head, the first layer, the first token: no further
            ("Shift+ArrowDown ArrowUp ArrowUp Home ArrowLeft End", 0, 2, 1, T - 1),
            ("map:0", 0, 0, 1, T - 1), ("ArrowRight", 0, 1, 1, T - 1), ("map:4", 0, 4, 1, T - 1),
            ("canvas", 0, 1, 1, 10)]:
        for step in what.split():
            verb, _, n = step.partition(":")
            if n and verb == "map":
                page.locator("[name=map]").nth(int(n)).check()
            elif n:
                getattr(tokens.nth(int(n)), verb)()
            elif step == "canvas":  # inner k's map, in the middle of a row
                size = page.locator("canvas").nth(1).bounding_box()["width"] - 37
                page.locator("canvas").nth(1).click(position=dict(
                    x=34 + size * 3.5 / T, y=3 + size * 10.5 / T))
            else:
                page.keyboard.press(step)
        w = want[place, layer].mean(0) if head is None else want[place, layer, head]
        assert np.abs(np.array(announced(page)) - w[row, :row + 1].numpy()).max() < 1e-3, what
        assert tokens.nth(row).get_attribute("aria-selected") == "true"
        assert page.locator("[aria-selected=true]").count() == 1
        assert f"at {row + 1}, in layer" in page.locator("#summary").inner_text()
        assert page.evaluate(PAINTED, row)
        if pointed := {"click:20 hover:4": 4, "canvas": 3}.get(what):
            assert float(tip.inner_text().split(": ")[1]) == announced(page)[pointed]


def test_a_token_is_text_and_nothing_else(open_page, shown, tmp_path):
    data = read(shown[0])
    data["tokens"][:len(EVIL)] = EVIL
    write_text(tmp_path / "view.html", view.page(data))
    page = open_page(tmp_path / "view.html")
    assert page.evaluate("tokens.map(token => token.textContent)") == data["tokens"]
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0


CONTRASTS = """() => {  // (contrast, text, luminance behind it) of all there is to read
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= .04045 ? c / 12.92
        : ((c + .055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const behind = e => { const c = parse(getComputedStyle(e).backgroundColor);
        return c[3] === 0 ? behind(e.parentElement) : light(c); };
    return [...document.querySelectorAll("h1, h2, p, em, kbd, label span, legend, #tokens span, "
        + "#scale span, figcaption, figure p")].map(e => {
        const [a, b] = [light(parse(getComputedStyle(e).color)), behind(e)];
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent, b]; });
}"""


def test_contrast_in_light_and_dark(open_page, shown):
    """4.5 at least (WCAG AA) for all text, under all weights of every map."""
    for scheme in ("light", "dark"):
        page = open_page(shown[0], color_scheme=scheme, reduced_motion="reduce")
        for name in range(page.evaluate("maps.length")):
            page.evaluate(f"choose({{map: {name}, token: T - 2}})")
            # weights up to 1 (-1) in the first tokens, whatever this model has
            page.evaluate("""[1, .5, .1].forEach((w, i) => { for (const s of [1, -1])
                tokens[2 * i + (s > 0)].style.backgroundColor =
                    css(colour(maps[state.map], s * w, theme.depth)); })""")
            found = page.evaluate(CONTRASTS)
            assert len(found) > 60 and min(found)[0] >= 4.5, min(found)
        assert (found[0][2] < .1) == (scheme == "dark")  # behind the title


def test_narrow_touched_and_named(open_page, shown):
    page = open_page(shown[0], width=400, has_touch=True)
    tokens, wide = page.locator("#tokens span"), "document.documentElement.scrollWidth"
    ends = page.evaluate("tokens.map(token => token.getBoundingClientRect().right)")
    for token in (3, 30, 11):
        tokens.nth(token).tap()
        assert len(announced(page)) == token + 1 and page.evaluate(wide) <= 400
    tokens.nth(ends.index(max(ends))).hover()  # the tip stays inside, too
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and page.evaluate(wide) <= 400
    for canvas in page.locator("canvas").all():
        assert canvas.bounding_box()["width"] >= 150
        assert canvas.get_attribute("aria-label") and canvas.get_attribute("role") == "img"
    for radio in page.locator("input").all():
        assert radio.evaluate("e => e.labels.length === 1 && e.labels[0].innerText > ''")
    page.keyboard.press("Tab")  # focus can be seen
    assert page.evaluate("""getComputedStyle(document.activeElement.nextSibling
        ?? document.activeElement).outlineWidth""") == "3px"
