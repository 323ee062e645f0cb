"""What really happens to runs: kills, signals, time limits, damage, full disks, two at once."""

import ast
import contextlib
import glob
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torture
from test_train import ROOT, command, numbers, read_log, run, tokens, weights  # noqa: F401

from model import ModelError
from nanonexus import checkpoint
from nanonexus.cli import UserError
from nanonexus.data import TokenSet
from nanonexus.hf import load_neox
from nanonexus.loss import TrainingLoss


def test_killed_at_random_steps_it_loses_nothing(tokens, tmp_path):  # noqa: F811
    outcomes = torture.kills(tokens, str(tmp_path), 4)
    assert outcomes["killed"] == outcomes["killed after new steps"] == 4


def test_damage_is_named_or_harmless(tokens, tmp_path):  # noqa: F811
    run(tokens, tmp_path / "run", "--max_steps", 2)
    outcomes = torture.damage(tokens, str(tmp_path / "run"), str(tmp_path), 100)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == 100
    assert outcomes["checkpoint"]["named in one line"] >= 15


def test_the_newest_whole_checkpoint_is_used_and_that_is_said(tokens, tmp_path, capsys):  # noqa: F811
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8)
    out = tmp_path / "run"
    run(tokens, out, "--max_steps", 6, "--decay_steps", 8, "--save_interval", 2, "--keep", 3)
    assert [weights_at(out, i)["step"] for i in range(3)] == [6, 4, 2]
    assert not (out / "ckpt.3.pt").exists()
    for name in ("ckpt.pt", "ckpt.1.pt"):
        with open(out / name, "r+b") as f:
            f.truncate(5000)
    parts = run(tokens, out, "--resume", "--max_steps", 8)
    said = capsys.readouterr().err
    assert "ckpt.pt is damaged" in said and "continuing from" in said
    assert "ckpt.2.pt, step 2" in said
    assert numbers(parts) == numbers(whole)


def weights_at(out, i):
    return torch.load(checkpoint.older(str(out / "ckpt.pt"), i), weights_only=True)


def start(tokens, out, *flags):  # noqa: F811
    """A run in its own process, at its fifth step."""
    job = subprocess.Popen(command(tokens, out, "--max_steps", 10**6, "--eval_interval", 10**6,
                                   *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    for line in job.stdout:
        if line.startswith("step 5/"):
            return job
    raise AssertionError(job.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_so(tokens, tmp_path, number):  # noqa: F811
    job = start(tokens, tmp_path)
    job.send_signal(number)
    said, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + number and errors == ""
    step = weights(tmp_path)["step"]
    assert f"stopped at step {step}, saved in" in said and "--resume" in said
    assert read_log(tmp_path)[-1]["step"] == step


def test_a_reader_who_leaves_does_not_end_the_run(tokens, tmp_path):  # noqa: F811
    """As in `python train.py | head -n 1`."""
    job = subprocess.Popen(command(tokens, tmp_path, "--max_steps", 30), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout.readline()
    job.stdout.close()
    assert job.stderr.read() == "" and job.wait(timeout=60) == 0
    assert weights(tmp_path)["step"] == read_log(tmp_path)[-1]["step"] == 30


def test_a_run_in_a_thread_and_the_interrupt_after_one(tokens, tmp_path):  # noqa: F811
    """As from a notebook: train.main leaves Ctrl-C as it was, and needs no main thread."""
    before = signal.getsignal(signal.SIGINT)
    run(tokens, tmp_path, "--max_steps", 1)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError, match="norm is nan") as kept:  # and all that its frames hold
        run(tokens, tmp_path / "nan", "--max_steps", 9, "--lr", 1e30, "--grad_clip", "inf")
    run(tokens, tmp_path / "nan", "--max_steps", 1)
    assert kept.tb
    with ThreadPoolExecutor(1) as pool:
        log = pool.submit(run, tokens, tmp_path, "--resume", "--max_steps", 2).result()
    assert log[-1]["step"] == 2


def test_max_minutes_saves_and_stops(tokens, tmp_path, capsys):  # noqa: F811
    log = run(tokens, tmp_path, "--max_steps", 10**6, "--eval_interval", 10**6,
              "--max_minutes", 0.01)
    assert "stopped at step" in capsys.readouterr().out
    assert weights(tmp_path)["step"] == log[-1]["step"] < 10**5


def poison(monkeypatch, bad_step):
    """Make the loss of one step NaN."""
    calls, forward = [], TrainingLoss.forward

    def patched(self, idx, targets):
        loss = forward(self, idx, targets)
        calls.append(torch.is_grad_enabled())
        return loss * float("nan") if calls[-1] and sum(calls) == bad_step else loss

    monkeypatch.setattr(TrainingLoss, "forward", patched)


def test_not_a_number_is_named_where_it_appears(tokens, tmp_path, monkeypatch):  # noqa: F811
    poison(monkeypatch, 4)
    with pytest.raises(UserError, match=r"norm is nan at step 4, windows \d+ .*on_nan skip"):
        run(tokens, tmp_path, "--max_steps", 9, "--save_interval", 2, "--micro_batch", 8)
    assert weights(tmp_path)["step"] == 2
    assert all(p.isfinite().all() for p in weights(tmp_path)["model"].values())


def test_skipping_leaves_one_step_out(tokens, tmp_path, monkeypatch, capsys):  # noqa: F811
    poison(monkeypatch, 4)
    log = run(tokens, tmp_path, "--max_steps", 9, "--on_nan", "skip", "--micro_batch", 8)
    assert "at step 4" in capsys.readouterr().out and log[-1]["step"] == 9
    assert all(p.isfinite().all() for p in weights(tmp_path)["model"].values())


def test_a_spike_is_marked(tokens, tmp_path, capsys):  # noqa: F811
    from argparse import Namespace

    from nanonexus.log import Log
    args = Namespace(out=str(tmp_path), max_steps=20, wandb=None, tensorboard=False)
    log = Log(args, None)
    for step, loss in enumerate([3.0] * 10 + [3.9, 4.1, 3.0], 1):
        log.write(dict(step=step, train_loss=loss))
    assert [event["step"] for event in read_log(tmp_path) if event.get("spike")] == [12]
    assert "jumped to 4.10" in capsys.readouterr().out


def test_two_runs_into_one_folder(tokens, tmp_path):  # noqa: F811
    job = start(tokens, tmp_path)
    try:
        with pytest.raises(UserError, match="another run is writing"):
            run(tokens, tmp_path, "--max_steps", 1)
    finally:
        job.send_signal(signal.SIGINT)
        said, _ = job.communicate(timeout=60)
    assert "stopped at step" in said
    steps = [event["step"] for event in read_log(tmp_path)]
    assert steps == list(range(len(steps)))  # nothing of the second run is in it


def test_an_evaluation_reads_whole_checkpoints_while_training_writes(tokens, tmp_path):  # noqa: F811
    job = start(tokens, tmp_path, "--save_interval", 1)
    try:
        until, seen = time.monotonic() + 3, set()
        while time.monotonic() < until:
            with contextlib.suppress(ModelError) if not seen else contextlib.nullcontext():
                seen.add(checkpoint.load_checkpoint(str(tmp_path / "ckpt.pt"))[1]["step"])
    finally:
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=60)
    assert len(seen) > 2


@pytest.fixture
def disk(tmp_path):
    """A separate file system, of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
                             capture_output=True) if shutil.which("mount") else None
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fails_in_one_line(job_argv):
    result = subprocess.run(job_argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    return result.stderr


def test_a_disk_that_fills_up(tokens, tmp_path, disk):  # noqa: F811
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8)
    run(tokens, disk / "run", "--max_steps", 4, "--decay_steps", 8)
    with open(disk / "other", "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    resume = command(tokens, disk / "run", "--resume", "--max_steps", 8, "--save_interval", 2)
    assert "could not write" in (said := fails_in_one_line(resume)) or "No space left" in said
    with open(disk / "other", "r+b") as f:  # the log fits again, a checkpoint does not
        f.truncate(os.path.getsize(disk / "other") - 20_000)
    said = fails_in_one_line(resume)
    assert "is the disk full?" in said and "the last one is untouched" in said
    assert weights(disk / "run")["step"] == 4 and not (disk / "run/ckpt.pt.partial").exists()
    os.remove(disk / "other")
    assert numbers(run(tokens, disk / "run", "--resume", "--max_steps", 8)) == numbers(whole)


def test_a_folder_that_can_only_be_read(tokens, disk):  # noqa: F811
    run(tokens, disk / "run", "--max_steps", 2)
    before = {f.name: f.read_bytes() for f in (disk / "run").iterdir()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out, flags in (("run", ["--resume"]), ("new", [])):
        said = fails_in_one_line(command(tokens, disk / out, *flags, "--max_steps", 4))
        assert "Read-only file system" in said
    assert before == {f.name: f.read_bytes() for f in (disk / "run").iterdir()}


def test_a_second_interrupt_stops_at_once(tokens, tmp_path):  # noqa: F811
    """While the first one waits for a step that takes hours."""
    argv = command(tokens, tmp_path / "long", "--batch_tokens", 2**24, "--micro_batch", 8)
    job = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() and job.stdout.readline().startswith("step 0/")
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None  # it wants to finish the step
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 130 and errors == "interrupted\n"


def test_a_folder_that_vanishes(tokens, tmp_path):  # noqa: F811
    job = start(tokens, tmp_path / "gone", "--save_interval", 50)
    shutil.rmtree(tmp_path / "gone")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2 and errors.count("\n") == 1 and "could not write" in errors


def test_a_place_that_cannot_be_written(tokens):  # noqa: F811
    with pytest.raises(UserError, match="cannot write into the folder /proc/here/out"):
        run(tokens, "/proc/here/out", "--max_steps", 1)


def test_a_damaged_line_of_the_log(tokens, tmp_path):  # noqa: F811
    run(tokens, tmp_path, "--max_steps", 3, "--decay_steps", 9)
    lines = (tmp_path / "log.jsonl").read_text().splitlines(True)
    (tmp_path / "log.jsonl").write_text("".join([lines[0], "}garbage{\n", *lines[2:]]))
    with pytest.raises(UserError, match="damaged in line 2"):
        run(tokens, tmp_path, "--resume", "--max_steps", 5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(lines)  # untouched


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("wrap", ["torch", "pickle"])
def test_a_checkpoint_cannot_run_code(tmp_path, wrap):
    target, path = tmp_path / "created", tmp_path / "evil.pt"
    state = dict(model={}, config={}, step=0, tokenizer=Evil(str(target)))
    if wrap == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    with pytest.raises(ModelError, match="damaged, or not a checkpoint"):
        checkpoint.load_checkpoint(str(path))
    assert not target.exists()
    torch.load(path, weights_only=False) if wrap == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # the test's own bomb works


def test_weights_are_read_from_the_folder_alone(tmp_path):
    """An index may name a file elsewhere; it is not followed."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file
    save_file({"embed_out.weight": torch.zeros(64, 16)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(dict(
        model_type="gpt_neox", vocab_size=64, max_position_embeddings=8, num_hidden_layers=1,
        num_attention_heads=2, hidden_size=16, intermediate_size=64, hidden_act="gelu")))
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(dict(
        weight_map={"embed_out.weight": "../outside.safetensors"})))
    with pytest.raises(ModelError, match="missing"):
        load_neox(str(tmp_path / "model"))


def test_nothing_here_runs_text_as_code():
    """No eval, exec or compile of text, no pickle, no trust_remote_code."""
    # these folders alone: a virtual environment may be next to them
    paths = [path for folder in (".", "nanonexus", "experiments")
             for path in glob.glob(f"{ROOT}/{folder}/*.py")]
    assert len(paths) > 25
    for path in paths:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "shell"), path
                assert node.arg != "weights_only" or node.value.value is True, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                assert not {"pickle", "marshal", "shelve", "dill"} & {*names}, path


def test_two_preparations_of_one_set(tmp_path):
    argv = [sys.executable, os.path.join(ROOT, "prepare_data.py"), "--max_tokens", "200000",
            "--out", str(tmp_path / "set")]
    jobs = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    errors = [job.communicate(timeout=60)[1] for job in jobs]
    codes = [job.returncode for job in jobs]
    assert sorted(codes) == [0, 2] and errors[codes.index(2)].strip().count("\n") == 0
    TokenSet(str(tmp_path / "set"), verify=True)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("flags", [
    ["--batch_tokens", "32", "--micro_batch", "1"],  # one window
    ["--block_size", "1", "--batch_tokens", "8"], ["--n_head", "1"],
    ["--n_embd", "30", "--n_head", "3", "--rotary_pct", "0.2"],  # head width 10
    ["--vocab_size", "513"]])
def test_odd_shapes_train(tokens, tmp_path, flags):  # noqa: F811
    log = run(tokens, tmp_path, "--max_steps", 2, *flags)
    assert log[-1]["step"] == 2 and log[-1]["val_loss"] < 7


def test_a_schedule_resumed_past_its_end_stays_at_its_floor(tokens, tmp_path):  # noqa: F811
    run(tokens, tmp_path, "--max_steps", 4)
    log = run(tokens, tmp_path, "--resume", "--max_steps", 7)
    assert [event["lr"] for event in log[5:]] == [pytest.approx(3e-4)] * 3


def test_deterministic_runs_are_the_same(tokens, tmp_path):  # noqa: F811
    try:
        logs = [run(tokens, tmp_path / str(i), "--max_steps", 3, "--deterministic")
                for i in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert numbers(logs[0]) == numbers(logs[1])
