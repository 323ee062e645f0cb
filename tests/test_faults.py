"""A killed run, a full disk and a damaged checkpoint: nothing is lost, and the run continues."""

import os
import resource
import signal
import subprocess

from test_train import command, numbers, run, same, shell, tokens, weights  # noqa: F401


def test_a_killed_run_resumes_to_the_same_result(tokens, tmp_path):  # noqa: F811
    flags = ["--decay_steps", 400, "--save_interval", 7]
    job = subprocess.Popen(command(tokens, tmp_path / "torn", "--max_steps", 10**6, *flags),
                           stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if line.startswith("step 20/"):
            break
    job.kill()
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    saved = weights(tmp_path / "torn")["step"]
    assert saved >= 14 and saved % 7 == 0
    steps = saved + 12  # beyond what was logged after the checkpoint
    torn = run(tokens, tmp_path / "torn", "--resume", "--max_steps", steps)
    whole = run(tokens, tmp_path / "whole", "--max_steps", steps, *flags)
    assert numbers(torn) == numbers(whole)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "torn")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])


def on_a_full_disk(argv, size):
    """What a command says that cannot write a file of more than size bytes."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    result = shell(argv, preexec_fn=limit)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_full_disk_leaves_the_old_checkpoint(tokens, tmp_path):  # noqa: F811
    run(tokens, tmp_path / "run", "--max_steps", 2)
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    said = on_a_full_disk(command(tokens, tmp_path / "run", "--resume", "--max_steps", 4),
                          len(before) // 2)
    assert "is the disk full?" in said and "the last one is untouched" in said
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "ckpt.pt", "log.jsonl"]
    log = run(tokens, tmp_path / "run", "--resume", "--max_steps", 4)  # and the run continues
    assert [event["step"] for event in log] == [0, 1, 2, 3, 4]


def test_the_newest_whole_checkpoint_is_used_and_that_is_said(tokens, tmp_path, capsys):  # noqa: F811
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8)
    out, names = tmp_path / "run", ["ckpt.pt", "ckpt.1.pt", "ckpt.2.pt"]
    run(tokens, out, "--max_steps", 6, "--decay_steps", 8, "--save_interval", 2, "--keep", 3)
    assert sorted(name for name in os.listdir(out) if name.endswith(".pt")) == sorted(names)
    for name in names[:2]:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1  # one bit, in the middle of the weights
        (out / name).write_bytes(content)
    parts = run(tokens, out, "--resume", "--max_steps", 8)
    said = capsys.readouterr().err
    assert "ckpt.pt is damaged" in said and "ckpt.2.pt, step 2" in said
    assert numbers(parts) == numbers(whole)
