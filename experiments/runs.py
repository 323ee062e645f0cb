"""
Runs of train.py: in parallel, resumable, each appending one line to a file of results.
"""

import glob
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch

from common import COMMIT, ROOT

from model import GPTConfig
from nanonexus.checkpoint import newest_checkpoint, read_checkpoint
from nanonexus.cli import UserError, listed, positive_int
from nanonexus.controls import build
from nanonexus.data import Dataset, count_sequences, read_sequences, val_indices
from nanonexus.files import append_line, read_json, read_lines, sha256, write_json


class TrainingRun(NamedTuple):
    name: str  # of its folder
    variant: str
    seed: int
    steps: int
    flags: list  # of train.py, all but the data and the folder: they identify the run


def code():
    """The sha256 of model.py, train.py and nanonexus, shortened: what every run depends on."""
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(ROOT, "nanonexus", "*.py"))) + [
            os.path.join(ROOT, "model.py"), os.path.join(ROOT, "train.py")]:
        digest.update(sha256(path).encode())
    return digest.hexdigest()[:16]


def source(kept=()):
    """What a line of results says of the code that made it. A note says how many of the lines kept
    are of other code."""
    made = dict(commit=COMMIT, code=code())
    if others := [line for line in kept if line.get("code") != made["code"]]:
        commits = ", ".join(sorted({str(line.get("commit")) for line in others}))
        print(f"note: {len(others)} results of other code (commit {commits}) are kept, and not "
              "measured again: after a change of the code give another --results or --out",
              file=sys.stderr, flush=True)
    return made


def check_settings(folder, settings, flag="--out"):
    """UserError if the folder holds runs with other settings than these, or of other code; flag:
    what names the folder."""
    settings = settings | dict(code=code())
    path = os.path.join(folder, "settings.json")
    saved = read_json(path) if os.path.exists(path) else settings
    if wrong := [key for key in saved.keys() | settings if saved.get(key) != settings.get(key)]:
        raise UserError(f"{folder} holds runs with other settings ({', '.join(sorted(wrong))}): "
                        f"choose another {flag} (code: of model.py, train.py and nanonexus)")
    write_json(path, settings)


def compare(out, variants, seeds, quick):
    """Let compare.py train these variants in the folder `out`: it continues, or finds all done.
    UserError if it stops."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "experiments", "compare.py"),
                           "--variants", ",".join(variants), "--seeds", str(seeds), "--out", out,
                           *["--quick"] * quick])
    if done.returncode:
        raise UserError(f"compare.py stopped with status {done.returncode}")


def checkpoints(out, variant, seeds):
    """The checkpoints of a variant, seeds 0 to seeds - 1, that compare.py made in the folder `out`.
    UserError if one is missing."""
    if not os.path.isdir(out):
        raise UserError(f"no folder {out}: python experiments/compare.py --out {out} makes it")
    paths = [os.path.join(out, f"{variant}-seed{seed}", "ckpt.pt") for seed in range(seeds)]
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path} is missing: lower --seeds, or let compare.py make it")
    return paths


def model_flags(add, variants, which, count):
    """The flags of an experiment on compare.py's models; which: what --variants may be."""
    add("--runs", metavar="DIR", help="the folder of compare.py --out DIR (default: OUT/compare, "
        "made by compare.py if missing)")
    add("--variants", type=listed(str), default=variants,
        help=f"of compare.py, {which} (default: {variants})")
    add("--dataset", metavar="DIR", help="dataset (default: pydocs in --runs)")
    add("--seeds", type=positive_int, default=3, help="models of each variant (default: 3)")
    add("--windows", type=positive_int, default=count,
        help=f"sequences of validation text (default: {count})")


def models_and_text(args, even=False):
    """What model_flags and --quick ask for: {variant: checkpoints} and sequences of validation
    text, int64 (--windows, T + 1), where T is the models' context, or the even number below it."""
    out = args.runs or os.path.join(args.out, "compare")
    if not args.runs:
        compare(out, args.variants, args.seeds, args.quick)
    paths = {variant: checkpoints(out, variant, args.seeds) for variant in args.variants}
    T = read_checkpoint(paths[args.variants[0]][0])["config"]["block_size"]
    T -= T % 2 * even
    text = Dataset(args.dataset or os.path.join(out, "pydocs")).val
    indices = val_indices(count_sequences(text, T), args.windows)
    return paths, torch.from_numpy(read_sequences(text, T, indices))


def in_parallel(function, jobs, at_once):
    """(job, function(job)) of each job as it ends, at_once of them at a time. If one fails, those
    that have not begun are left out. Ctrl-C goes to the jobs' own processes too: they save what
    they have."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt as error:
            pool.shutdown(cancel_futures=True)
            raise KeyboardInterrupt("interrupted; the same command continues") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Study:
    """Runs in folders under `out` on one dataset, and the file of their lines.

    data: the dataset's fingerprint. jobs: how many runs at a time.
    """

    def __init__(self, out, results, data, jobs):
        self.out, self.results, self.data, self.jobs = out, results, data, jobs
        self.lock = threading.Lock()
        self.lines = {(line["flags"], line["data"]): line for line in read_lines(
            results, "flags", "data", "seed", "lr", "parameters", "flops_per_token",
            "tokens_per_sec", "val_loss", "curve")}

    def key(self, run):
        return " ".join(run.flags), self.data

    def line(self, run):
        """The run's line in the file of results; None if it is not finished."""
        return self.lines.get(self.key(run))

    def execute(self, runs, dataset):
        """Finish the unfinished runs, in their order, on the data in the folder
        dataset. UserError if one stops."""
        left, start = [run for run in runs if not self.line(run)], time.monotonic()
        self.source = source(filter(None, map(self.line, runs)))
        for run in left:
            self.check(run)
        if left:
            print(f"{len(left)} of {len(runs)} runs, {self.jobs} at a time; each one's log is "
                  f"{os.path.join(self.out, 'RUN', 'output.txt')}", flush=True)
        for done, (run, _) in enumerate(in_parallel(
                lambda run: self.train(run, dataset), left, self.jobs), 1):
            each = (time.monotonic() - start) / done
            self.tell(run, runs, f"{each * (len(left) - done) / 60:.1f}")

    def tell(self, run, runs, minutes):
        """A row of the table that grows: a finished run, minus the baseline of the same seed."""
        line, base = self.line(run), [other for other in runs if self.line(other) and (
            other.variant, other.seed) == ("baseline", run.seed)]
        gap = "" if len(base) != 1 or base[0] is run else \
            f"{line['val_loss'] - self.line(base[0])['val_loss']:+.4f} minus baseline"
        print(f"  {run.name:28}{line['val_loss']:.4f} nats  {gap:24}{minutes:>6} minutes left",
              flush=True)

    def check(self, run):
        """The file that says what its folder holds, and what it should say. UserError if the
        folder holds a run with other flags or data."""
        path = os.path.join(self.out, run.name, "run.json")
        wanted = dict(flags=self.key(run)[0], data=self.data)
        if os.path.exists(path) and (found := read_json(path)) != wanted:
            differ = " and ".join(n for n in wanted if found.get(n) != wanted[n])
            raise UserError(f"{os.path.dirname(path)} holds a run with other {differ}: choose "
                            "another --out")
        return path, wanted

    def train(self, run, dataset):
        """Finish one run, in its own process, and append its line. UserError if it stops."""
        folder = os.path.join(self.out, run.name)
        checkpoint = os.path.join(folder, "ckpt.pt")
        if not os.path.exists(checkpoint) or newest_checkpoint(checkpoint)["step"] < run.steps:
            command = [sys.executable, os.path.join(ROOT, "train.py"), "--dataset", dataset,
                       "--out", folder, "--no-sample", *run.flags,
                       *["--resume"] * os.path.exists(checkpoint)]
            os.makedirs(folder, exist_ok=True)
            write_json(*self.check(run))
            env = {**os.environ, **({"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {})}
            path = os.path.join(folder, "output.txt")
            with open(path, "a", encoding="utf-8") as output:
                code = subprocess.Popen(command, stdout=output, stderr=output, env=env).wait()
            if code == 130:  # Ctrl-C has reached it before this process
                raise KeyboardInterrupt
            if code:
                with open(path, encoding="utf-8") as output:
                    last = output.read().strip().split("\n")[-1]
                raise UserError(f"{run.name}: train.py stopped with status {code} ({last:.300}); "
                                "the same command continues")
        line = self.summary(run, read_lines(os.path.join(folder, "log.jsonl")),
                            newest_checkpoint(checkpoint))
        with self.lock:
            self.lines[self.key(run)] = line
            append_line(self.results, line)

    def summary(self, run, log, saved):
        """The line of a finished run: what it was, what it cost, what came out."""
        args, model = saved["args"], build(GPTConfig(**saved["config"]))
        curve = [(event["tokens"], event["val_loss"]) for event in log
                 if event["val_loss"] is not None]
        norms = [event["grad_norm"] for event in log if event["grad_norm"] is not None]
        return dict(
            variant=run.variant, seed=run.seed, lr=args["lr"], steps=saved["step"],
            tokens=saved["tokens"], val_loss=curve[-1][1], curve=curve,
            largest_norm=max(norms[len(norms) // 2:]),  # of the second half: has it diverged?
            parameters=model.num_params(),
            flops_per_token=model.flops_per_token(model.config.block_size),
            tokens_per_sec=statistics.median(
                event["tokens_per_sec"] for event in log if event["tokens_per_sec"]),
            dtype=args["dtype"], threads=1 if self.jobs > 1 else torch.get_num_threads(),
            data=self.data, vocab_size=model.config.vocab_size, flags=self.key(run)[0],
            **self.source, torch=saved["torch"], python=platform.python_version(),
            machine=platform.processor() or platform.machine())
