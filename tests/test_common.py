"""What the experiments share: aligned tables, folders, and the inner steps of model.py with those
that are added."""

import argparse
import importlib
import sys
from types import SimpleNamespace

import figures
import pytest
import rank
import recall
import spectrum
import stability
import torch
from questions import add_inner_step, refused

import common


def test_table():
    assert common.table([["", "x"], ["long name", 1]]) == "           x\nlong name  1"


@pytest.mark.usefixtures("plots")
def test_an_added_inner_step_is_in_the_studies_or_refused_in_one_line(monkeypatch, tmp_path):
    add_inner_step(monkeypatch)  # "again", which is `past`
    for name in ("common", "compare", *(m.__name__ for m in (rank, recall, spectrum, stability))):
        assert name in sys.modules
        monkeypatch.delitem(sys.modules, name)
    new = {name: importlib.import_module(name) for name in ("rank", "recall", "spectrum",
                                                            "stability")}
    results = []
    for inner in ("past", "again"):
        one = new["recall"].RecallRun("one-hop", f"{inner}-k", 0, 1e-2, 3, 4, 16, 2, 8)
        args, idx = SimpleNamespace(width=16), torch.arange(24).view(2, 12)
        gpt = new["stability"].build(3, inner, 1, args, seed=0)
        results.append((new["recall"].train(one)[0], new["spectrum"].at_start(inner, 8, 4, 0),
                        gpt(idx).sum().item(), new["stability"].largest_logit(gpt, idx)))
    assert results[0] == results[1] and "again" in new["stability"].FORMS
    assert figures.style("again") != figures.style("again-k") != figures.style("past-k")
    said = refused(new["rank"].main, "--quick", "--out", tmp_path)
    assert "no formula of the inner step 'again'" in said


def test_a_quick_run_has_a_folder_of_its_own():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="out/x")
    found = [common.parse(parser, argv.split()).out for argv in (
        "", "--quick", "--quick --out mine", "--out mine")]
    assert found == ["out/x", "out/x-quick", "mine", "mine"]
