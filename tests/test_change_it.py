"""docs/change_it.md: each diff applies, and reaches training, scores, samples and the export."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_train import ROOT, read_log, shell, tokens  # noqa: F401

from model import ModelError
from nanonexus.checkpoint import load_checkpoint

with open(os.path.join(ROOT, "docs", "change_it.md"), encoding="utf-8") as f:
    SECTIONS = re.split(r"^## ", f.read(), flags=re.M)[1:]
CHANGES = {section.split("\n")[0]: section for section in SECTIONS}
TRAIN = """--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_tokens 256 --micro_batch 8
           --eval_windows 8 --max_steps 3 --warmup_steps 2 --lr 1e-2 --device cpu
           --no-sample""".split()
# Everything in one process: each script takes a while to start.
USE = """
import contextlib, io, sys
import torch
torch.set_num_threads(1)
import eval_sciq, sample, train
from nanonexus import export
from nanonexus.cli import UserError

out, flags = sys.argv[1], sys.argv[2:]

def run(main, *argv):
    sys.argv = ["script", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main()
    return said.getvalue()

train.main([*flags, "--out", out])
checkpoint = ["--checkpoint", out + "/ckpt.pt"]
run(eval_sciq.main, *checkpoint, "--tasks", "demo", "--limit", "2", "--json", out + "/scores.json",
    "--save_docs")
with open(out + "/sample.txt", "w") as f:
    f.write(run(sample.main, *checkpoint, "--prompt", "The", "--max_new_tokens", "100"))
try:
    run(export.main, *checkpoint, "--out", out + "/exported")
except UserError as error:
    with open(out + "/refused.txt", "w") as f:
        f.write(str(error))
"""


def use(folder, out, *flags):
    """What a project in this folder makes with train.py's flags: (validation losses, the scores'
    log-likelihoods, the sample), of which nothing is lost; out/exported or out/refused.txt."""
    done = shell([sys.executable, "-c", USE, str(out), *TRAIN, *flags], cwd=folder)
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "scores.json").read_text())["tasks"]["demo"]["docs"]
    return ([event["val_loss"] for event in read_log(out)], [doc["lls"] for doc in scores],
            (out / "sample.txt").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A copy of the project as it is."""
    folder = tmp_path_factory.mktemp("plain") / "project"
    folder.mkdir()
    for name in ("model.py", "train.py", "sample.py", "eval_sciq.py", "prepare_data.py"):
        shutil.copy(os.path.join(ROOT, name), folder)
    shutil.copytree(os.path.join(ROOT, "nanonexus"), folder / "nanonexus",
                    ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def before(plain, tokens):  # noqa: F811
    return use(plain, plain / "out", "--dataset", str(tokens))


def flags_of(section):
    """The flags of the section's command, if it has one."""
    found = re.search(r"^    python train.py (.*) --out", section, re.M)
    return found[1].split() if found else []


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_everything(name, plain, before, tokens, tmp_path):  # noqa: F811
    pytest.importorskip("transformers", reason="extra hf: transformers")
    section, changed = CHANGES[name], tmp_path / "project"
    shutil.copytree(plain, changed, ignore=shutil.ignore_patterns("out", "__pycache__"))
    diff, = re.findall(r"```diff\n(.*?)```", section, re.S)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=changed, check=True)
    flags = ["--dataset", str(tokens), *flags_of(section)]
    losses, scores, text = use(changed, tmp_path / "out", *flags)
    assert losses[-1] != before[0][-1] and scores != before[1] and text != before[2]
    if "control" in name:
        assert "control" in (tmp_path / "out/refused.txt").read_text()
    else:  # opened and compared, in a process of its own, before it is renamed into place
        assert (tmp_path / "out/exported/model.py").exists()
    # the project as it was does not take the checkpoint for one of its own
    if name.startswith("Another optimizer"):  # the model is the same
        assert losses[0] == before[0][0]
        load_checkpoint(str(tmp_path / "out/ckpt.pt"))
    else:
        with pytest.raises(ModelError, match="model.py has changed|nexus_inner must be|no control|"
                           "not of the model"):
            load_checkpoint(str(tmp_path / "out/ckpt.pt"))
