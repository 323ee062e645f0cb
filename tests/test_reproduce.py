"""The script of the 70M comparison goes from text to a paired table, and continues when stopped."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_train import ROOT, TINY, read_log

SCRIPT = os.path.join(ROOT, "experiments", "reproduce_70m.sh")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_from_text_to_scores_and_on(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.txt").write_text("the quick brown fox and the lazy dog\n" * 3000)
    env = os.environ | dict(OUT=str(tmp_path / "out"), TEXT=str(tmp_path / "*.txt"), PRESET="tiny",
                            TOKENIZER="bytes", TASKS="demo", VARIANTS="baseline self",
                            PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    flags = [*TINY[:4], "--n_embd", "32", "--block_size", "512", "--batch_tokens", "1024",
             "--micro_batch", "2", "--eval_windows", "2", "--device", "cpu", "--decay_steps", "4"]
    for changes in (dict(STEPS="2", VARIANTS="baseline"), dict(STEPS="4")):  # as if stopped
        out = subprocess.run([SCRIPT, *flags], env=env | changes, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    assert out.stdout.count("resumed at step 2") == 1
    assert all(read_log(tmp_path / "out" / name)[-1]["step"] == 4 for name in ("baseline", "self"))
    with open(tmp_path / "out" / "paired-self.json") as f:
        scores = json.load(f)
    assert scores["config"]["nexus_order"] == 1 and scores["versus"]["config"]["nexus_order"] == 2
    assert scores["versus"]["config"]["nexus_inner"] == "self"
    assert 0 <= scores["paired"]["demo"]["acc"]["p"] <= 1
    bad = subprocess.run([SCRIPT], env=env | dict(VARIANTS="baseline other"), capture_output=True,
                         text=True)
    assert bad.returncode == 2 and "no variant 'other'" in bad.stderr
    bad = subprocess.run([SCRIPT], env={k: v for k, v in env.items() if k != "OUT"},
                         capture_output=True, text=True)
    assert bad.returncode != 0 and "give a folder" in bad.stderr
