"""Resume is exact, and a user's mistakes are reported in one line before the work."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import prepare_data
import train
from model import GPT, ModelError
from nanonexus import data
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import UserError, run_script
from nanonexus.flags import build_parser, parse_args, preset_config
from nanonexus.log import Log

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY = """--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_tokens 256 --micro_batch 4
          --eval_windows 8 --log_interval 1 --eval_interval 3 --warmup_steps 2 --device cpu
          --no-sample""".split()


def prepare(folder, *argv):
    """prepare_data.py in this process; the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", "--out", str(folder), "--workers", "1",
                                    *map(str, argv)])
        prepare_data.main()
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tokens") / "set", "--max_tokens", 40000)


def run(tokens, out, *argv):
    """train.py in this process; its log, a list of events."""
    train.main(["--dataset", str(tokens), "--out", str(out), *TINY, *map(str, argv)])
    return read_log(out)


def command(tokens, out, *argv, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = torchrun if processes > 1 else []
    return [sys.executable, *start, os.path.join(ROOT, "train.py"), "--dataset", str(tokens),
            "--out", str(out), *TINY, *map(str, argv)]


def shell(argv, **kwargs):
    return subprocess.run(argv, capture_output=True, text=True, **kwargs)


def read_log(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def numbers(log):
    """The log without what depends on the clock."""
    return [{k: v for k, v in event.items() if k not in ("tokens_per_sec", "mfu")} for event in log]


def weights(out):
    return torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)


def same(a, b):
    """Whether two nested dicts and lists of tensors and values are bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_n_plus_m_steps_are_n_stop_resume_m(tokens, tmp_path):
    """Whatever a killed run has logged after its checkpoint; and a finished run is left alone."""
    flags = ["--dropout", "0.2", "--nexus_order", "3"]
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8, *flags)
    run(tokens, tmp_path / "parts", "--max_steps", 5, "--decay_steps", 8, *flags)
    with open(tmp_path / "parts/log.jsonl", "a") as f:  # killed at step 6, in mid-line
        f.write(json.dumps(dict(step=6, train_loss=9.9)) + '\n{"step": 7, "tra')
    for _ in range(2):
        parts = run(tokens, tmp_path / "parts", "--max_steps", 8, "--resume")
        assert numbers(parts) == numbers(whole)
    assert [event["step"] for event in whole] == list(range(9)) and whole[-1]["val_loss"]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(same(a[key], b[key]) for key in ("model", "optimizers", "scaler"))


def test_other_intervals_from_now_on_leave_the_log_as_it_is(tokens, tmp_path):
    first = run(tokens, tmp_path, "--max_steps", 4, "--decay_steps", 8)
    then = run(tokens, tmp_path, "--resume", "--max_steps", 8, "--log_interval", 8,
               "--eval_interval", 8)
    assert numbers(then[:4]) == numbers(first[:4])  # steps 0 to 3
    assert [event["step"] for event in then] == [0, 1, 2, 3, 4, 8]
    assert first[4]["val_loss"] and then[4]["val_loss"] is None  # it was validated as the last


def test_same_seed_same_run_and_it_learns(tokens, tmp_path):
    logs = [run(tokens, tmp_path / str(i), "--decay_steps", 60, "--lr", 1e-2, *flags.split())
            for i, flags in enumerate(("--max_steps 60", "--max_steps 3 --deterministic",
                                       "--max_steps 3 --seed 1"))]
    assert numbers(logs[0][:4]) == numbers(logs[1]) != numbers(logs[2])
    assert logs[0][0]["val_loss"] == pytest.approx(math.log(320), abs=0.3)
    assert logs[0][-1]["val_loss"] < 3.3  # bytes of English, from 5.8


def test_validation_has_no_dropout(tokens, tmp_path):
    logs = [run(tokens, tmp_path / p, "--max_steps", 1, "--dropout", p) for p in ("0.0", "0.5")]
    assert logs[0][0]["val_loss"] == logs[1][0]["val_loss"]
    assert logs[0][1]["train_loss"] != logs[1][1]["train_loss"]


def test_micro_batches_do_not_change_the_result(tokens, tmp_path):
    """Nor does padding: 6 windows are no whole batch of 4."""
    logs = [run(tokens, tmp_path / str(m), "--max_steps", 3, "--micro_batch", m,
                "--eval_windows", 6) for m in (4, 1)]
    for a, b in zip(*logs, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=2e-5)


def test_learning_rate_schedule():
    rates = [train.warmup_cosine(step, 10, 110) for step in range(150)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[60] == pytest.approx(0.55) and rates[110:] == pytest.approx([0.1] * 40)
    assert rates[10:111] == sorted(rates[10:111], reverse=True)


def test_decay_only_on_matrices():
    model = GPT(preset_config("tiny"))
    optimizer, = train.make_optimizers(model, build_parser("").parse_args(["--weight_decay", "1"]))
    decayed, other = optimizer.param_groups
    assert decayed["weight_decay"] == 1 and other["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in other["params"]} == {1}
    assert sum(len(g["params"]) for g in (decayed, other)) == len(list(model.parameters()))


def test_the_checkpoint_has_the_model_of_the_flags(tokens, tmp_path):
    run(tokens, tmp_path, "--max_steps", 1, "--nexus_order", 3, "--nexus_streams", "k",
        "--nexus_inner", "shared", "--parallel_residual", "--rotary_pct", "0.5")
    model, meta = load_checkpoint(tmp_path / "ckpt.pt")
    c = model.config
    assert (c.nexus_order, c.nexus_streams, c.nexus_inner) == (3, "k", "shared")
    assert c.parallel_residual and c.rotary_pct == 0.5 and c.vocab_size == 320
    assert meta["step"] == 1 and meta["tokens"] == 256 and meta["tokenizer"] == "bytes"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signal to send")
def test_ctrl_c_saves_and_resume_continues_though_nobody_reads(tokens, tmp_path):
    """As in `python train.py | head`, where the reader leaves."""
    argv = command(tokens, tmp_path, "--max_steps", 100_000, "--decay_steps", 100)
    job = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step 5/") for line in job.stdout)
        job.stdout.close()
        with pytest.raises(UserError, match="another run is writing"):
            run(tokens, tmp_path, "--max_steps", 1)
        job.send_signal(signal.SIGINT)
        assert job.stderr.read() == "" and job.wait(timeout=60) == 130
    finally:
        job.kill()
    step = weights(tmp_path)["step"]
    assert 5 <= step < 10_000 and read_log(tmp_path)[-1]["step"] == step
    log = run(tokens, tmp_path, "--resume", "--max_steps", step + 3)
    assert [event["step"] for event in log] == list(range(step + 4))


def test_a_run_in_a_thread_and_the_interrupt_after_one(tokens, tmp_path):
    """As from a notebook: train.main leaves Ctrl-C as it was, and needs no main thread."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="norm is nan") as kept:  # and all that its frames hold
        run(tokens, tmp_path, "--max_steps", 9, "--lr", 1e30, "--grad_clip", "inf")
    assert signal.getsignal(signal.SIGINT) is before and kept.tb
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tokens, tmp_path, "--max_steps", 1).result()[-1]["step"] == 1


def test_max_minutes_saves_and_stops(tokens, tmp_path, capsys):
    log = run(tokens, tmp_path, "--max_steps", 10**6, "--max_minutes", 0.005)
    step = weights(tmp_path)["step"]
    assert f"stopped at step {step}, saved in" in capsys.readouterr().out
    assert step == log[-1]["step"] < 10**5


@pytest.mark.parametrize("argv, message", [
    ("--batch_tokens 300", "multiple of block_size x processes x micro_batch = 128: use 256"),
    ("--dataset {}/pydoc", "no token set .*pydoc: use pydocs, or"),
    ("--dataset {}/my.txt", "--input .*my.txt --out tokens/my, then use --dataset tokens/my"),
    ("--out {}/my.txt/out", "my.txt"), ("--max_steps 0", "max_steps"),
    ("--warmup_steps 8 --decay_steps 4", "8 ends after --decay_steps 4: lower it"),
    ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr fast", "--lr"), ("--preset tinny", "tiny"),
    ("--control shift", "key-shift"), ("--nexus_inner own", "nexus_inner"), ("--n_head 3", "n_he"),
    ("--control near --nexus_order 1", "near needs nexus_order 2"),
    ("--control near --nexus_inner self", "near takes the place of --nexus_inner"),
    ("--doc_mask --control mean", "reaches across documents"),
    ("--vocab_size 100", "less than the token set's 320"), ("--attention flex", "use --attention"),
    ("--block_size 50000 --batch_tokens 200000", "fewer than one window"),
    ("--resume", "no checkpoint at"), ("--grad_clip 0", "grad_clip"),
    ("--log_intervall 3", "log_intervall")])
def test_bad_flags_are_one_line(tokens, tmp_path, argv, message):
    (tmp_path / "my.txt").write_text("text")
    with pytest.raises((UserError, ModelError), match=message) as caught:
        run(tokens, tmp_path / "run", *argv.format(tmp_path).split())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/ckpt.pt").exists()
    assert "flex" not in argv or not (tmp_path / "run/log.jsonl").exists()


def test_a_resume_must_agree_with_its_checkpoint(tokens, tmp_path, monkeypatch):
    run(tokens, tmp_path, "--max_steps", 2)
    for argv, message in ((["--lr", "0.5"], "--lr 0.5 contradicts the checkpoint's 0.003"),
                          (["--preset", "pythia-70m"], "--preset pythia-70m contradicts"),
                          (["--max_steps", "1"], "is at step 2: give a larger --max_steps than 1"),
                          (["--nexus_order", "1"], "--nexus_order 1 contradicts")):
        with pytest.raises(UserError, match=message):
            run(tokens, tmp_path, "--resume", *argv)
    run(tokens, tmp_path, "--resume", "--max_steps", 3, "--rotary_pct", "1.0")  # as the preset
    with monkeypatch.context() as patch:
        patch.setattr(data.TokenSet, "fingerprint", "other")
        with pytest.raises(UserError, match="is not the token set"):
            run(tokens, tmp_path, "--resume")
    log = (tmp_path / "log.jsonl").read_text().splitlines(True)
    (tmp_path / "log.jsonl").write_text(broken := "".join([log[0], "}garbage{\n", *log[2:]]))
    with pytest.raises(UserError, match="log.jsonl, line 2, is damaged"):
        run(tokens, tmp_path, "--resume", "--max_steps", 5)
    assert (tmp_path / "log.jsonl").read_text() == broken
    for _ in range(2):  # the second time only an earlier checkpoint is left
        with pytest.raises(UserError, match="--resume continues it"):
            run(tokens, tmp_path)
        (tmp_path / "ckpt.pt").unlink(missing_ok=True)


def test_defaults_follow_from_other_flags(tmp_path):
    for argv, order, warmup in (
            ("", 2, 50), ("--control key-shift", 1, 50), ("--control near", 2, 50),
            ("--control key-shift --nexus_inner past", 2, 50),
            ("--control key-shift --nexus_streams k", 2, 50),
            ("--nexus_order 1 --max_steps 20", 1, 10), ("--max_steps 20 --decay_steps 400", 2, 50),
            ("--warmup_steps 7 --max_steps 8", 2, 7)):
        args, _ = parse_args("", ["--out", str(tmp_path), *argv.split()])
        assert (args.nexus_order, args.warmup_steps) == (order, warmup), argv


def test_verify_finds_a_changed_token(tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "set")
    with open(tmp_path / "set/train.bin", "r+b") as f:
        f.seek(1000)
        f.write(b"~")
    run(tmp_path / "set", tmp_path / "a", "--max_steps", 1)  # the size is right
    with pytest.raises(UserError, match="does not have the sha256"):
        run(tmp_path / "set", tmp_path / "b", "--max_steps", 1, "--verify")


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**60), lambda: np.empty(2**50)])
def test_a_lack_of_memory_names_the_flag_to_lower_first(capsys, ask):
    with pytest.raises(SystemExit) as end:
        run_script(ask)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "out of memory: lower --micro_batch (" in said


def test_the_largest_micro_batch_that_fits_is_chosen(tokens, tmp_path):
    """tiny's is 8 sequences; 256 tokens are 4 of them at a context of 64."""
    argv = [flag for i, flag in enumerate(TINY) if "--micro_batch" not in TINY[max(0, i - 1):i + 1]]
    train.main(["--dataset", str(tokens), "--out", str(tmp_path), *argv, "--block_size", "64",
                "--max_steps", "1"])
    assert weights(tmp_path)["step"] == 1


def test_a_spike_is_marked(tmp_path, capsys):
    log = Log(argparse.Namespace(out=str(tmp_path), max_steps=20, wandb=None, tensorboard=False),
              None)
    for step, loss in enumerate([3.0] * 10 + [3.9, 4.1, 3.0, math.nan], 1):
        log.write(dict(step=step, train_loss=loss))
    assert [event["step"] for event in read_log(tmp_path) if event.get("spike")] == [12]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()  # which is not JSON
    assert "jumped to 4.10" in capsys.readouterr().out


def test_with_no_arguments_it_prepares_trains_and_samples(tmp_path, monkeypatch, capsys):
    """The defaults, cut short: pydocs on first use, order 2, a sample and the next command."""
    monkeypatch.chdir(tmp_path)
    train.main(["--max_steps", "1", "--eval_windows", "8"])
    said = capsys.readouterr().out
    assert "tiny, order 2, self, 875,264 parameters" in said
    assert "python sample.py --checkpoint" in said
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "ckpt.pt", "log.jsonl", "pydocs"]


def test_doc_mask_trains_within_documents(tmp_path):
    (tmp_path / "text.txt").write_text("".join(
        f"document {i} says {i}{i}{i}\n<|endoftext|>\n" for i in range(300)))
    tokens = prepare(tmp_path / "set", "--dataset", "text", "--input", tmp_path / "text.txt")
    plain, masked = (run(tokens, tmp_path / str(i), "--max_steps", 1, *flags)
                     for i, flags in enumerate(([], ["--doc_mask"])))
    assert plain[0]["val_loss"] != masked[0]["val_loss"]
    train.main(["--resume", "--out", str(tmp_path / "1"), "--max_steps", "2"])  # remembered
    assert weights(tmp_path / "1")["args"]["doc_mask"] is True
    with pytest.raises(UserError, match="contradicts"):
        train.main(["--resume", "--out", str(tmp_path / "1"), "--max_steps", "5", "--no-doc_mask"])
