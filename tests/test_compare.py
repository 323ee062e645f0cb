"""compare.py trains what it says, continues where it was, and its table is the logs' arithmetic."""

import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace

import compare
import pytest

from model import GPT, PRESETS, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "experiments", "compare.py")
SMALL = ["--", "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32",
         "--batch_tokens", "256", "--micro_batch", "8", "--warmup_steps", "1", "--device", "cpu"]


def run(out, *argv):
    return subprocess.run([sys.executable, SCRIPT, "--out", str(out), *argv], capture_output=True,
                          text=True)


def test_compare_and_continue(tmp_path):
    pytest.importorskip("matplotlib")
    first = run(tmp_path, "--seeds", "1", "--max_steps", "4", "--eval_interval", "2", *SMALL)
    assert first.returncode == 0, first.stderr
    again = run(tmp_path, "--seeds", "2", "--max_steps", "4", "--eval_interval", "2", *SMALL)
    assert again.returncode == 0, again.stderr
    assert "seed 0" not in again.stdout and again.stdout.count(", seed 1") == 2  # seed 0 was there

    with open(tmp_path / "compare.json") as f:
        results = json.load(f)["results"]
    assert list(results) == ["baseline", "nexus-2"]
    for name, r in results.items():
        for seed in (0, 1):
            with open(tmp_path / f"{name}-seed{seed}" / "log.jsonl") as f:
                assert json.loads(f.readlines()[-1])["val_loss"] == r["val_loss"][seed]
        assert f"{statistics.mean(r['val_loss']):.4f} ±" in again.stdout
    base, nexus = results["baseline"], results["nexus-2"]
    assert base["parameters"] == nexus["parameters"]
    assert base["flops_per_token"] < nexus["flops_per_token"]
    gap = statistics.mean(b - a for a, b in zip(base["val_loss"], nexus["val_loss"], strict=True))
    assert f"{gap:+.4f} [" in again.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")

    other = run(tmp_path, "--max_steps", "5", *SMALL)
    assert other.returncode == 2 and "other settings" in other.stderr


def test_two_baselines_spend_the_compute_of_order_2(tmp_path):
    pytest.importorskip("matplotlib")
    out = run(tmp_path, "--seeds", "1", "--max_steps", "20", "--eval_interval", "20",
              "--variants", "baseline,nexus-2,longer,deeper", *SMALL, "--block_size", "64",
              "--micro_batch", "4")
    assert out.returncode == 0, out.stderr
    with open(tmp_path / "compare.json") as f:
        results = json.load(f)["results"]
    flops = {name: r["flops_per_token"] * r["tokens"][-1] for name, r in results.items()}
    assert flops["nexus-2"] > flops["baseline"]
    step = results["baseline"]["flops_per_token"] * 256
    assert abs(flops["longer"] - flops["nexus-2"]) <= step / 2
    base = GPTConfig(**{**PRESETS["tiny"], "n_layer": 20, "block_size": 1024})
    layers = compare.equal_compute(base, 1)["deeper"]
    target = GPT(replace(base, nexus_order=2)).flops_per_token(1024)
    gaps = {n: abs(GPT(replace(base, n_layer=n)).flops_per_token(1024) - target)
            for n in (layers - 1, layers, layers + 1)}
    assert min(gaps, key=gaps.get) == layers > 21  # several layers at a long context
    wrong = run(tmp_path / "wrong", "--variants", "longer")
    assert wrong.returncode == 2 and "baseline before it" in wrong.stderr


def test_an_interrupt_saves_and_the_same_command_continues(tmp_path):
    pytest.importorskip("matplotlib")
    argv = ["--variants", "baseline", "--seeds", "1", "--max_steps", "4000", "--eval_interval",
            "2000", *SMALL, "--log_interval", "1"]
    process = subprocess.Popen([sys.executable, SCRIPT, "--out", str(tmp_path), *argv], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to both
            break
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and "the same command continues" in errors
    folder = tmp_path / "baseline-seed0"
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    assert (folder / "ckpt.pt").exists() and steps == list(range(len(steps))) and 5 < len(steps)
    argv[argv.index("4000")] = str(len(steps) + 2)
    (tmp_path / "settings.json").unlink()  # the test's own shorter run
    argv += ["--decay_steps", "4000"]
    assert run(tmp_path, *argv).returncode == 0
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("argv, message", [(["--variants", "nexus2"], "no variant 'nexus2'"),
                                           (["--seeds", "0"], "--seeds")])
def test_mistakes(tmp_path, argv, message):
    out = run(tmp_path, *argv)
    assert out.returncode == 2 and message in out.stderr and out.stderr.count("\n") == 1
