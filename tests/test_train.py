"""Training: resume is exact, and a checkpoint is of the model of the flags."""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from questions import refused

import prepare_data
import train
from model import GPT
from nanonexus import data
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import UserError
from nanonexus.flags import build_parser, parse_args, preset_config, split_batch
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
    """Whether nested dicts and lists of tensors and values are bit for bit the same: raises else"""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


def test_n_plus_m_steps_are_n_stop_resume_m(tokens, tmp_path):
    """Whatever a killed run has logged after its checkpoint, and whatever was logged or validated
    only because a run ended there; and a finished run is left alone."""
    flags = ["--dropout", "0.2", "--nexus_order", "3", "--log_interval", "2"]
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8, *flags)
    run(tokens, tmp_path / "parts", "--max_steps", 4, "--decay_steps", 8, *flags)
    run(tokens, tmp_path / "parts", "--max_steps", 5, "--resume", *flags)
    with open(tmp_path / "parts/log.jsonl", "a") as f:  # killed at step 6, in mid-line
        f.write(json.dumps(dict(step=6, train_loss=9.9)) + '\n{"step": 7, "tra')
    for _ in range(2):
        parts = run(tokens, tmp_path / "parts", "--max_steps", 8, "--resume", *flags)
        assert numbers(parts) == numbers(whole)
    assert [event["step"] for event in whole] == [0, 2, 3, 4, 6, 8] and whole[-1]["val_loss"]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(same(a[key], b[key]) for key in ("model", "optimizers", "scaler"))


def test_same_seed_same_run_which_learns_and_is_validated_without_dropout(tokens, tmp_path):
    whole, again, *others = (
        run(tokens, tmp_path / str(i), "--decay_steps", 60, "--lr", 1e-2, *flags.split())
        for i, flags in enumerate(("--max_steps 60", "--max_steps 3 --deterministic",
                                   "--max_steps 1 --seed 1", "--max_steps 1 --dropout 0.5")))
    assert numbers(whole[:4]) == numbers(again)
    assert [other[0]["val_loss"] == whole[0]["val_loss"] for other in others] == [False, True]
    assert all(other[1]["train_loss"] != whole[1]["train_loss"] for other in others)
    assert whole[0]["val_loss"] == pytest.approx(math.log(320), abs=0.3)
    assert whole[-1]["val_loss"] < 3.3  # bytes of English, from 5.8


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
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}
    assert decay == {id(p): float(p.dim() == 2) for p in model.parameters()}


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


def test_the_checkpoint_has_the_model_of_the_flags_and_a_resume_must_agree(
        tokens, tmp_path, monkeypatch):
    flags = dict(nexus_order=3, nexus_streams="k", nexus_inner="shared", rotary_pct=0.5)
    run(tokens, tmp_path, "--max_steps", 2, "--parallel_residual",
        *(part for name, value in flags.items() for part in (f"--{name}", value)))
    model, meta = load_checkpoint(tmp_path / "ckpt.pt")
    assert flags.items() <= vars(model.config).items()
    assert model.config.parallel_residual and model.config.vocab_size == 320
    assert (meta["step"], meta["tokens"], meta["tokenizer"]) == (2, 512, "bytes")

    for argv, message in ((["--lr", "0.5"], "--lr 0.5 contradicts the checkpoint's 0.003"),
                          (["--preset", "pythia-70m"], "--preset pythia-70m contradicts"),
                          (["--max_steps", "1"], "is at step 2: give a larger --max_steps than 1"),
                          (["--eval_windows", "2"], "--eval_windows 2 contradicts"),
                          (["--nexus_order", "1"], "--nexus_order 1 contradicts")):
        with pytest.raises(UserError, match=message):
            run(tokens, tmp_path, "--resume", *argv)
    run(tokens, tmp_path, "--resume", "--max_steps", 3, "--nexus_order", "3")  # as it was
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is not the dataset"):
        patch.setattr(data.Dataset, "fingerprint", "other")
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


@pytest.mark.parametrize("argv, order, warmup", [
    ("", 2, 50), ("--control key-shift", 1, 50), ("--control near", 2, 50),
    ("--control key-shift --nexus_inner past", 2, 50),
    ("--control key-shift --nexus_streams k", 2, 50), ("--nexus_order 1 --max_steps 20", 1, 10),
    ("--max_steps 20 --decay_steps 400", 2, 50), ("--warmup_steps 7 --max_steps 8", 2, 7)])
def test_defaults_follow_from_other_flags(tmp_path, argv, order, warmup):
    args, _ = parse_args("", ["--out", str(tmp_path), *argv.split()])
    assert (args.nexus_order, args.warmup_steps) == (order, warmup)


def test_the_largest_micro_batch_that_fits_is_chosen():
    """tiny's is 8 sequences at most."""
    for tokens, parts in ((256, (4, 1)), (64 * 12, (6, 2)), (64 * 16, (8, 2))):
        args = build_parser("").parse_args(["--batch_tokens", str(tokens)])
        assert split_batch(args, 64, SimpleNamespace(size=1)) == parts


def test_a_lack_of_memory_names_the_flag_to_lower_first():
    said = refused(lambda: torch.empty(2**60))
    assert "out of memory: lower --micro_batch (" in said


def test_a_spike_is_marked(tmp_path, capsys):
    log = Log(SimpleNamespace(out=str(tmp_path), max_steps=20, wandb=None, tensorboard=False), None)
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
    (tmp_path / "a.txt").write_text("".join(
        f"document {i} says {i}{i}{i}\n<|endoftext|>\n" for i in range(300)))
    tokens = prepare(tmp_path / "set", "--dataset", "text", "--input", tmp_path / "a.txt")
    plain, masked = (run(tokens, tmp_path / str(i), "--max_steps", 1, *flags)
                     for i, flags in enumerate(([], ["--doc_mask"])))
    assert plain[0]["val_loss"] != masked[0]["val_loss"]
    assert plain[1]["train_loss"] != masked[1]["train_loss"]
