"""
The picture of one layer: python assets/nexus.py writes assets/nexus.svg.
"""

import os

W, H = 760, 250
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1a1a1a; }
  .small { font-size: 12.5px; fill: #555; }
  .math { font: italic 16px Georgia, 'Times New Roman', serif; }
  .box { fill: #f6f6f6; stroke: #888; } .inner { fill: #fdf0df; stroke: #c76b00; stroke-width: 2; }
  .outer { fill: #e4eef8; stroke: #1f6fb2; stroke-width: 2; }
  .line { fill: none; stroke: #666; stroke-width: 1.6; marker-end: url(#tip); }
  .loop { fill: none; stroke: #c76b00; stroke-width: 1.8; marker-end: url(#tip-loop); }
  #tip path { fill: #666; } #tip-loop path { fill: #c76b00; }
"""


def box(x, y, w, h, kind, *lines):
    """A rounded box with centred lines of text."""
    text = "".join(
        f'<text x="{x + w / 2}" y="{y + h / 2 + 5 + 18 * (i - (len(lines) - 1) / 2)}" '
        f'text-anchor="middle" class="{css}">{line}</text>' for i, (css, line) in enumerate(lines))
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="7"/>{text}'


def arrow(*points, kind="line"):
    path = " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="{kind}" d="M{path}"/>'


def label(x, y, text, css="math"):
    return f'<text x="{x}" y="{y}" class="{css}">{text}</text>'


def tip(name):
    return (f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>')


def picture():
    rows = {"q": 52, "k": 125, "v": 205}  # the height of each stream
    parts = [box(10, 102, 46, 46, "box", ("math", "X"))]
    for name, y in rows.items():
        parts += [arrow((56, 125), (76, 125), (76, y), (98, y)),
                  box(100, y - 17, 56, 34, "box", ("math", f"W<tspan dy='4' font-size='11'>{name}"
                                                           "</tspan>"))]
        if name == "v":
            parts += [arrow((156, y), (505, y)), label(176, y - 8, name)]
            continue
        parts += [
            arrow((156, y), (228, y)), label(176, y - 8, name),
            box(230, y - 21, 150, 42, "inner", ("", "inner attention"),
                ("small", f"Attn(h, h, {name})")),
            arrow((368, y - 23), (368, y - 36), (242, y - 36), (242, y - 23), kind="loop"),
            arrow((380, y), (505, y)),
            label(410, y - 8, f"h<tspan dy='4' font-size='11'>{name}</tspan>")]
    parts += [label(388, 27, "m − 1 times", "small"),
              label(232, 178, "order m = 1: without these boxes, a GPT", "small"),
              box(507, 30, 126, 195, "outer", ("", "outer attention"),
                  ("small", "Attn(h_q, h_k, v)")),
              arrow((633, 125), (672, 125)),
              box(674, 102, 76, 46, "box", ("", "output"))]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" role="img" '
            'aria-label="One Nexus layer: queries and keys pass through inner attention before the '
            f'outer attention"><style>{STYLE}</style><defs>{tip("tip")}{tip("tip-loop")}</defs>\n'
            f'<rect width="{W}" height="{H}" fill="white"/>\n'  # readable on a dark page too
            + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nexus.svg")
    with open(path, "w", encoding="utf-8") as f:
        f.write(picture())
    print(f"wrote {path}")
