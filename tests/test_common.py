"""What the experiments share: aligned tables, and results with what they need to be repeated."""

import json
from types import SimpleNamespace

import pytest

import common

pytest.importorskip("scipy")


def test_table():
    assert common.table([["", "x"], ["long name", 1]]) == "           x\nlong name  1"


def test_save_writes_settings_seeds_and_versions(tmp_path, capsys):
    figure, _ = common.pyplot(tmp_path / "new").subplots()
    args = SimpleNamespace(out=str(tmp_path / "new"), seeds=3)
    common.save(args, "name", {"a": [1, 2]}, figure)
    with open(tmp_path / "new" / "name.json") as f:
        saved = json.load(f)
    assert saved["results"] == {"a": [1, 2]} and saved["settings"]["seeds"] == 3
    assert {"python", "torch"} <= saved["versions"].keys()
    assert "<svg" in (tmp_path / "new" / "name.svg").read_text()
