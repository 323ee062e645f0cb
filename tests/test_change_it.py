"""docs/change_it.md: each diff applies, and reaches training, scores, samples and exports."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_train import ROOT, TINY, read_log, tokens  # noqa: F401

from model import ModelError
from nanonexus import decoder
from nanonexus.checkpoint import load_checkpoint

with open(os.path.join(ROOT, "docs", "change_it.md"), encoding="utf-8") as f:
    SECTIONS = re.split(r"^## ", f.read(), flags=re.M)[1:]
CHANGES = {section.split("\n")[0]: section for section in SECTIONS}
SCRIPTS = ("model", "train", "sample", "eval_sciq", "nanonexus")


@contextlib.contextmanager
def project(folder):
    """Imports are from this folder, as in a process of its own, which would take a while to start;
    so would export's look at what it made, which tests/test_export.py has in another process."""
    def ours():
        return {name: m for name, m in sys.modules.items() if name.split(".")[0] in SCRIPTS}

    def opened(argv, **kwargs):  # export's other process
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv[2:])
            patch.chdir(kwargs["cwd"])
            for name in ("model", "nanonexus"):
                patch.setitem(sys.modules, name, sys.modules[name])  # the script hides them
            exec(argv[2], {"__name__": "__main__"})
        return SimpleNamespace(returncode=0)

    before = ours()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in before:
            del sys.modules[name]
        patch.setattr(importlib.import_module("nanonexus.export").subprocess, "run", opened)
        try:
            yield
        finally:
            for name in ours():
                del sys.modules[name]
            sys.modules.update(before)


def call(script, *argv):
    """What a script of the project prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        importlib.import_module(script).main()
    return said.getvalue()


def use(out, *flags):
    """What a project makes with train.py's flags: (validation losses, the scores'
    log-likelihoods, the sample), of which nothing is lost; and a page of attention."""
    call("train", *TINY, "--max_steps", 3, "--lr", 1e-2, "--out", out, *flags)
    checkpoint = ["--checkpoint", out / "ckpt.pt"]
    call("eval_sciq", *checkpoint, "--tasks", "demo", "--limit", 2, "--json", out / "scores.json",
         "--save_docs")
    call("nanonexus.view", *checkpoint, "--prompt", "The", "--out", out / "view.html")
    scores = json.loads((out / "scores.json").read_text())["tasks"]["demo"]["docs"]
    return ([event["val_loss"] for event in read_log(out)], [doc["lls"] for doc in scores],
            call("sample", *checkpoint, "--prompt", "The", "--max_new_tokens", 100))


@pytest.fixture(scope="module")
def before(tokens, tmp_path_factory):  # noqa: F811
    return use(tmp_path_factory.mktemp("before"), "--dataset", tokens)


def change(name, folder):
    """A copy of the project with one of the changes."""
    shutil.copytree(os.path.join(ROOT, "nanonexus"), folder / "nanonexus")
    for script in SCRIPTS[:-1]:
        shutil.copy(os.path.join(ROOT, f"{script}.py"), folder)
    diff, = re.findall(r"```diff\n(.*?)```", CHANGES[name], re.S)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True)
    return folder


def test_a_map_for_pretrained_models(tmp_path):
    pytest.importorskip("transformers", reason="extra hf: transformers")
    from test_retrofit import logits, make

    model, idx = make("llama"), torch.arange(3, 21).view(2, 9)
    own = logits(model, idx)
    with project(change("An inner map for pretrained models", tmp_path / "project")):
        nexus = importlib.import_module("nanonexus.retrofit").nexus
        assert (logits(nexus(model, streams="k", inner="average"), idx) - own).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "out")
        load = importlib.import_module("nanonexus.decoder").load
        assert torch.equal(logits(load(tmp_path / "out"), idx), logits(model, idx))
    with pytest.raises(ModelError, match="inner must be one of"):
        decoder.load(tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in CHANGES if "pretrained" not in name])
def test_a_change_reaches_everything(name, before, tokens, tmp_path):  # noqa: F811
    pytest.importorskip("transformers", reason="extra hf: transformers")
    changed, out = change(name, tmp_path / "project"), tmp_path / "out"
    flags = " ".join(re.findall(r"^    python train.py (.*) --out", CHANGES[name], re.M))
    with project(changed):
        losses, scores, text = use(out, "--dataset", tokens, *flags.split())
        error = sys.modules["nanonexus.cli"].UserError
        export = ["nanonexus.export", "--checkpoint", out / "ckpt.pt", "--out", out / "exported"]
        if "control" in name:
            with pytest.raises(error, match="control"):
                call(*export)
        else:
            call(*export)
    assert losses[-1] != before[0][-1] and scores != before[1] and text != before[2]
    # the project as it was does not take the checkpoint for one of its own
    if name.startswith("Another optimizer"):  # the model is the same
        assert losses[0] == before[0][0]
        load_checkpoint(str(out / "ckpt.pt"))
    else:
        with pytest.raises(ModelError, match="model.py has changed|nexus_inner must be|no control|"
                           "not of the model"):
            load_checkpoint(str(out / "ckpt.pt"))
