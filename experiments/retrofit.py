"""
What does Nexus do to a pretrained decoder, at once and after fine-tuning?

    python experiments/retrofit.py --text 'books/*.txt.xz' --data DATA    # SmolLM2-135M-Instruct
    python experiments/retrofit.py --model FOLDER --text books.txt --data DATA --parts loss,scores
    python experiments/retrofit.py --show

Four parts, in the order of --parts; --model is a transformers folder or a name on the hub.

- loss: the loss on held-out text for each map, stream, order and gate, without any training, on
  pieces of about 450 tokens.
- scores: the same models on zero-shot tasks, by eval_sciq.py's rules, paired with the original.
- text: `finetune.py sft` continues training on --text, every variant on the same pieces in the same
  order; then the loss on held-out text, the tasks, and the gates of each layer.
- answers: `finetune.py sft` on questions and answers of SciQ's validation rows; then its test rows.

Before text and answers the learning rate is chosen from --lrs by runs of the control, order 1, of a
quarter of the steps on seed 1000. Each finished measurement appends one line to --results and is
never made again while that line is there; the same command continues. --show prints the tables.
"""

import collections
import functools
import glob
import hashlib
import json
import operator
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace

import torch
import torch.nn.functional as F
from compare import LR_SEED
from retrofit_tables import change_rows, plot, run_rows
from runs import check_settings, in_parallel, source
from tqdm import tqdm

from common import ROOT, parse, pyplot, save, table

from finetune import read_examples
from model import ModelError
from nanonexus.cli import Parser, UserError, listed, one_of, positive_int, rate, run_script
from nanonexus.decoder import is_gpt
from nanonexus.device import check_device, keep_freed_memory
from nanonexus.files import append_line, output_file, read_json, read_lines, sha256, write_text
from nanonexus.hf import fetch, weight_files
from nanonexus.retrofit import INNERS
from nanonexus.scoring import Scorer, evaluate
from nanonexus.tasks import TASKS, read_task
from prepare_data import documents


def change(inner, streams, order, gate):
    """The name of a retrofit without training."""
    return (f"{inner} on {streams}" + f", order {order}" * (order > 2)
            + (f", gate {gate}" if gate else ""))


ORIGINAL = "order 1"
CHANGES = {ORIGINAL: dict(nexus_order=1)} | {  # name -> overrides of Scorer, the plainest first
    change(inner, streams, order, gate): dict(nexus_order=order, inner=inner, streams=streams,
                                              gate=gate)
    for gate in (None, 0.25) for order in (2, 3) for streams in ("qk", "k", "q")
    for inner in INNERS if inner != "shift" or streams == "k"}
VARIANTS = {  # name -> flags of finetune.py sft
    "control": "--order 1",
    "self": "--inner self",
    "self-gated": "--inner self --gate 0",
    "tokens-gated": "--inner tokens --gate 0",
    "cross-k": "--inner cross --streams k",
    "cross-k-gated": "--inner cross --streams k --gate 0",
    "key-shift-gated": "--inner shift --streams k --gate 0",
}
PIECE = 2000  # characters of a piece of text, about 450 tokens
LENGTH = 4096  # tokens of an example, at most
IDENTITY = {  # part -> what makes its lines other lines: names and hashes of the data, and flags
    "loss": ["model", "text", "pieces"], "scores": ["model", "tasks", "limit", "dtype"],
    "text": ["model", "text", "pieces", "tasks", "limit", "steps", "batch", "lrs", "dtype"],
    "answers": ["model", "sciq", "pieces", "limit", "answer_steps", "batch", "lrs", "dtype"]}


def pieces(args):
    """(to train on, held out): pieces of PIECE characters and the rest of their paragraph, of the
    documents of --text; every tenth document is held out. UserError if they are too few."""
    found, i = ([], []), 0
    source = Namespace(dataset="text", input=args.text, text_field=None)
    for i, text in enumerate(documents(source, collections.Counter())[0], 1):
        piece, own = "", found[i % 10 == 0]
        for paragraph in text.split("\n"):
            piece += paragraph + "\n"
            if len(piece) > PIECE:
                own.append(piece[:2 * PIECE])
                piece = ""
    train, held = found
    needed = args.steps * args.batch
    if len(train) < needed or len(held) < args.pieces:
        raise UserError(f"--text has {len(train)} pieces to train on and {len(held)} in every "
                        f"tenth of its {i} documents (<|endoftext|> ends one): {needed} and "
                        f"{args.pieces} are needed")
    return (random.Random(0).sample(train, needed),
            [held[i * len(held) // args.pieces] for i in range(args.pieces)])


def label(name, *files):
    """The last part of a path and the sha256 of the files behind it, shortened."""
    digest = "".join(map(sha256, files))
    if len(files) > 1:
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return f"{os.path.basename(os.path.normpath(name))} {digest[:12]}"


def identify(args):
    """What --model, --text and --data hold, {name in IDENTITY: labels}; all of it can be read."""
    needed = {name for part in args.parts for name in IDENTITY[part]}
    found = dict(model=label(args.model, *weight_files(fetch(args.model))))
    if "text" in needed:
        found["text"] = [label(path, path) for pattern in args.text
                         for path in sorted(glob.glob(pattern)) or [pattern]]
    if "tasks" in needed:
        found["tasks"] = {task: read_task(task, args.data)[1][:12] for task in args.tasks}
    if "sciq" in needed:
        found["sciq"] = [read_task("sciq", args.data, split=split)[1][:12]
                         for split in ("validation", None)]
    return found


def write_data(args, results):
    """The files that finetune.py and the losses read: each part's train.jsonl and held.jsonl."""
    data = {}  # part -> (to train on, held out)
    if {"loss", "text"} & {*args.parts}:
        data["loss"] = data["text"] = [[("", text) for text in texts] for texts in pieces(args)]
    if "answers" in args.parts:
        docs, _ = read_task("sciq", args.data, split="validation")
        rows = [(doc.context, " " + doc.choices[doc.gold]) for doc in docs]
        n = len(rows) * 4 // 5
        data["answers"] = rows[:n], rows[n:][:args.pieces]
    for part in data.keys() & {*args.parts}:
        os.makedirs(folder := results.folder(part), exist_ok=True)
        for name, rows in zip(("train", "held"), data[part], strict=True):
            write_text(os.path.join(folder, name + ".jsonl"), "".join(
                json.dumps(dict(prompt=prompt, answer=answer)) + "\n" for prompt, answer in rows))


@torch.no_grad()
def losses(model, examples):
    """(the mean loss of each example, that of all tokens), nats per token."""
    from transformers import DataCollatorWithFlattening

    collate, found, sizes = DataCollatorWithFlattening(), [], []
    for example in examples:
        row = {name: x.to(model.device) for name, x in collate([example]).items()
               if isinstance(x, torch.Tensor)}
        labels = row.pop("labels")[0, 1:]
        logits = model(**row, use_cache=False).logits[0, :-1].float()
        found.append(F.cross_entropy(logits, labels).item())
        sizes.append((labels >= 0).sum().item())
    return found, sum(map(operator.mul, found, sizes)) / sum(sizes)


@functools.cache  # for all models of a call
def read_held_out(model, path):
    from transformers import AutoTokenizer

    return read_examples(path, AutoTokenizer.from_pretrained(fetch(model)), LENGTH)


def held_out(scorer, args, folder):
    """A Scorer's losses on a part's held-out examples: of each one, and of all tokens."""
    examples = read_held_out(args.model, os.path.join(folder, "held.jsonl"))
    alone, loss = losses(scorer.model.model, examples)
    return dict(losses=alone, loss=loss)


def score(scorer, tasks, args):
    """{task: a string of 1 and 0, whether each document is answered right (acc)}"""
    return dict(scores={task: "".join(str(int(doc["acc"])) for doc in evaluate(
        scorer, task, read_task(task, args.data, args.limit)[0])["docs"]) for task in tasks})


class Results:
    """The file of lines, {(part, variant, seed, lr): line} of those with today's settings."""

    def __init__(self, args, data):
        self.args, self.data, self.path, self.found = args, data, args.results, {}
        for line in read_lines(args.results, "part", "variant", "seed", "lr", "settings"):
            if args.show or line["settings"] == self.settings(line["part"]):
                key = line["part"], line["variant"], line["seed"], line["lr"]
                one, other = line["settings"], self.found.setdefault(key, line)["settings"]
                if wrong := {n for n in one.keys() | other if one.get(n) != other.get(n)}:
                    raise UserError(f"{self.path} has lines of several settings, which differ in "
                                    f"{', '.join(sorted(wrong))}: keep only one's")
        self.source = source(() if args.show else self.found.values())

    def settings(self, part):
        return {name: self.data.get(name, getattr(self.args, name, None))
                for name in IDENTITY[part]}

    def folder(self, part):
        """Where a part's data and runs are: one for each of its settings."""
        text = json.dumps(self.settings(part), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return os.path.join(self.args.out, f"{part}-{digest[:8]}")

    def add(self, part, variant, seed=None, lr=None, **measured):
        line = dict(part=part, variant=variant, seed=seed, lr=lr, **measured,
                    settings=self.settings(part), **self.source, torch=torch.__version__)
        self.found[part, variant, seed, lr] = line
        append_line(self.path, line)

    def final(self, part, variant):
        """{seed: line} of a part's runs that count."""
        return {seed: line for (p, v, seed, _), line in self.found.items()
                if (p, v) == (part, variant) and seed != LR_SEED}


def measure_changes(args, results, part):
    names = [name for name in CHANGES
             if not args.quick or name == ORIGINAL or name.endswith(" on k")]
    left = [name for name in names if (part, name, None, None) not in results.found]
    for name in tqdm(left, desc=part, disable=None):
        try:
            scorer = Scorer(args.model, args.device, args.dtype, **CHANGES[name])
        except ModelError as error:  # `tokens` does not fit every model
            if name == ORIGINAL:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        results.add(part, name, **held_out(scorer, args, results.folder(part)) if part == "loss"
                    else score(scorer, args.tasks, args))


def finetune(args, place, variant, seed, lr, steps):
    """The folder of one finished run of finetune.py sft, which continues if it was stopped.
    UserError if it fails."""
    folder = os.path.join(place, f"{variant}-seed{seed}-lr{lr:g}")
    if not os.path.exists(os.path.join(folder, "trainer_state.json")):
        resume = bool(glob.glob(os.path.join(folder, "checkpoint-*", "trainer_state.json")))
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        argv = [sys.executable, os.path.join(ROOT, "finetune.py"), "sft", "--model", args.model,
                "--data", os.path.join(place, "train.jsonl"), "--out", folder, "--max_steps",
                str(steps), "--batch", "1", "--accumulate", str(args.batch), "--lr", str(lr),
                "--seed", str(seed), "--log_interval", "5", "--save_interval", "20",
                "--max_length", str(LENGTH), "--device", args.device, "--dtype", args.dtype,
                *VARIANTS[variant].split(), *["--resume"] * resume]
        threads = {} if args.jobs == 1 else dict(OMP_NUM_THREADS="1")
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace",
                              env=os.environ | threads)
        if done.returncode == 130:  # Ctrl-C has reached it before this process
            raise KeyboardInterrupt
        if done.returncode:
            raise UserError(f"{' '.join(argv)} failed: {done.stderr[-500:]}")
    return folder


def measure_run(args, part, folder, final):
    """What goes into a run's line, from the folder of finetune."""
    scorer = Scorer(folder, args.device, args.dtype)
    log = read_json(os.path.join(folder, "trainer_state.json"))["log_history"]
    gates = [p.flatten().tolist() for name, p in scorer.model.named_parameters()
             if "nexus_gate" in name]  # of each layer, its heads
    measured = held_out(scorer, args, os.path.dirname(folder)) | dict(
        gates=gates, curve=[(e["step"], e["loss"]) for e in log if "loss" in e])
    if final:
        measured |= score(scorer, args.tasks if part == "text" else ["sciq"], args)
    return measured


def tune(args, results, part):
    """The runs of a part: first those that choose the rate, then a run per seed and variant."""
    steps = args.steps if part == "text" else args.answer_steps

    def execute(jobs, steps, final):
        def finish(job):
            folder = finetune(args, results.folder(part), *job, steps)
            return folder, measure_run(args, part, folder, final)

        jobs = [job for job in jobs if (part, *job) not in results.found]
        with tqdm(total=len(jobs), desc=part, disable=None) as bar:
            for job, (folder, measured) in in_parallel(finish, jobs, args.jobs):
                results.add(part, *job, **measured)
                shutil.rmtree(folder)  # 2 GB and more
                bar.update()

    grid = [("control", LR_SEED, lr) for lr in args.lrs] if len(args.lrs) > 1 else []
    execute(grid, max(1, steps // 4), final=False)
    lr = min(grid, key=lambda job: results.found[(part, *job)]["loss"])[2] if grid else args.lrs[0]
    execute([(name, seed, lr) for seed in range(args.seeds) for name in args.variants], steps,
            final=True)


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a transformers folder or a "
        "name on the hub (default: HuggingFaceTB/SmolLM2-135M-Instruct)")
    add("--text", nargs="+", metavar="FILE", help="text files or globs, with ten documents or more "
        "(<|endoftext|> between them); every tenth is held out")
    add("--data", metavar="DIR", help="folder with <task>_<split>.jsonl files (default: the hub)")
    add("--parts", type=listed(one_of(IDENTITY)), default=list(IDENTITY),
        help=f"of {', '.join(IDENTITY)} (default: all)")
    add("--variants", type=listed(one_of(VARIANTS)),
        default=["control", "self", "self-gated", "cross-k-gated", "key-shift-gated"],
        help=f"to fine-tune, of {', '.join(VARIANTS)} (default: control,self,self-gated,"
        "cross-k-gated,key-shift-gated)")
    add("--seeds", type=positive_int, default=2, help="runs of each (default: 2)")
    add("--tasks", type=listed(one_of(TASKS)), default=["sciq", "arc_easy", "piqa"],
        help=f"of {', '.join(TASKS)} (default: sciq,arc_easy,piqa)")
    add("--limit", type=positive_int, default=500, help="documents of each task (default: 500)")
    add("--pieces", type=positive_int, default=24, help="held-out examples (default: 24)")
    add("--steps", type=positive_int, default=140, help="on text (default: 140, 250,000 tokens)")
    add("--answer_steps", type=positive_int, default=200, help="steps of training on answers (200)")
    add("--batch", type=positive_int, default=4, help="examples in a step (default: 4)")
    add("--lrs", type=listed(rate), default=[1e-5, 1e-4], help="learning rates to choose from "
        "(default: 1e-5,1e-4)")
    add("--jobs", type=positive_int, default=1, help="runs in parallel, each with one thread if "
        "more than 1 (default: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the products in "
        "training and scoring (default: bfloat16; a CPU without AVX-512 BF16: float32 is faster)")
    add("--quick", action="store_true", help="few maps, pieces, documents and steps: some minutes")
    add("--out", default="out/retrofit", help="folder (default: out/retrofit)")
    add("--results", help="file to which each finished measurement appends a line (default: "
        "OUT/results.jsonl)")
    add("--show", action="store_true", help="only print the tables of the lines in --results")
    return parser


def main():
    args = parse(build_parser())
    if args.quick:
        args.pieces, args.limit, args.steps, args.answer_steps, args.seeds = 2, 4, 2, 2, 1
        args.lrs, args.batch = args.lrs[-1:], 1
    args.results = args.results or os.path.join(args.out, "results.jsonl")
    if args.show and not os.path.exists(args.results):
        raise UserError(f"no file {args.results} to --show: give --results FILE")
    plt = pyplot(args.out)
    if args.show:
        results = Results(args, {})
    else:
        if not args.text and {"loss", "text"} & {*args.parts}:
            raise UserError("the parts loss and text need --text FILE: plain text")
        check_device(args.device)
        keep_freed_memory()
        output_file(args.results)
        if is_gpt(fetch(args.model)):
            raise UserError(f"{args.model} is a GPT-NeoX, or no model: choose a Llama or a Qwen2")
        check_settings(args.out, {})
        results = Results(args, identify(args))
        write_data(args, results)
        for part in args.parts:
            (measure_changes if part in ("loss", "scores") else tune)(args, results, part)
    for rows in (change_rows(results, CHANGES), *(
            run_rows(results, part, VARIANTS) for part in ("text", "answers"))):
        if len(lines := list(rows)) > 1:
            print(f"\n{table(lines)}")
    print("\nloss in nats per token; minus ... is a mean over held-out examples, with a paired t "
          "test; p after an accuracy is McNemar's")
    save(args, "retrofit", list(results.found.values()), plot(plt, results, CHANGES, VARIANTS))


if __name__ == "__main__":
    run_script(main)
