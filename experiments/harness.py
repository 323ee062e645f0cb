"""
Does eval_sciq.py give lm-evaluation-harness's numbers, choice by choice, and how much faster?

    python experiments/harness.py --checkpoint EleutherAI/pythia-70m --data DIR --limit 200
    python experiments/harness.py --checkpoint untrained.pythia-70m:DIR --data DIR
    python experiments/harness.py --quick

Scores the same documents with both in one run, alternating (ours, theirs, ours, theirs), and prints
the largest difference of a log-likelihood, the accuracies, and the ratio of the times. --data is a
folder with <task>_<split>.jsonl files. untrained.PRESET:DIR is a random model of that size with the
tokenizer.json of DIR. Needs the extras hf and test.
"""

import os
import shutil
import statistics
import tempfile
import time

import torch

import common  # noqa: F401

from model import PRESETS
from nanonexus.cli import Parser, UserError, positive_int, run_script
from nanonexus.device import keep_freed_memory
from nanonexus.lm_eval_adapter import score_documents, write_tasks
from nanonexus.scoring import Scorer, evaluate
from nanonexus.tasks import BENCHMARKS, HERE, read_task
from nanonexus.tokenizer import EOT, train_bpe


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", help="GPT-NeoX folder, hub name, or untrained.PRESET:DIR")
    add("--data", help="folder with <task>_<split>.jsonl files")
    add("--tasks", default="sciq", help=f"a list of {', '.join(BENCHMARKS)} (default: sciq)")
    add("--limit", type=positive_int, default=200, help="documents of each task (default: 200)")
    add("--batch_size", type=positive_int, default=16,
        help="of the harness (default: 16); ours is auto")
    add("--rounds", type=positive_int, default=2,
        help="how often each is run (default: 2)")
    add("--quick", action="store_true", help="an untrained model of a few layers, on the demo's "
        "questions: under a minute, nothing to download")
    args = parser.parse_args()
    args.tasks = args.tasks.split(",")
    if unknown := set(args.tasks) - set(BENCHMARKS):
        parser.error(f"no task {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    if not args.quick and not (args.checkpoint and args.data):
        parser.error("give --checkpoint and --data, or --quick")
    return args


def main():
    args = parse_args()
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("this needs the harness: pip install -e '.[hf,test]'") from error

    keep_freed_memory()  # for both
    seconds = {"ours": [], "the harness": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        if args.quick:
            set_up_quick(args, out)
        elif args.checkpoint.startswith("untrained."):
            args.checkpoint = untrained(args.checkpoint, os.path.join(out, "model"))
        write_tasks(args.tasks, args.data, out)
        docs = {task: read_task(task, args.data, args.limit)[0] for task in args.tasks}
        ours = Scorer(args.checkpoint)
        theirs = HFLM(pretrained=args.checkpoint, device="cpu", dtype="float32",
                      batch_size=args.batch_size)
        for _ in range(args.rounds):
            start = time.perf_counter()
            mine = {task: evaluate(ours, task, docs[task]) for task in args.tasks}
            middle = time.perf_counter()
            results, samples = score_documents(theirs, args.tasks, out, args.limit)
            seconds["ours"].append(middle - start)
            seconds["the harness"].append(time.perf_counter() - middle)

    for task in args.tasks:
        print_task(task, mine[task], results[task], samples[task])
    for name, times in seconds.items():
        print(f"{name}: {', '.join(f'{t:.1f}' for t in times)} s")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
          f"{max(ratios):.2f})")


def set_up_quick(args, out):
    """Put what --quick scores into the folder out, and into args: a tiny model, a BPE of the demo's
    text, and its questions as SciQ's."""
    args.tasks, args.data, args.checkpoint = ["sciq"], out, os.path.join(out, "model")
    questions = shutil.copy(os.path.join(HERE, "demo_test.jsonl"),
                            os.path.join(out, "sciq_test.jsonl"))
    with open(questions, encoding="utf-8") as f:
        tokenizer_json = train_bpe(f, PRESETS["tiny"]["vocab_size"])
    save_untrained("tiny", tokenizer_json, args.checkpoint)


def untrained(name, out):
    """The random model of untrained.PRESET:DIR, saved to the folder out; returns out."""
    preset, _, folder = name.removeprefix("untrained.").partition(":")
    if preset not in PRESETS:
        raise UserError(f"{name}: no preset {preset!r}, choose from {', '.join(PRESETS)}")
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"no {path}: an untrained model needs an existing tokenizer")
    with open(path, encoding="utf-8") as f:
        save_untrained(preset, f.read(), out)
    return out


def save_untrained(preset, tokenizer_json, out):
    """A random GPT-NeoX of a preset's size, with a tokenizer, saved by transformers to out."""
    from tokenizers import Tokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    c = {"vocab_size": 50304} | PRESETS[preset]
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=c["vocab_size"], hidden_size=c["n_embd"], num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"], intermediate_size=4 * c["n_embd"])).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json),
                            eos_token=EOT).save_pretrained(out)


def print_task(task, ours, theirs, samples):
    """Ours: evaluate's entry. theirs, samples: the harness's metrics and documents."""
    pairs = list(zip(ours["docs"], samples, strict=True))
    worst = max(abs(a - b) for doc, (lls, _, _) in pairs
                for a, b in zip(doc["lls"], lls, strict=True))
    differ = sum((doc["acc"], doc["acc_norm"]) != tuple(hits) for doc, (_, *hits) in pairs)
    print(f"{task}: {len(pairs)} documents, log-likelihoods differ by {worst:.1e} at most, "
          f"{differ} documents scored differently\n"
          f"  ours        acc {ours['acc']:.4f}  acc_norm {ours['acc_norm']:.4f}\n"
          f"  the harness acc {theirs['acc,none']:.4f}  acc_norm {theirs['acc_norm,none']:.4f}")


if __name__ == "__main__":
    run_script(main)
