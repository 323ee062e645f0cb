"""
Every call that writes, failed or killed: what is left afterwards, and does it continue?

    python tests/faults.py             # all points, a few minutes; Linux with a C compiler
    python tests/faults.py --every 20

A job writes a token set, a run's checkpoints and log, an export, a file of results. First its calls
that write are counted (faults.c); then it is run again for each of them, which finds the disk full
(ENOSPC, from there on), fails once (EIO) or kills the process in the middle of it (kill -9).
Afterwards the old or the new version is there, intact; a job that failed has said so in one line;
and the same job, run again, ends with the bytes of one that was never disturbed.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS, os.path.dirname(TESTS)]
ACTIONS = dict(full=1, broken=2, killed=3)


def build(folder):
    """faults.c, compiled into a folder; None if that needs a compiler or another system."""
    path = os.path.join(folder, "faults.so")
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler:
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path,
                        os.path.join(TESTS, "faults.c"), "-ldl"], check=True)
    return path if compiler else None


def run(folder, *flags):
    """This file in a process with faults.c under it: {job: Counter of outcomes}."""
    library = build(folder)
    done = subprocess.run([sys.executable, __file__, "--folder", folder, *map(str, flags)],
                          env=os.environ | dict(LD_PRELOAD=library, OMP_NUM_THREADS="1"),
                          stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, "see above"
    return json.loads(done.stdout.splitlines()[-1])


def jobs(folder):
    """{name: (job(out), look(out), folder)}: look raises unless out is nothing, or whole; it
    returns what must be the same in the end. folder, unless None: what out is a copy of first."""
    import torch
    import torture

    import prepare_data
    import train
    from nanonexus import export
    from nanonexus.checkpoint import read_checkpoint
    from nanonexus.data import TokenSet
    from nanonexus.files import append_line, read_lines, write_json
    from nanonexus.hf import load_neox

    torch.set_num_threads(1)
    tokens, trained = os.path.join(folder, "tokens"), os.path.join(folder, "trained")

    def call(main, *argv):
        sys.argv = ["script", *argv]
        main()

    def prepare(out):
        if not os.path.exists(out):
            call(prepare_data.main, "--out", out, "--max_tokens", "80000", "--workers", "2")

    def token_set(out):
        if not os.path.exists(out):
            return None
        assert set(os.listdir(out)) - {".lock"} == {"meta.json", "train.bin", "val.bin"}
        return TokenSet(out, verify=True).meta

    def fit(out, steps=6):
        resume = ["--resume"] if os.path.exists(os.path.join(out, "ckpt.pt")) else []
        train.main(["--dataset", tokens, "--out", out, *torture.TINY, "--nexus_order", "1",
                    "--max_steps", str(steps), "--decay_steps", "6", *resume])

    def fitted(out):
        path = os.path.join(out, "ckpt.pt")
        if not os.path.exists(path):
            return None
        saved, (log, rest) = read_checkpoint(path), torture.events(out)
        if not rest and log[-1]["step"] == 6:
            return saved["step"], saved["model"], saved["optimizer"], log
        assert saved["step"] in (3, 6)
        return saved["step"]

    def exported(out):
        if not os.path.exists(out):
            return None
        load_neox(out)
        contents = {}
        for name in set(os.listdir(out)) - {".lock"}:
            with open(os.path.join(out, name), "rb") as f:
                contents[name] = f.read()
        return contents

    def report(out):
        os.makedirs(out, exist_ok=True)
        lines, scores = os.path.join(out, "lines.jsonl"), os.path.join(out, "scores.json")
        for i in range(len(read_lines(lines)), 4):
            append_line(lines, dict(i=i, text="x" * 50))
        for version in (1, 2):
            write_json(scores, dict(version=version, text="x" * 20_000))

    def reported(out):
        lines = read_lines(os.path.join(out, "lines.jsonl"))
        assert [line["i"] for line in lines] == list(range(len(lines)))
        if not os.path.exists(os.path.join(out, "scores.json")):
            return None
        with open(os.path.join(out, "scores.json")) as f:
            return lines, json.load(f)

    if not os.path.exists(trained):
        with contextlib.redirect_stdout(sys.stderr):
            prepare(tokens)
            fit(trained, 3)
    checkpoint = os.path.join(trained, "ckpt.pt")
    return {"token set": (prepare, token_set, None), "a new run": (fit, fitted, None),
            "a resumed run": (fit, fitted, trained), "results": (report, reported, None),
            "export": (lambda out: os.path.exists(out) or export.export(checkpoint, out), exported,
                       None)}


def in_child(job, out, faults=None, at=0, action=0):
    """(status, stderr, calls that wrote below out) of job(out), in a forked process."""
    from nanonexus.cli import run_script

    said = os.path.join(os.path.dirname(out), "stderr.txt")
    calls = os.path.join(os.path.dirname(out), "calls.txt")
    if not (pid := os.fork()):
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            if faults:
                faults.faults_arm(out.encode(), ctypes.c_long(at), action)
            run_script(lambda: job(out))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            if faults and action == 0:
                with open(calls, "w") as f:
                    f.write(str(faults.faults_calls()))
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(said) as f, open(calls if faults and action == 0 else os.devnull) as count:
        return status, f.read(), int(count.read() or 0)


def strike_all(folder, every):
    """Strike every `every`-th call of each job in each way: {job: Counter of outcomes}."""
    import torture
    faults = ctypes.CDLL(os.path.join(folder, "faults.so"))
    faults.faults_calls.restype = ctypes.c_long
    found, turn = {}, itertools.count()
    whole, torn = os.path.join(folder, "whole"), os.path.join(folder, "torn")
    for name, (job, look, begun) in jobs(folder).items():
        if begun:
            shutil.copytree(begun, whole)
        status, said, count = in_child(job, whole, faults)
        assert status == 0 and count > 3, (name, said)
        wanted, outcomes = look(whole), collections.Counter(calls=count)
        shutil.rmtree(whole)
        for at in range(count):
            for action, number in ACTIONS.items():
                if next(turn) % every:
                    continue
                if begun:
                    shutil.copytree(begun, torn)
                point = f"{name}, call {at} of {count} {action}"
                status, said, _ = in_child(job, torn, faults, at, number)
                assert status in ((-9, 0) if action == "killed" else (2, 0)), (point, status, said)
                assert status != 2 or said.count("\n") == 1, (point, said)
                look(torn)
                outcomes["struck"] += 1
                outcomes[f"{action}: " + {0: "did not matter", 2: "said in one line",
                                          -9: "whole"}[status]] += 1
                status, said, _ = in_child(job, torn)
                assert status == 0, (point, said)
                assert torture.same(look(torn), wanted), f"{point}: run again, it is not the same"
                left = [n for n in os.listdir(folder) if n.startswith("torn")]
                left += [n for n in os.listdir(torn) if "partial" in n or n.endswith(".link")]
                assert left == ["torn"], (point, left)
                shutil.rmtree(torn)
        found[name] = outcomes
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="strike only at every N-th point")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(strike_all(args.folder, args.every)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, outcomes in run(folder, "--every", args.every).items():
            print(f"{name}: {outcomes}")


if __name__ == "__main__":
    main()
