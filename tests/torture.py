"""
What a run survives: killed at random moments, and files damaged at random bytes. Prints the counts.

    python tests/torture.py --kills 30 --damage 300 --torchrun 20

The tests call the same functions with smaller counts.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import train  # noqa: E402
from model import ModelError  # noqa: E402
from nanonexus import data  # noqa: E402
from nanonexus.checkpoint import read_checkpoint  # noqa: E402
from nanonexus.cli import UserError  # noqa: E402
from nanonexus.tasks import read_task  # noqa: E402

TINY = """--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_tokens 256 --micro_batch 8
          --eval_windows 8 --log_interval 1 --eval_interval 5 --warmup_steps 2 --device cpu
          --no-sample --save_interval 3""".split()


def in_child(job):
    """Run job() in a forked process, silently; its pid."""
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        job()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def train_in_child(tokens, out, steps, *flags):
    resume = ["--resume"] if os.path.exists(os.path.join(out, "ckpt.pt")) else []
    return in_child(lambda: train.main(["--dataset", str(tokens), "--out", str(out), *TINY,
                                        "--max_steps", str(steps), *resume, *flags]))


def events(out):
    """log.jsonl without what depends on the clock, and whether its last line is cut short."""
    with open(os.path.join(out, "log.jsonl")) as f:
        lines = f.read().split("\n")
    whole = [json.loads(line) for line in lines[:-1]]
    return [{k: v for k, v in event.items() if k != "tokens_per_sec"} for event in whole], lines[-1]


def same(a, b):
    """Whether two nested dicts and lists of tensors and values are bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_killed(out, before, outcomes):
    """What must hold of a run just killed; its last event, to see if the next one gets further."""
    seen, rest = events(out) if os.path.exists(os.path.join(out, "log.jsonl")) else ([], "")
    path, at = os.path.join(out, "ckpt.pt"), 0
    if os.path.exists(path):
        at = read_checkpoint(path)["step"]
    outcomes["killed"] += 1
    outcomes["killed after new steps"] += seen[-1:] != before
    outcomes["killed while a checkpoint was written"] += os.path.exists(path + ".partial")
    outcomes["last line cut short"] += bool(rest)
    assert not seen or seen[-1]["step"] - at <= 3, "more is lost than since the last checkpoint"
    return seen[-1:]


def check_equal(whole, torn):
    assert events(torn) == events(whole), "the log has lost, doubled or changed a line"
    a, b = (read_checkpoint(os.path.join(f, "ckpt.pt")) for f in (whole, torn))
    assert same([a["model"], a["optimizer"]], [b["model"], b["optimizer"]]), "other weights"


def last_step(out):
    """The last step in log.jsonl, -1 if there is none yet."""
    with contextlib.suppress(FileNotFoundError):
        seen, _ = events(out)
        return seen[-1]["step"] if seen else -1
    return -1


def kills(tokens, folder, count, seed=0, steps_each=40):
    """Kill -9 a run `count` times and compare it with one never stopped: a Counter of outcomes. A
    kill waits for a step, or for a checkpoint that is being written, not for the clock."""
    rng, steps = random.Random(seed), steps_each * (count + 1)
    with contextlib.redirect_stdout(io.StringIO()):  # what torch imports late: then a child has it
        train.main(["--dataset", str(tokens), "--out", os.path.join(folder, "warm"), *TINY,
                    "--max_steps", "1"])
    whole, torn = os.path.join(folder, "whole"), os.path.join(folder, "torn")
    assert os.waitpid(train_in_child(tokens, whole, steps), 0)[1] == 0
    outcomes, step = collections.Counter(), []
    for i in range(count):
        pid = train_in_child(tokens, torn, steps)
        target = last_step(torn) + rng.randint(2, steps_each - 4)
        while last_step(torn) < target or (i % 2 and not os.path.exists(torn + "/ckpt.pt.partial")):
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "it has ended before it was killed"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = check_killed(torn, step, outcomes)
    assert os.waitpid(train_in_child(tokens, torn, steps), 0)[1] == 0
    check_equal(whole, torn)
    return outcomes


def workers(mark):
    """{rank: pid} of the processes that torchrun has started in an environment with this mark."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as f:
            env = dict(pair.split(b"=", 1) for pair in f.read().split(b"\0") if b"=" in pair)
            if env.get(b"MARK") == os.fsencode(mark) and b"RANK" in env:
                found[int(env[b"RANK"])] = int(pid)
    return found


def torchrun(tokens, out, steps):
    """A run of two processes; its environment is marked with `out`, for workers()."""
    resume = ["--resume"] if os.path.exists(os.path.join(out, "ckpt.pt")) else []
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            os.path.join(ROOT, "train.py"), "--dataset", str(tokens), "--out", str(out), *TINY,
            "--max_steps", str(steps), "--micro_batch", "4", *resume]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(MARK=str(out), OMP_NUM_THREADS="1"))


def torchrun_kills(tokens, folder, count, seed=0, steps_each=100):
    """The same for two processes under torchrun, either of them killed."""
    rng, steps = random.Random(seed), steps_each * count
    whole, torn = os.path.join(folder, "whole2"), os.path.join(folder, "torn2")
    job = torchrun(tokens, whole, steps)
    assert job.communicate() and job.returncode == 0
    outcomes, step = collections.Counter(), []
    while outcomes["killed"] < count:
        job = torchrun(tokens, torn, steps)
        for line in job.stdout:
            if line.startswith("step "):
                break
        time.sleep(rng.uniform(0, 1.5))
        rank = rng.randrange(2)
        if not (pid := workers(torn).get(rank)):
            break  # it was at its end
        os.kill(pid, signal.SIGKILL)
        errors = job.communicate()[1]
        assert job.returncode != 0
        outcomes[f"rank {rank} killed"] += 1
        outcomes["the other one says what to do"] += "with --resume continues" in errors
        step = check_killed(torn, step, outcomes)
    job = torchrun(tokens, torn, steps)
    assert job.communicate() and job.returncode == 0
    check_equal(whole, torn)
    return outcomes


def spoil(content, rng):
    """content with some bytes changed, or cut."""
    if rng.random() < 0.3:
        return content[:rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage(tokens, run, folder, count, seed=0):
    """Damage every kind of file `count` times in all: {kind: Counter of outcomes}. Raises if a
    reader ends in anything but its one-line errors, or believes a file that is not what it was."""
    rng, outcomes = random.Random(seed), collections.defaultdict(collections.Counter)

    def checkpoint(path):
        return read_checkpoint(path)

    def token_set(path):
        found = data.TokenSet(os.path.dirname(path), verify=True)
        return found.train.tobytes(), found.val.tobytes(), found.tokenizer, found.vocab_size

    def evaluation(path):
        docs, digest = read_task("sciq", os.path.dirname(path), None)
        return digest, [tuple(doc) for doc in docs]  # the digest is in the scores' JSON

    sciq = os.path.join(folder, "sciq")
    os.makedirs(sciq, exist_ok=True)
    demo = os.path.join(ROOT, "nanonexus", "demo_test.jsonl")
    shutil.copy(demo, os.path.join(sciq, "sciq_test.jsonl"))
    copy = os.path.join(folder, "set")
    shutil.copytree(tokens, copy, dirs_exist_ok=True)
    kinds = {"checkpoint": (os.path.join(run, "ckpt.pt"), checkpoint),
             "train.bin": (os.path.join(copy, "train.bin"), token_set),
             "val.bin": (os.path.join(copy, "val.bin"), token_set),
             "meta.json": (os.path.join(copy, "meta.json"), token_set),
             "evaluation file": (os.path.join(sciq, "sciq_test.jsonl"), evaluation)}
    for i in range(count):
        kind, (path, read) = list(kinds.items())[i % len(kinds)]
        good = read(path)
        with open(path, "rb") as f:
            content = f.read()
        try:
            with open(path, "wb") as f:
                f.write(bad := spoil(content, rng))
            try:
                found = read(path)
            except (UserError, ModelError) as error:
                assert "\n" not in " ".join(str(error).split()) and len(str(error)) < 500
                outcomes[kind]["named in one line"] += 1
            else:
                if bad == content or same(found, good):
                    outcomes[kind]["harmless: read as before"] += 1
                else:
                    assert kind == "evaluation file" and found[0] != good[0], f"{kind} believed"
                    outcomes[kind]["read, with another sha256 in the scores"] += 1
        finally:
            with open(path, "wb") as f:
                f.write(content)
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of a run of one process")
    parser.add_argument("--damage", type=int, default=300)
    parser.add_argument("--torchrun", type=int, default=20, help="kills of one process of two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = os.path.join(folder, "tokens")
        os.system(f"{sys.executable} {ROOT}/prepare_data.py --out {tokens} --max_tokens 40000")
        print("kills:", dict(kills(tokens, folder, args.kills, args.seed)),
              "; log and weights equal those of a run never stopped")
        print("kills of one of two processes:",
              dict(torchrun_kills(tokens, folder, args.torchrun, args.seed)))
        for kind, counts in damage(tokens, os.path.join(folder, "whole"), folder, args.damage,
                                   args.seed).items():
            print(f"damaged {kind}: {dict(counts)}")


if __name__ == "__main__":
    main()
