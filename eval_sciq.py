"""
Zero-shot SciQ and its five related tasks, scored as lm-evaluation-harness scores them.

    python eval_sciq.py --checkpoint out/ckpt.pt --tasks demo            # no network: a smoke test
    python eval_sciq.py --checkpoint EleutherAI/pythia-70m --tasks sciq,piqa
    python eval_sciq.py --checkpoint out/base/ckpt.pt --versus out/nexus/ckpt.pt --tasks all
    python eval_sciq.py --checkpoint HuggingFaceTB/SmolLM2-135M --versus out/retrofitted
    python eval_sciq.py --checkpoint base.json --versus nexus.json      # scored before, --save_docs

For each question the model gives every choice a log-likelihood after the prompt. acc is the
fraction of questions whose correct choice has the highest; acc_norm first divides by the choice's
length in characters. The two are not comparable. Tasks come from the hub, or from --data DIR as
DIR/<task>_<split>.jsonl with the hub's columns. `demo` is 60 questions in SciQ's format written for
this project: it shows that scoring works and is not a benchmark.

A task with a choice that is longer than the model's context is left out before scoring begins, and
its rows are named; it is an error (exit status 2) if no task is left. If scoring is interrupted,
--json has the tasks that were finished.
"""

import os
import platform
import sys

import torch

from nanonexus.cli import Parser, UserError, listed, one_of, positive_int, run_script
from nanonexus.device import check_device, keep_freed_memory
from nanonexus.files import output_file, read_json, reading, write_json
from nanonexus.processes import Stop
from nanonexus.scoring import Scorer, compare, evaluate, summary
from nanonexus.tasks import BENCHMARKS, TASKS, read_task
from nanonexus.tokenizer import printable


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="a ckpt.pt of train.py; a transformers folder "
        "(GPT-NeoX, Llama, Qwen2, ..., retrofitted or not) or its name on the hub, such as "
        "EleutherAI/pythia-70m; or a FILE.json that --json and --save_docs wrote (default: "
        "out/ckpt.pt)")
    add("--versus", metavar="CHECKPOINT", help="a second model: paired differences on the same "
        "documents, with their p-values, and a bar chart")
    add("--tasks", type=listed(one_of(["all", *TASKS])), default="sciq",
        help=f"a list of {', '.join(TASKS)}, or all for the first six (default: sciq)")
    add("--data", metavar="DIR", help="folder with <task>_<split>.jsonl files (default: the hub)")
    add("--limit", type=positive_int, help="only the first N documents of each task")
    add("--batch_size", type=positive_int, help="prompts per batch (default: as many as a bounded "
        "memory holds)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products; "
        "bfloat16 shifts log-likelihoods by up to 0.2 and causes ties (default: float32)")
    add("--nexus_order", type=positive_int, help="run the model at this order instead of its own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write the scores to this file")
    add("--save_docs", action="store_true", help="add each document's log-likelihoods to the JSON")
    add("--plot", metavar="FILE", default="versus.png", help="the chart of --versus (versus.png)")
    args = parser.parse_args()
    if not args.versus:
        parser.refuse(args, ["plot"], "without --versus")
    return args


def main():
    args = parse_args()
    check_device(args.device)
    if args.save_docs and not args.json:
        raise UserError("--save_docs adds to the file of --json FILE: give one")
    if args.device == "cpu":
        keep_freed_memory()
    names = BENCHMARKS if "all" in args.tasks else args.tasks
    if args.data and {*names} == {"demo"}:
        raise UserError("the task demo has its own file: leave out --data")
    for path in filter(None, (args.json, args.versus and args.plot)):
        output_file(path, args.checkpoint, args.versus)
    plt = pyplot(args.plot) if args.versus else None  # fail before scoring
    data = {name: read_task(name, args.data, args.limit) for name in names}
    paths = [args.checkpoint, args.versus] if args.versus else [args.checkpoint]
    entries, scorers = zip(*((read_scores if path.endswith(".json") else start)(path, data, args)
                             for path in paths), strict=True)
    data = leave_out(data, paths, entries)
    with Stop():
        try:
            for path, entry, scorer in zip(paths, entries, scorers, strict=True):
                score(path, entry, scorer, data, args)
        finally:  # whatever ends it, what has been scored is written
            result = report(entries, args)
            if args.json and result["tasks"]:
                write_json(args.json, result)
    if args.versus:
        print_gaps(result["paired"], args)
        plot(plt, entries, args.plot)


def load(path, args):
    overrides = {} if args.nexus_order is None else dict(nexus_order=args.nexus_order)
    scorer = Scorer(path, args.device, args.dtype, args.batch_size, **overrides)
    if scorer.note:
        print(scorer.note, file=sys.stderr)
    return scorer


def start(path, data, args):
    """(a model's entry of the JSON file, no task scored yet; the Scorer that will score them).
    left_out: of each task that cannot be scored, the rows that do not fit the context."""
    scorer = load(path, args)
    misfits = {name: scorer.misfits(docs) for name, (docs, _) in data.items()}
    return dict(checkpoint=scorer.identity, config=vars(scorer.model.config), tasks={},
                left_out={name: rows for name, rows in misfits.items() if rows}), scorer


def read_scores(path, data, args):
    """start's entry, all tasks scored, from a JSON file of an earlier call with --save_docs; None.
    UserError unless it has the same documents, scored in the same dtype."""
    with reading(path, f"it does not have the documents of {', '.join(data)}: score that model "
                 "with the same --tasks, --json FILE and --save_docs"):
        entry = read_json(path)
        left_out = {name: {int(row): int(tokens) for row, tokens in rows.items()}
                    for name, rows in entry.get("left_out", {}).items() if name in data and rows}
        tasks = {name: entry["tasks"][name] | summary(entry["tasks"][name]["docs"])
                 for name in data if name not in left_out}
        same = entry["dtype"] == args.dtype and args.nexus_order in (
            None, entry["config"]["nexus_order"]) and all(
            (task["data_sha256"], len(task["docs"])) == (data[name][1], len(data[name][0]))
            for name, task in tasks.items())
        name = str(entry["checkpoint"]["path"])
        entry = dict(checkpoint=entry["checkpoint"] | dict(path=name), config=entry["config"],
                     tasks=tasks, left_out=left_out)
    if not same:
        raise UserError(f"{path} scored other documents, or in another dtype or order: use the "
                        "same --data, --limit, --dtype and --nexus_order")
    return entry, None


def leave_out(data, paths, entries):
    """data without the tasks that one of the models cannot score, each told in a line; UserError if
    none is left."""
    lines = {}
    for path, entry in zip(paths, entries, strict=True):
        for name, rows in entry["left_out"].items():
            named = ", ".join(map(str, list(rows)[:10])) + ", ..." * (len(rows) > 10)
            lines[name] = (f"{name} is left out: choices of up to {max(rows.values())} tokens "
                           f"exceed the context of {path} in {len(rows)} of its "
                           f"{len(data[name][0])} rows: {named}")
    if len(lines) == len(data):
        raise UserError("; ".join(lines.values()))
    for line in lines.values():
        print(line, file=sys.stderr)
    return {name: task for name, task in data.items() if name not in lines}


def score(path, entry, scorer, data, args):
    """Score the tasks into a model's entry, unless it was read; prints its table line by line.
    data: {task: (documents, sha256)}."""
    model = scorer.description if scorer else entry["checkpoint"]["path"]
    print(f"\n{path}: {model}, {args.dtype}" + ", scored before" * (scorer is None)
          + f"\n{'task':15}{'n':>6}  {'acc':>15}  {'acc_norm':>15}  {'chance':>6}")
    for name, (docs, digest) in data.items():
        if scorer:
            entry["tasks"][name] = evaluate(scorer, name, docs) | dict(
                cut=scorer.cut, data_sha256=digest)
        r = entry["tasks"][name]
        print(f"{name:15}{r['n']:>6}  {r['acc']:.4f} ± {r['acc_stderr']:.4f}"
              f"  {r['acc_norm']:.4f} ± {r['acc_norm_stderr']:.4f}  {r['chance']:6.4f}")


def report(entries, args):
    """The JSON file of one or two entries: documents only with --save_docs, two models paired."""
    left_out = () if args.save_docs else ("docs",)
    first, *second = [entry | dict(tasks={
        name: {key: value for key, value in task.items() if key not in left_out}
        for name, task in entry["tasks"].items()}) for entry in entries]
    result = first | dict(dtype=args.dtype, versions=dict(
        python=platform.python_version(), torch=str(torch.__version__)))
    if second:
        a, b = (entry["tasks"] for entry in entries)
        result |= dict(versus=second[0], paired={name: compare(a[name], b[name])
                                                 for name in a if name in b})
    return result


def print_gaps(paired, args):
    print(f"\n{args.versus} minus {args.checkpoint}, paired by document\n"
          f"{'task':15}{'acc':>19}  {'p':>7}{'acc_norm':>21}  {'p':>7}")
    for name, gap in paired.items():
        print(f"{name:15}" + "  ".join(f"{g['difference']:+10.4f} ± {g['stderr']:.4f}  "
                                       f"{g['p']:7.2g}" for g in gap.values()))


def pyplot(path):
    """matplotlib's pyplot, drawing to files; UserError if it cannot draw one called path."""
    try:
        import matplotlib
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError(f"{error}: --versus draws a chart, pip install -e '.[plots]'") from error
    known, suffix = FigureCanvasBase.get_supported_filetypes(), os.path.splitext(path)[1]
    if suffix and suffix[1:].lower() not in known:
        raise UserError(f"--plot {path}: no such kind of picture, choose from {', '.join(known)}")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(plt, entries, path):
    """Bars of acc with their standard errors, a pair for each task, and a dash at chance."""
    names = list(entries[0]["tasks"])
    figure, axes = plt.subplots(figsize=(1.6 * len(names) + 2.5, 4))
    for shift, entry in zip((-0.2, 0.2), entries, strict=True):
        tasks = entry["tasks"].values()
        axes.bar([i + shift for i in range(len(names))], [t["acc"] for t in tasks], 0.4,
                 yerr=[t["acc_stderr"] for t in tasks], capsize=3,
                 label=printable(entry["checkpoint"]["path"]))
    for i, name in enumerate(names):
        axes.plot([i - 0.4, i + 0.4], [entries[0]["tasks"][name]["chance"]] * 2, "k--", lw=1)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="acc (dashes: chance)")
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # a path may have dollars
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
