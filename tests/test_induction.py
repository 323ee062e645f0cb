"""induction.py: predictions are sorted by what a copy would give, and the parts add up."""

import json
import math
import os

import induction
import pytest
import runs
import torch
from compare import QUICK, read_variant
from questions import done, drawn, refused, save
from test_train import prepare

import train
from model import GPTConfig
from nanonexus.controls import build


def test_kinds():
    repeated, changed, new = range(3)
    a, b, c = 7, 8, 9
    found = induction.kinds(torch.tensor([[a, b, a, b, a, c, a, c], [a, a, a, b, c, c, c, a]]))
    assert found.tolist() == [[new, new, repeated, repeated, changed, new, repeated],
                              [new, repeated, changed, new, new, repeated, changed]]
    found = induction.kinds(torch.tensor([[a, b, c, a, b, c, b, c, a]]), match=2)
    assert found.tolist() == [[new, new, new, new, repeated, changed, new, repeated]]


class Copier:
    """A perfect induction head, next to one that attends to itself: sure of what followed the last
    occurrence of the token, else uniform."""

    config = GPTConfig(vocab_size=50, n_layer=1, nexus_order=2, nexus_streams="k")

    def __call__(self, idx):
        found = self.heads(idx)[:, 0]
        logits = 30 * found @ torch.nn.functional.one_hot(idx, 50).float()
        return logits * (found.diagonal(0, 1, 2) < 1)[..., None]

    def heads(self, idx):
        B, T = idx.shape
        maps = torch.eye(T).repeat(B, 2, 1, 1)
        for b, row in enumerate(idx.tolist()):
            for t, token in enumerate(row):
                if token in row[:t]:
                    last = t - row[:t][::-1].index(token)  # the one after it
                    maps[b, 0, t] = torch.eye(T)[last]
        return maps

    def hidden_states(self, idx, maps):
        maps[0, "k1"] = torch.full((len(idx), 2, idx.size(1), idx.size(1)), 9.0)  # not to be read
        maps[0, "outer"] = self.heads(idx)


def test_a_copier_gains_where_pairs_are_repeated_and_the_parts_add_up(monkeypatch):
    tokens = torch.stack([torch.randperm(50)[:20].repeat(2) for _ in range(4)])
    tokens[:, -1] = (tokens[:, 19] + 1) % 50  # the last one alone is changed
    monkeypatch.setattr(induction, "load_checkpoint", lambda path, attention: (Copier(), None))
    found = induction.measure("", tokens, induction.kinds(tokens))
    share, uniform = found.pop("copying")
    assert share == pytest.approx(1)
    assert uniform == pytest.approx(sum(1 / (t + 1) for t in range(20, 39)) / 19)
    loss = {name: pair[0] for name, pair in found.items()}
    assert loss["repeated"] < 1e-6 and loss["changed"] > 20
    assert loss["new"] == pytest.approx(math.log(50))
    parts = {name: pair[1] for name, pair in found.items()}
    assert parts["new"] == pytest.approx(loss["new"] * 20 / 39)
    assert sum(parts.values()) - parts["all"] == pytest.approx(loss["all"], rel=1e-5)


@pytest.mark.parametrize("control", ["", "key-shift"])
def test_the_model_is_built_with_its_control_and_its_losses_are_its_own(control, tmp_path):
    torch.manual_seed(0)
    gpt = build(GPTConfig(vocab_size=31, block_size=12, n_layer=1, n_head=2, n_embd=16,
                          control=control))
    for p in gpt.parameters():
        p.data += 0.1
    save(gpt, tmp_path / "ckpt.pt")
    tokens = torch.randint(31, (5, 13))
    found = induction.measure(str(tmp_path / "ckpt.pt"), tokens, induction.kinds(tokens))
    assert found["all"][0] == pytest.approx(gpt(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-5)
    assert induction.losses(gpt, tokens, rows=2).mean().item() == pytest.approx(found["all"][0])


def one_step(out, variants, seeds, quick):
    """Instead of runs.compare, which test_compare.py tests: the same folders, of one step, on a
    part of the text."""
    data = str(prepare(os.path.join(out, "pydocs"), "--max_tokens", 60000))
    for variant in variants:
        train.main([*read_variant(variant), *QUICK, "--max_steps", "1", "--dataset", data,
                    "--no-sample", "--out", os.path.join(out, f"{variant}-seed0")])


@pytest.mark.usefixtures("plots")
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "compare", one_step)
    printed = done(induction.main, "--quick", "--seeds", 1, "--variants", "baseline,key-shift",
                   "--out", tmp_path)
    results = json.loads((tmp_path / "induction.json").read_text())["results"]
    assert sum(results["shares"].values()) == pytest.approx(2)  # all, and its parts
    (run,) = results["runs"]["key-shift"]
    assert run["all"][0] == pytest.approx(sum(run[kind][1] for kind in induction.KINDS), rel=1e-5)
    assert f"{run['repeated'][0]:.3f} ±" in printed
    share, uniform = run["copying"]
    assert 0 < uniform < 1 and f"{share:.3f} ±" in printed
    drawn(tmp_path / "induction.svg", ["key-shift"])


@pytest.mark.usefixtures("plots")
def test_a_line_is_measured_once_and_shown_without_models(tmp_path, monkeypatch):
    one_step(tmp_path / "models", ["baseline", "key-shift"], 1, quick=True)
    measured, measure = [], induction.measure
    monkeypatch.setattr(induction, "measure", lambda path, *rest: [
        measured.append(path), measure(path, *rest)][1])

    argv = ("--runs models --seeds 1 --windows 8 --variants baseline,key-shift --results "
            "lines.jsonl --out out").split()
    monkeypatch.chdir(tmp_path)
    first = done(induction.main, *argv)
    assert len(measured) == 2
    assert done(induction.main, *argv) == first and len(measured) == 2
    assert done(induction.main, *argv, "--steps", 1, "--show") == first
    assert "choose from 1\n" in refused(induction.main, *argv, "--steps", 7)
    with monkeypatch.context() as patch:  # a folder of the same name with other models
        patch.setattr(induction, "sha256", lambda path: "of another file")
        assert "has another model's baseline, seed 0, step 1" in refused(induction.main, *argv)
    assert "no line of models with these settings" in refused(induction.main, *argv, "--show",
                                                              "--match", 2)
    assert len(measured) == 2
