"""
Does eval_sciq.py give lm-evaluation-harness's numbers, choice by choice, and how much faster?

    python experiments/harness.py --checkpoint EleutherAI/pythia-70m --data DIR --limit 200
    python experiments/harness.py --checkpoint untrained.pythia-70m:DIR --data DIR

Scores the same documents with both, in one run and in turn (ours, theirs, ours, theirs), and prints
the largest difference of a log-likelihood, the accuracies, and the ratio of the times. --data is a
folder with <task>_<split>.jsonl files. untrained.PRESET:DIR is a random model of that size with the
tokenizer.json of DIR. Needs the extras hf and test.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

from eval_sciq import TASKS, Scorer, evaluate, read_task  # noqa: E402
from model import PRESETS  # noqa: E402
from nanonexus.cli import Parser, UserError, run_script  # noqa: E402
from nanonexus.device import keep_freed_memory  # noqa: E402


def write_tasks(tasks, data, out):
    """The harness's own task files, pointed at local data, under the names ours_<task>."""
    import lm_eval

    packaged = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
    for task in tasks:
        kind, split = "arc" if task.startswith("arc") else task, TASKS[task][2]
        unused = "".join(f"{other}_split: null\n" for other in ("training", "validation", "test")
                         if other != split)
        with open(os.path.join(out, f"{task}.yaml"), "w", encoding="utf-8") as f:
            f.write(f"include: {packaged}/{kind}/{task}.yaml\ntask: ours_{task}\n{unused}"
                    f"{split}_split: {split}\ndataset_path: json\ndataset_name: null\n"
                    f"dataset_kwargs:\n  cache_dir: {out}\n  data_files:\n"
                    f"    {split}: {os.path.abspath(data)}/{task}_{split}.jsonl\n")


def harness_scores(model, tasks, files, limit=None):
    """By the harness's model (an HFLM): {task: [(log-likelihoods, acc, acc_norm) of a document]},
    and {task: its metrics}; files is the folder that write_tasks filled."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model, tasks=[f"ours_{task}" for task in tasks], bootstrap_iters=1, limit=limit,
        task_manager=TaskManager(include_path=str(files), include_defaults=False))
    samples = {}
    for task in tasks:
        docs = sorted(results["samples"][f"ours_{task}"], key=lambda doc: doc["doc_id"])
        samples[task] = [([float(ll) for ll, _ in doc["filtered_resps"]], doc["acc"],
                          doc["acc_norm"]) for doc in docs]
    return samples, {task: results["results"][f"ours_{task}"] for task in tasks}


def untrained(preset, tokenizer_folder, out):
    """A random GPT-NeoX of a preset's size, saved by transformers with somebody's tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    c = PRESETS[preset]
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=50304, hidden_size=c["n_embd"], num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"], intermediate_size=4 * c["n_embd"])).save_pretrained(out)
    path = os.path.join(tokenizer_folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"no {path}: an untrained model needs somebody's tokenizer")
    PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|endoftext|>").save_pretrained(out)
    return out


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="GPT-NeoX folder, hub name, or untrained.PRESET:DIR")
    add("--data", required=True, help="folder with <task>_<split>.jsonl files")
    add("--tasks", default="sciq", help=f"a list of {', '.join(list(TASKS)[:6])} (default: sciq)")
    add("--limit", type=int, default=200, help="documents of each task (default: 200)")
    add("--batch_size", type=int, default=16, help="of the harness (default: 16); ours is auto")
    add("--rounds", type=int, default=2, help="how often both take their turn (default: 2)")
    args = parser.parse_args()
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("this needs the harness: pip install -e '.[hf,test]'") from error

    keep_freed_memory()  # for both
    tasks, out = args.tasks.split(","), tempfile.mkdtemp()
    try:
        if args.checkpoint.startswith("untrained."):
            preset, folder = args.checkpoint.removeprefix("untrained.").split(":", 1)
            args.checkpoint = untrained(preset, folder, os.path.join(out, "model"))
        write_tasks(tasks, args.data, out)
        docs = {task: read_task(task, args.data, args.limit)[0] for task in tasks}
        ours = Scorer(args.checkpoint)
        theirs = HFLM(pretrained=args.checkpoint, device="cpu", dtype="float32",
                      batch_size=args.batch_size)
        seconds = {"ours": [], "the harness": []}
        for _ in range(args.rounds):
            start = time.perf_counter()
            mine = {task: evaluate(ours, task, docs[task]) for task in tasks}
            middle = time.perf_counter()
            samples, results = harness_scores(theirs, tasks, out, args.limit)
            seconds["ours"].append(middle - start)
            seconds["the harness"].append(time.perf_counter() - middle)
    finally:
        shutil.rmtree(out, ignore_errors=True)

    for task in tasks:
        pairs = list(zip(mine[task]["docs"], samples[task], strict=True))
        worst = max(abs(a - b) for doc, (lls, _, _) in pairs
                    for a, b in zip(doc["lls"], lls, strict=True))
        differ = sum((doc["acc"], doc["acc_norm"]) != tuple(hits) for doc, (_, *hits) in pairs)
        print(f"{task}: {len(pairs)} documents, log-likelihoods differ by {worst:.1e} at most, "
              f"{differ} documents scored otherwise\n  ours        acc {mine[task]['acc']:.4f}  "
              f"acc_norm {mine[task]['acc_norm']:.4f}\n  the harness acc "
              f"{results[task]['acc,none']:.4f}  acc_norm {results[task]['acc_norm,none']:.4f}")
    for name, times in seconds.items():
        print(f"{name}: {', '.join(f'{t:.1f}' for t in times)} s")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
          f"{max(ratios):.2f})")


if __name__ == "__main__":
    run_script(main)
