"""view.py's page in a real browser: it shows manual attention's weights, accessibly."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_view import EVIL, PROMPT, VARIANTS, T, manual, read, run, save

from nanonexus import view
from nanonexus.files import write_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright's package")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p, p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        yield browser


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
    """A page, and the list of its errors."""
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
    """The weights that the tokens announce, of those already read."""
    labels = page.evaluate("tokens.map(token => token.getAttribute('aria-label'))")
    return [float(found[1].replace("−", "-")) for label in labels
            if (found := re.search(r"of \d+, ([-+−]?\d\.\d{3})$", label))]


PAINTED = """row => {  // the maps have the colours of their weights
    const copy = new OffscreenCanvas(T, T).getContext("2d", { willReadFrequently: true });
    return maps.every(map => {
        copy.drawImage(map.picture, 0, 0);
        return [0, row].every(i => copy.getImageData(i, row, 1, 1).data.join()
            === `${colour(map, now(map, row, i))},255`);
    });
}"""


def test_hover_keys_and_buttons_change_what_is_shown(browser, pages):
    path, checkpoint, base = pages[1]
    page, errors = open_page(browser, path)
    want, tokens = manual(checkpoint), page.locator("#tokens span")

    def check(layer, place, head, row, weights=want):
        w = weights[layer, place].mean(0) if head is None else weights[layer, place, head]
        assert np.abs(np.array(shown(page)) - w[row, :row + 1].numpy()).max() < 1e-3
        assert tokens.nth(row).get_attribute("aria-selected") == "true"
        assert page.locator("[aria-selected=true]").count() == 1
        assert f"at {row + 1}, in layer" in page.locator("#summary").inner_text()
        assert page.evaluate(PAINTED, row)

    check(0, -1, None, T - 1)
    drawn = "maps.map(map => map.canvas.toDataURL())"
    before = page.locator("#tokens").screenshot(), *page.evaluate(drawn)
    tokens.nth(5).hover()
    check(0, -1, None, 5)
    after = page.locator("#tokens").screenshot(), *page.evaluate(drawn)  # the row is marked
    assert len(after) == 6 and all(a != b for a, b in zip(before, after, strict=True))

    tokens.nth(20).click()  # holds it: now hovering shows another token's weight
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
    page.get_by_role("radio", name="difference").check()
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
        ends = page.evaluate("tokens.map(token => token.getBoundingClientRect().right)")
        page.locator("#tokens span").nth(ends.index(max(ends))).hover()  # its tip stays inside, too
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
