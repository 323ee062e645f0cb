"""The scripts of the 70M comparison go from text to a paired table, and continue when stopped."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_train import ROOT, TINY, read_log
from test_train import tokens as tokens_on_disk  # noqa: F401

load = partial(torch.load, weights_only=True)
SCRIPT = os.path.join(ROOT, "experiments", "reproduce_70m.sh")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_from_text_to_scores_and_on(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.txt").write_text("the quick brown fox and the lazy dog\n" * 3000)
    env = os.environ | dict(OUT=str(tmp_path / "out"), TEXT=str(tmp_path / "*.txt"), PRESET="tiny",
                            TOKENIZER="bytes", TASKS="demo",
                            PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    flags = [*TINY[:4], "--n_embd", "32", "--block_size", "512", "--batch_tokens", "1024",
             "--micro_batch", "2", "--eval_windows", "2", "--device", "cpu", "--decay_steps", "4"]
    for steps in ("2", "4"):
        out = subprocess.run([SCRIPT, *flags], env=env | dict(STEPS=steps), capture_output=True,
                             text=True)
        assert out.returncode == 0, out.stderr
    for order in (1, 2):
        log = read_log(tmp_path / "out" / f"order{order}")
        assert log[-1]["step"] == 4 and "resumed at step 2" in out.stdout
    with open(tmp_path / "out" / "scores.json") as f:
        scores = json.load(f)
    assert scores["config"]["nexus_order"] == 1 and scores["versus"]["config"]["nexus_order"] == 2
    assert 0 <= scores["paired"]["demo"]["acc"]["p"] <= 1
    bad = subprocess.run([SCRIPT], env={k: v for k, v in env.items() if k != "OUT"},
                         capture_output=True, text=True)
    assert bad.returncode != 0 and "give a folder" in bad.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_on_a_gpu_a_control_is_trained_and_scored_like_a_model(tokens_on_disk, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    env = os.environ | dict(OUT=str(tmp_path), TOKENS=str(tokens_on_disk), PRESET="tiny", STEPS="1",
                            DEVICE="cpu", SEEDS="0", TASKS="demo", VARIANTS="baseline key-shift",
                            PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    for parts in ("train", "train scores"):  # the second call trains nothing again
        done = subprocess.run([os.path.join(ROOT, "experiments", "gpu.sh")], capture_output=True,
                              text=True, env=env | dict(PARTS=parts))
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[-2:]] == [
        ["baseline-0", "1"], ["key-shift-0", "1"]] and "train.py" not in done.stdout
    shifted = load(tmp_path / "key-shift-0" / "ckpt.pt")["model"].keys()
    assert shifted - load(tmp_path / "baseline-0" / "ckpt.pt")["model"].keys() == {
        f"blocks.{i}.attn.shift" for i in range(4)}
    paired = json.loads((tmp_path / "paired-key-shift-0.json").read_text())
    for side, name in ((paired["checkpoint"], "baseline-0"),
                       (paired["versus"]["checkpoint"], "key-shift-0")):
        assert side["path"] == str(tmp_path / name / "ckpt.pt") and side["step"] == 1
    assert paired["tasks"]["demo"]["n"] == 60 and (tmp_path / "paired-key-shift-0.svg").exists()
