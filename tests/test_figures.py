"""figures.py: colours that everyone can tell apart, names that do not overlap, equal files."""

import itertools

import figures
import numpy as np
import pytest

# what eyes without red, and without green cones see of linear RGB: Machado, Oliveira and Fernandes
# 2009, severity 1
EYES = np.array([[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                  [-0.003882, -0.048116, 1.051998]],
                 [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                  [-0.011820, 0.042940, 0.968881]]])


def test_no_two_variants_look_alike_to_the_colour_blind():
    colors = sorted({figures.ADDED, *(color for color, _ in figures.STYLES.values())})
    rgb = np.array([[int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    seen = np.clip(EYES @ (rgb ** 2.2).T, 0, 1) ** (1 / 2.2)  # (eyes, channels, colours)
    for a, b in itertools.combinations(range(len(colors)), 2):
        apart = np.linalg.norm(seen[:, :, a] - seen[:, :, b], axis=1)
        assert apart.min() > 0.15, (colors[a], colors[b], apart)


def test_names_keep_their_distance_and_order():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, panel = plt.subplots()
    ends = {"self": (1, 0.50), "past": (1, 0.501), "cross": (1, 0.502), "baseline": (1, 0.0),
            "shared": (1, 1.0)}
    for x, y in ends.values():
        panel.plot([0, x], [0, y])
    figures.name_lines(panel, ends, gap=0.1)
    at = {text.get_text(): text.xyann[1] for text in panel.texts}
    order = sorted(at, key=at.get)
    assert order == sorted(ends, key=lambda name: ends[name][1])
    gaps = [at[b] - at[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) > 0.099 and 0 <= min(at.values()) and max(at.values()) <= 1.001
    assert all(text.get_color() == figures.style(text.get_text())["color"] for text in panel.texts)
    for diverged in ({}, dict(mean=(1, 0.5))):  # a name without an end is left out
        for text in list(panel.texts):
            text.remove()
        figures.name_lines(panel, diverged | {"self": (1, float("nan"))})
        assert [text.get_text() for text in panel.texts] == list(diverged)
    plt.close(figure)


def test_each_seed_has_its_dot():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, panel = plt.subplots()
    figures.seed_strips(panel, {"self": [20, 20, None], "past": [40, 60, 80]}, 100)
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    at = [(float(dot.get_xdata()[0]), round(float(dot.get_ydata()[0]), 3)) for dot in dots]
    assert len(set(at)) == 6 and [x for x, _ in at[:2] + at[3:]] == [20, 20, 40, 60, 80]
    assert at[2][0] > 100 and dots[2].get_markerfacecolor() == "none"
    assert all(abs(y - (i > 2)) < 0.5 for i, (_, y) in enumerate(at))
    plt.close(figure)


def test_a_file_depends_on_what_it_shows_alone(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    texts = []
    for name in "ab":
        figure, panel = plt.subplots()
        panel.plot([1, 2], **figures.style("past-k"))
        panel.fill_between([0, 1], [0, 1], [1, 2], hatch="/")  # a pattern and a clip have ids
        panel.set(title="a title")
        figures.write(figure, tmp_path / f"{name}.svg")
        texts.append((tmp_path / f"{name}.svg").read_text())
        plt.close(figure)
    assert texts[0] == texts[1] and texts[0].startswith("<?xml")
    assert ">a title<" in texts[0]  # text is text
