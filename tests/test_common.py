"""The experiments' statistics are the textbook's, and their claims need p < 0.01."""

import json
import math
from types import SimpleNamespace

import pytest

import common

pytest.importorskip("scipy")


def test_paired_is_the_textbooks_t_test():
    # gaps 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.4641 on 2 degrees of freedom, where
    # p = 1 - t / sqrt(t^2 + 2) and the 99% quantile is 9.92484
    gap = common.paired([2, 4, 6], [1, 2, 3])
    half = 9.924843 / math.sqrt(3)
    assert gap == pytest.approx(dict(mean=2, low=2 - half, high=2 + half,
                                     p=1 - math.sqrt(12 / 14)), rel=1e-5)
    assert math.isnan(common.paired([2], [1])["p"])  # one seed
    assert math.isnan(common.paired([2, 3], [1, 2])["p"])  # no spread


def test_a_difference_is_marked_where_the_interval_excludes_0():
    close = common.paired([1.0, 1.1, 1.2], [1.05, 1.05, 1.2])
    far = common.paired([1.0, 1.1, 1.2], [2.01, 2.1, 2.19])
    assert "*" not in common.paired_text(close) and close["low"] < 0 < close["high"]
    assert common.paired_text(far).endswith("*") and far["high"] < 0
    assert common.paired_text(common.paired([1], [2])) == "-1.0000"  # one seed: no interval


def test_table_and_spread():
    assert common.table([["", "x"], ["long name", 1]]) == "           x\nlong name  1"
    assert common.mean_spread([1, 3], 2) == "2.00 ± 1.41"
    assert common.mean_spread([1]) == "1.0000 ± ?"


def test_save_writes_settings_seeds_and_versions(tmp_path, capsys):
    figure, _ = common.pyplot().subplots()
    args = SimpleNamespace(out=str(tmp_path / "new"), seeds=3)
    common.save(args, "name", {"a": [1, 2]}, figure)
    with open(tmp_path / "new" / "name.json") as f:
        saved = json.load(f)
    assert saved["results"] == {"a": [1, 2]} and saved["settings"]["seeds"] == 3
    assert {"python", "torch"} <= saved["versions"].keys()
    assert (tmp_path / "new" / "name.png").read_bytes().startswith(b"\x89PNG")
