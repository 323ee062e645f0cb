"""
What to measure first on a GPU: is the code correct, what do the variants learn at 70M parameters,
how do they score, when do they learn to copy, and how fast are they?

    python experiments/gpu.py --tokens tokens/openstax --data evals
    python experiments/gpu.py ... --deadline 560 --parts train,scores
    python experiments/gpu.py ... --variants baseline,cross,key-shift --seeds 0,1 --steps 600

It needs a CUDA device of 40 GB (less with --jobs 1 and fewer --windows), a dataset of GPT-2's
tokenizer and, without a network, the tasks' files in --data (see eval_sciq.py). What is finished is
kept in --work and never repeated, and an interrupted training run continues: on a machine that is
lent for minutes, repeat the command. Whatever ends it (--deadline, SIGTERM, Ctrl-C), --out has
summary.txt, results.jsonl (a line for each measurement, as in docs/results/h200.jsonl) and
details.tar.gz, all logs and answers. The parts, the most important first; none can stop another:

parity   parity.py: is attention right, how fast are its kernels; 15% of the time at most
train    train.py for each of --variants and --seeds, --jobs at a time, so that the start of one is
         hidden behind another; scores and copying follow each finished run
scores   eval_sciq.py on --tasks
copying  for each checkpoint, the loss on repeated, changed and new predictions, the strongest
         copying head (induction.py), and the loss on the second half of random tokens given twice
tests    CUDA tests, during training: inner steps, sdpa and flex, float32 and bfloat16, compiled
speed    cost.py with the longest kernels, last and alone, in the last 20% of the time at the latest

For a machine without a network, pack about 60 MB into a folder:

    mkdir data; tar -cJf data/tokens.tar.xz -C tokens openstax; git rev-parse HEAD > data/commit
    cp evals/{sciq_test,arc_easy_test,piqa_validation}.jsonl data
    cp -r $TIKTOKEN_CACHE_DIR data/tiktoken
    python3 experiments/gpu.py --tokens data/tokens.tar.xz --data data --deadline 560   # there

Arguments after -- are passed to train.py. --device cpu --preset tiny tries it without a GPU.
"""

import argparse
import glob
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import induction
import numpy as np
import torch
from compare import OWN, VARIANTS, check_extra, read_variant
from compare import split as split_argv
from runs import check_settings

from common import COMMIT, ROOT, table

from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import (
    Parser,
    UserError,
    listed,
    number,
    one_of,
    positive_int,
    run_script,
    whole,
)
from nanonexus.data import Dataset, count_sequences
from nanonexus.device import check_device
from nanonexus.files import new_folder, output_folder, read_json, read_lines, write_json, write_text
from nanonexus.flags import PRESETS, preset_config
from nanonexus.scoring import compare
from nanonexus.tasks import TASKS, read_task
from nanonexus.tokenizer import get_tokenizer

PARTS = ["parity", "train", "scores", "copying", "tests", "speed"]
SAVING = 15  # seconds that a stopped training has for its last step and its checkpoint
TESTS = "on_cuda and ([1- or 2-qk or 3-qk-cross or flash)"


def copying(args, run):
    """How far each checkpoint of a run has learnt to copy; writes copying-RUN.json."""
    text, T = Dataset(args.tokens).val, preset_config(args.preset).block_size
    count = min(96, count_sequences(text, T))  # of a large text those of docs/results/gpu.md
    starts = np.linspace(0, len(text) - T - 2, count).astype(int)
    tokens = torch.from_numpy(np.stack([text[s:s + T + 1] for s in starts]).astype(np.int64))
    kind, lines = induction.kinds(tokens), []
    half = torch.randint(min(50_000, args.vocab_size), (16, T // 2),
                         generator=torch.Generator().manual_seed(1))
    tokens, twice = tokens.to(args.device), torch.cat([half, half], 1).to(args.device)
    for path in sorted(glob.glob(os.path.join(args.work, "runs", run, "ckpt*.pt")), reverse=True):
        model, saved = load_checkpoint(path, args.device, attention="manual")
        loss = induction.losses(model, tokens, rows=4).cpu()
        head, uniform = induction.copying(model, tokens[:: 1 + count // 7, :-1])
        lines.append(dict(
            run=run, step=saved["step"], tokens=saved["tokens"], all=loss.mean().item(), head=head,
            uniform=uniform, shares=[(kind == i).float().mean().item() for i in range(3)],
            twice=induction.losses(model, twice, rows=4)[:, T // 2:].mean().item(),
            **{name: loss[kind == i].mean().item() for i, name in enumerate(induction.KINDS)}))
        print(f"step {saved['step']}: copying head {head:.3f}, uniform {uniform:.3f}", flush=True)
    lines.sort(key=lambda line: line["step"])
    write_json(os.path.join(args.work, f"copying-{run}.json"), lines)


class Session:
    """One call: runs what is not done yet, each job in a process of its own, until its end."""

    def __init__(self, args, given, extra, began):
        self.args, self.given, self.extra = args, given, extra
        self.T = preset_config(args.preset).block_size
        self.began, self.said, self.failed, self.lock = began, [], [], threading.Lock()
        self.end = began + args.deadline - SAVING - 5
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.stop)

    def stop(self, signum, frame):
        self.end = 0  # all jobs end now, and what there is gets written

    def path(self, *names):
        return os.path.join(self.args.work, *names)

    def say(self, text):
        with self.lock:
            self.said.append(f"[{time.monotonic() - self.began:4.0f} s] {text}")
            print(self.said[-1], flush=True)
            self.write()

    def job(self, name, command, result, left=0, **env):
        """Run a command, its output in log/NAME.log, until `left` seconds before the end, unless
        its file `result` is there. Ten seconds after that is there it is ended: a short process
        may hang in the compiler's pool of workers."""
        def late():
            return time.monotonic() > min(self.end - left, seen + 10)

        start, seen, log = time.monotonic(), math.inf, self.path("log", f"{name}.log")
        if os.path.exists(result):
            return
        if late():
            return self.say(f"{name}: no time left")
        with open(log, "ab") as output:
            process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output,
                                       env=os.environ | env)
        while process.poll() is None and not late():
            time.sleep(0.1)
            seen = min(seen, time.monotonic()) if os.path.exists(result) else math.inf
        if stopped := process.poll() is None:
            process.terminate()
            try:
                process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
        failed = process.wait() != 0 and not (stopped and seen < math.inf)
        with open(log, encoding="utf-8", errors="replace") as f:
            last = (f.read().strip().splitlines() or [""])[-1]
        if failed and os.path.exists(result):
            os.replace(result, result + ".partial")  # what was finished still counts
        elif not failed and not os.path.exists(result):
            write_text(result, last)  # train.py and pytest write none
        how = "done" if not failed else "stopped" if stopped else "FAILED"
        self.failed += [name] * (how == "FAILED")
        self.say(f"{name}: {how} after {time.monotonic() - start:.0f} s: {last[:160]}")

    def script(self, name, *flags):
        """The command of a script on this device."""
        return [os.path.join(ROOT, name), "--device", self.args.device, *flags]

    def follow(self, variant, seed):
        """Train a run, or continue it; then score it and look for its copying heads."""
        a, run = self.args, f"{variant}-{seed}"
        folder, done, scores = (self.path(name) for name in (
            f"runs/{run}", f"trained-{run}.txt", f"scores-{run}.json"))
        if "train" in a.parts:
            self.job(f"train-{run}", self.script(
                "train.py", "--preset", a.preset, "--dataset", a.tokens, "--out", folder,
                "--no-sample", "--seed", str(seed), "--max_steps", str(a.steps), "--warmup_steps",
                str(a.steps // 20), "--batch_tokens", str(a.windows * self.T), "--micro_batch",
                str(a.windows), "--log_interval", "20", "--eval_interval", "100",
                "--eval_windows", "480", "--save_interval", str(a.steps // 5 + 1), "--keep", "9",
                *read_variant(variant), *self.extra,
                *["--resume"] * os.path.exists(f"{folder}/ckpt.pt")), done, self.reserved)
        if not os.path.exists(done):
            return
        env = {}
        if a.device == "cuda":  # beside a training: else freed memory piles up to tens of GiB
            share = min(1, 24 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
            env["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.2f}"
        if "scores" in a.parts:
            self.job(f"scores-{run}", self.script(
                "eval_sciq.py", "--checkpoint", f"{folder}/ckpt.pt", "--tasks", ",".join(a.tasks),
                "--save_docs", "--json", scores, *(["--data", a.data] if a.data else [])), scores,
                **env)
        if "copying" in a.parts:
            self.job(f"copying-{run}", [__file__, *self.given, "--tokens", a.tokens, "--work",
                                        a.work, "--copying", run],
                     self.path(f"copying-{run}.json"), **env)

    def execute(self):
        """All parts, as far as time allows."""
        a, speed = self.args, self.path("speed", "cost.json")
        finite = a.deadline if a.deadline < math.inf else 0
        self.reserved = 0.2 * finite * ("speed" in a.parts and not os.path.exists(speed))
        models = ["--variants", ",".join(a.variants)]
        if "parity" in a.parts:
            self.job("parity", self.script(
                "experiments/parity.py", *models, "--preset", a.preset, "--windows",
                str(a.windows), "--out", a.work), self.path("parity.json"), 0.85 * finite)
        with ThreadPoolExecutor(a.jobs) as pool:
            runs = [pool.submit(self.follow, v, seed) for seed in a.seeds for v in a.variants]
            if "tests" in a.parts:
                self.job("tests", ["-m", "pytest", "-q", "-n", "4", "--dist", "load", "-k", TESTS,
                                   "--tb", "line", "-p", "no:cacheprovider",
                                   os.path.join(ROOT, "tests", "test_backends.py")],
                         self.path("tests.txt"), self.reserved)
            for run in runs:
                run.result()
        if "speed" in a.parts:
            self.job("speed", self.script(
                "experiments/cost.py", *models, "--presets", a.preset, "--contexts", str(self.T),
                "--tokens", str(a.windows * self.T), "--vocab_size", str(a.vocab_size),
                "--rounds", "20", "--profile", "--out", self.path("speed")), speed)

    def results(self):
        """Every measurement so far, a dict each."""
        def read(*names):
            path = self.path(*names)
            if path := next(filter(os.path.exists, (path, path + ".partial")), None):
                yield read_json(path)

        yield dict(kind="machine") | self.args.machine
        for found in read("parity.json"):
            yield dict(kind="parity", found=found)
        for saved in read("speed", "cost.json"):
            (models,) = saved["results"].values()
            for name, r in models.items():
                yield dict(kind="speed", name=name, windows=self.args.windows, ms=r["ms"][1],
                           ms_quartiles=r["ms"][::2], tokens_per_sec=r["rate"], mfu=r["mfu"],
                           flops_per_token=r["flops"], peak_gib=r["peak"] / 2**30,
                           parameters=r["parameters"], kernels=r["kernels"][:16],
                           busy_ms=sum(ms for ms, _, _ in r["kernels"][:25]))
        runs = sorted(os.listdir(self.path("runs")))
        scores = {run: saved["tasks"] for run in runs for saved in read(f"scores-{run}.json")}
        for run in runs:
            log = read_lines(self.path("runs", run, "log.jsonl"))
            if val := [(e["step"], e["val_loss"]) for e in log if e["val_loss"] is not None]:
                yield dict(kind="curve", run=run, seed=int(run.rpartition("-")[2]), val=val,
                           norms=[(e["step"], e["grad_norm"]) for e in log if e["grad_norm"]],
                           tokens_per_step=self.args.windows * self.T,
                           tokens_per_sec_last=log[-1]["tokens_per_sec"])
            for lines in read(f"copying-{run}.json"):
                yield from (dict(kind="copying") | line for line in lines)
            if run in scores:
                base = scores.get("baseline-" + run.rpartition("-")[2], {})
                yield dict(kind="scores", run=run, step=log[-1]["step"], tasks={
                    name: dict(n=t["n"], acc=t["acc"], acc_norm=t["acc_norm"], se=t["acc_stderr"],
                               minus_baseline=compare(base[name], t) if name in base else None)
                    for name, t in scores[run].items()})

    def write(self):
        """results.jsonl and summary.txt, of what there is."""
        lines, parts = list(self.results()), [str(self.args.machine), "\n".join(self.said)]
        write_text(os.path.join(self.args.out, "results.jsonl"),
                   "".join(json.dumps(line) + "\n" for line in lines))

        def accuracy(t, key):
            gap = t["minus_baseline"] and t["minus_baseline"][key]
            return f"{t[key]:.3f}" + (f" ({gap['difference']:+.3f}, {gap['p']:.2g})" if gap else "")

        def add(kind, heading, row):
            if found := [row(line) for line in lines if line["kind"] == kind]:
                parts.append(table([heading, *found]))

        add("speed", ("speed", "ms", "quartiles", "tokens/s", "MFU", "peak GiB"), lambda r: (
            r["name"], f"{r['ms']:.2f}", "{:.2f} {:.2f}".format(*r["ms_quartiles"]),
            f"{r['tokens_per_sec']:,.0f}", f"{r['mfu']:.1%}" if r["mfu"] else "",
            f"{r['peak_gib']:.2f}"))
        add("curve", ("run", "step", "val loss", "before"), lambda r: (
            r["run"], r["val"][-1][0], f"{r['val'][-1][1]:.4f}",
            " ".join(f"{step}:{loss:.3f}" for step, loss in r["val"][-6:-1])))
        add("scores", ("run", "accuracy, normalised (minus the baseline's, p)"), lambda r: (
            r["run"], "  ".join(f"{name} {accuracy(t, 'acc')} {accuracy(t, 'acc_norm')}"
                                for name, t in r["tasks"].items())))
        columns = ("repeated", "changed", "new", "twice", "head", "uniform")
        add("copying", ("run", "step", *columns), lambda r: (
            r["run"], r["step"], *(f"{r[name]:.3f}" for name in columns)))
        parts.append(f"Up to {self.args.jobs} trainings share the device: the tokens per second in "
                     "their logs are no measure of speed.")
        write_text(os.path.join(self.args.out, "summary.txt"), "\n\n".join(parts) + "\n")


def unpack(path, work):
    """The folder of a dataset; one that is packed is unpacked in the folder work."""
    if not path.endswith(".tar.xz"):
        return path
    folder = os.path.join(work, "tokens")
    if not os.path.exists(os.path.join(folder, "meta.json")):
        try:
            with tarfile.open(path) as packed, new_folder(folder) as unpacked:
                for member in filter(tarfile.TarInfo.isfile, packed):
                    member.name = os.path.basename(member.name)
                    packed.extract(member, unpacked, filter="data")
        except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
            raise UserError(f"{path} cannot be unpacked ({error}): pack the folder of a dataset "
                            "with tar -cJf") from error
    return folder


def parse_args():
    given, extra = split_argv(sys.argv[1:])
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tokens", required=True, help="a dataset's folder, or FOLDER.tar.xz")
    add("--data", help="folder of the tasks' files (default: the hub); it may also have tiktoken, "
        "tiktoken's cache, and commit, a file with the code's commit for a machine without git")
    add("--parts", type=listed(one_of(PARTS)), default=PARTS,
        help=f"of {','.join(PARTS)} (default: all)")
    add("--variants", type=listed(one_of(VARIANTS)), default="baseline,self,separate,shared",
        help="of compare.py, the baseline first (default: baseline,self,separate,shared)")
    add("--seeds", type=listed(whole), default="1", help="a list, such as 1,2 (default: 1)")
    add("--steps", type=positive_int, default=1760, help="steps of each run (default: 1760)")
    add("--windows", type=positive_int, default=32, help="sequences per step (default: 32)")
    add("--preset", choices=PRESETS, default="pythia-70m", help="(default: pythia-70m)")
    add("--tasks", type=listed(one_of(TASKS)), default="sciq,arc_easy,piqa",
        help=f"of {', '.join(TASKS)} (default: sciq,arc_easy,piqa)")
    add("--deadline", type=number(float, 30), default=math.inf, help="seconds, 30 at least; work "
        "ends 20 s before, to save what there is (default: none)")
    add("--jobs", type=positive_int, default=2, help="training runs at a time (default: 2)")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="(default: cuda)")
    add("--out", default="out/gpu", help="folder for the results (default: out/gpu)")
    add("--work", help="folder of checkpoints, 5 GB a run (default: nanonexus-gpu in /dev/shm if "
        "30 GB are free there, else where temporary files are)")
    add("--copying", metavar="RUN", help=argparse.SUPPRESS)  # only this run's, in this process
    args = parser.parse_args(given)
    if args.work is None:
        large = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 30e9
        args.work = os.path.join("/dev/shm" if large else tempfile.gettempdir(), "nanonexus-gpu")
    check_extra(extra, args.variants, OWN + ["device", "batch_tokens"])
    return args, given, extra


def main():
    began = time.monotonic()
    args, given, extra = parse_args()
    for folder in (args.out, os.path.join(args.work, "log"), os.path.join(args.work, "runs")):
        output_folder(folder)
    check_device(args.device)
    args.tokens = unpack(args.tokens, args.work)
    tokens = Dataset(args.tokens)
    args.vocab_size = tokens.vocab_size
    if args.copying:
        return copying(args, args.copying)
    settings = dict(preset=args.preset, data=tokens.fingerprint, steps=args.steps, extra=extra,
                    windows=args.windows, tasks=args.tasks, device=args.device)
    source = COMMIT
    if source is None and os.path.exists(path := os.path.join(args.data or "", "commit")):
        with open(path, encoding="utf-8") as f:
            source = f.read().strip()
    args.machine = settings | dict(commit=source, torch=str(torch.__version__),
                                   date=time.strftime("%Y-%m-%d"))
    if args.device == "cuda":
        args.machine |= dict(device=torch.cuda.get_device_name(),
                             cudnn=torch.backends.cudnn.version())
    env = dict(PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false",
               TORCHINDUCTOR_COMPILE_THREADS="6",
               TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD="1",
               TORCHINDUCTOR_CACHE_DIR=os.path.abspath(os.path.join(args.work, "inductor")))
    os.environ.update(env | os.environ)
    if os.path.isdir(cache := os.path.join(args.data or "", "tiktoken")):
        os.environ["TIKTOKEN_CACHE_DIR"] = cache  # the machine's own may be empty
    if "scores" in args.parts:  # fail now, not after a training
        get_tokenizer(tokens.tokenizer, tokens.tokenizer_json)
        for task in args.tasks:
            read_task(task, args.data)
    check_settings(args.work, settings, "--work")
    session = Session(args, given, extra, began)
    session.say(f"{args.machine['device']}; logs and checkpoints in {args.work}")
    session.execute()
    session.say("end")
    with tarfile.open(os.path.join(args.out, "details.tar.gz"), "w:gz") as packed:
        for pattern in ("log/*", "runs/*/log.jsonl", "*.json"):
            for path in glob.glob(os.path.join(args.work, pattern)):
                packed.add(path, os.path.relpath(path, args.work))
    if session.failed:
        raise UserError(f"failed: {', '.join(session.failed)}; see {args.work}/log and repeat the "
                        "command")


if __name__ == "__main__":
    run_script(main)
