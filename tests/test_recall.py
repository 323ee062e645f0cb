"""recall.py: its problems have one answer each, and one refined layer solves what one cannot."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import recall
import torch


@pytest.mark.parametrize("hops", [1, 2])
def test_problems_have_the_answers_they_say(hops):
    n = 5
    idx, targets = recall.sequences(30, n, hops, torch.Generator().manual_seed(0))
    assert idx.shape == targets.shape == (30, 3 * hops * n)
    facts = 2 * hops * n
    assert (targets[:, :facts] == -1).all() and (targets[:, facts:] >= 0).all()
    for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True):
        follows = dict(zip(row[0:facts:2], row[1:facts:2], strict=True))
        assert len(follows) == hops * n  # no key twice
        for key, answer in zip(row[facts:], wanted[facts:], strict=True):
            while key in follows:
                key = follows[key]
            assert key == answer
        assert sorted(row[facts:]) == sorted(follows)  # each link is asked once
    assert not torch.equal(idx[0], idx[1])


def test_accuracy_counts_whole_chains_only():
    n = 4
    idx, targets = recall.sequences(8, n, 2, torch.Generator().manual_seed(0))

    def model(idx):  # right where an a is asked, wrong elsewhere
        right = torch.where(idx < recall.SYMBOLS, targets, 0).clamp(min=0)
        return torch.nn.functional.one_hot(right, 3 * recall.SYMBOLS).float(), None

    assert recall.accuracy(model, idx, targets) == 1


def test_one_layer_that_refines_keys_looks_up_and_one_that_does_not_cannot():
    args = SimpleNamespace(pairs=3, width=32, heads=2, steps=160, batch=32, every=20)
    bar = SimpleNamespace(update=lambda n=1: None)
    solved, _ = recall.train("one-hop", "k-only", args, 1e-2, 0, bar)
    plain, model = recall.train("one-hop", "baseline", args, 1e-2, 0, bar)
    assert solved[-1] > 0.95 and len(solved) == len(plain) == 8
    assert plain[-1] < 0.6
    again, _ = recall.train("one-hop", "baseline", args, 1e-2, 0, bar)
    assert again == plain  # the same seed, the same run
    assert model.num_params() == recall.build("one-hop", "nexus-3", args).num_params()


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    argv = ("--pairs 2 --width 16 --steps 4 --seeds 2 --lrs 1e-3,1e-2 --tasks one-hop,two-hops "
            "--variants baseline,nexus-2").split()
    out = subprocess.run([sys.executable, recall.__file__, *argv, "--out", str(tmp_path)],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "recall.json").read_text())["results"]
    assert list(results) == ["one-hop", "two-hops"]
    row = results["one-hop"]["nexus-2"]
    assert row["lr"] in (1e-3, 1e-2) and [c[-1] for c in row["curves"]] == row["accuracy"]
    assert f"{sum(row['accuracy']) / 2:.3f} ±" in out.stdout
    assert (tmp_path / "maps.png").exists() and (tmp_path / "recall.png").exists()
    for wrong in (["--pairs", "17"], ["--variants", "nexus-2"], ["--tasks", "three-hops"]):
        bad = subprocess.run([sys.executable, recall.__file__, *wrong], capture_output=True,
                             text=True)
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1
