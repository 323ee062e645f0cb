"""Folders and lines that are complete or absent."""

import os

import pytest

from nanonexus import files
from nanonexus.cli import UserError
from nanonexus.files import append_line, new_folder, read_lines


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "a" / "set"
    with pytest.raises(KeyError), new_folder(out) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("half")
        raise KeyError
    assert os.listdir(tmp_path / "a") == []
    os.makedirs(tmp_path / "a/set.partial")
    (tmp_path / "a/set.partial/left").write_text("by a process that was killed")
    with new_folder(out) as folder:
        with pytest.raises(UserError, match="another run is writing"), new_folder(out):
            pass
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("whole")
    assert os.listdir(tmp_path / "a") == ["set"] and os.listdir(out) == ["x"]
    with pytest.raises(UserError, match="not empty"), new_folder(out):
        pass
    assert (out / "x").read_text() == "whole"


def test_a_line_cut_short_is_replaced_by_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, dict(i=0))
    with open(path, "a") as f:
        f.write('{"i": 1, "te')
    assert read_lines(path) == [dict(i=0)]
    append_line(path, dict(i=2))
    assert read_lines(path) == [dict(i=0), dict(i=2)]
    path.write_text('{"i": 0}\n}\n{"i": 2}\n')
    with pytest.raises(UserError, match="lines.jsonl has a damaged line"):
        read_lines(path)


def test_nobody_enters_a_new_folder_while_it_is_finished(tmp_path, monkeypatch):
    """Between the last byte and the new name, each file is flushed, which takes a while."""
    out, tried = str(tmp_path / "new"), []

    def flush(path):
        with pytest.raises(UserError, match="another run is writing|is not empty"), new_folder(out):
            pass
        tried.append(path)

    monkeypatch.setattr(files, "flush", flush)
    with new_folder(out) as partial:
        (tmp_path / "new.partial" / "a").write_text("whole")
    assert tried == [f"{partial}/.", f"{partial}/a", str(tmp_path)]
    assert os.listdir(tmp_path) == ["new"] and os.listdir(out) == ["a"]
