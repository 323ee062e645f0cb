"""
Zero-shot SciQ and its five related tasks, scored as lm-evaluation-harness scores them.

    python eval_sciq.py --checkpoint out/ckpt.pt --tasks demo            # no network: a smoke test
    python eval_sciq.py --checkpoint EleutherAI/pythia-70m --tasks sciq,piqa
    python eval_sciq.py --checkpoint out/base/ckpt.pt --versus out/nexus/ckpt.pt --tasks all
    python eval_sciq.py --checkpoint out/ckpt.pt --lm_eval --tasks lambada_openai,winogrande

For each question the model gives every choice a log-likelihood after the prompt. acc counts the
questions whose right choice has the highest; acc_norm divides by the choice's length in characters
first. Never compare one with the other. Tasks come from the hub, or from --data DIR as
DIR/<task>_<split>.jsonl with the hub's columns. `demo` is 60 questions in SciQ's format written for
this project: it shows that scoring works, and is no benchmark.
"""

import difflib
import hashlib
import json
import math
import os
import platform
import re
import statistics
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm

from model import GPT
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import Parser, UserError, run_script
from nanonexus.data import load_hub
from nanonexus.device import check_device, keep_freed_memory
from nanonexus.files import sha256
from nanonexus.generate import KVCache
from nanonexus.tokenizer import get_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))


# --- the tasks: a row of the data set -> prompt, choices, index of the right one -----------------

class Doc(NamedTuple):
    context: str
    choices: list  # of str
    gold: int


def sciq(row):
    return Doc(row["support"].lstrip() + "\nQuestion: " + row["question"] + "\nAnswer:",
               [row[f"distractor{i}"] for i in (1, 2, 3)] + [row["correct_answer"]], 3)


def arc(row):
    labels = row["choices"]["label"]  # A to E, or 1 to 5
    return Doc(f"Question: {row['question']}\nAnswer:", row["choices"]["text"],
               labels.index(row["answerKey"]))


def hellaswag(row):
    def clean(text):  # the order matters: strip() first, and one pass over double spaces
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()  # which lower-cases the rest
    return Doc(clean(row["activity_label"] + ": " + context), [clean(e) for e in row["endings"]],
               int(row["label"]))


def logiqa(row):
    options = "".join(f"{letter}. {option}\n"
                      for letter, option in zip("ABCD", row["options"], strict=True))
    return Doc(f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n{options}"
               "Answer:", row["options"], "abcd".index(row["label"].strip()))


def piqa(row):
    return Doc(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


TASKS = {  # name -> (hub repository, its configuration, split, how to read a row)
    "sciq": ("allenai/sciq", None, "test", sciq),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag),
    "logiqa": ("EleutherAI/logiqa", "logiqa", "test", logiqa),
    "piqa": ("baber/piqa", None, "validation", piqa),
    "demo": (None, None, "test", sciq),
}


def read_task(name, folder, limit=None):
    """(documents, sha256 of the data) of a task, from folder if given, else from the hub."""
    repo, config, split, read = TASKS[name]
    folder = HERE if name == "demo" else folder
    if folder:
        path = os.path.join(folder, f"{name}_{split}.jsonl")
        if not os.path.isfile(path):
            raise UserError(f"no file {path}: task {name} needs it, with the columns of {repo}, or "
                            "leave out --data to read the hub")
        try:
            with open(path, encoding="utf-8") as f:
                rows = [line for line in f.read().split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        where, digest = f"{path}, line", sha256(path)
    else:
        try:
            rows = list(load_hub(repo, config, split))
        except UserError as error:
            raise UserError(f"{error}; with no network, give --data DIR with a file "
                            f"{name}_{split}.jsonl") from error
        where = f"{repo}, row"
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    docs = []
    for number, row in enumerate(rows[:limit], 1):
        try:
            doc = read(json.loads(row) if isinstance(row, str) else row)
            if not all(isinstance(text, str) and text for text in doc.choices) \
                    or not 0 <= doc.gold < len(doc.choices):
                raise ValueError("a choice is empty or no text, or the right one is out of range")
        except KeyError as error:
            raise UserError(f"{where} {number}: no column {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} {number} is not a row of {name}: {error}") from error
        docs.append(doc)
    if not docs:
        raise UserError(f"{where[:-6]} has no rows")
    return docs, digest


# --- the model ------------------------------------------------------------------------------------

class Scorer:
    """A model and its tokenizer, and log-likelihoods from them.

    path: a ckpt.pt of ours, a GPT-NeoX folder, or such a name on the hub. overrides: fields of the
    config. Raises ModelError or UserError if the model or a tokenizer that fits cannot be had.
    """

    def __init__(self, path, device="cpu", dtype="float32", batch_size="auto", **overrides):
        self.path, self.device, self.batch_size = path, torch.device(device), batch_size
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, dtype == "bfloat16")
        if os.path.isfile(path) or path.endswith(".pt"):
            self.model, meta = load_checkpoint(path, device, **overrides)
            self.identity = dict(path=path, sha256=sha256(path), step=meta["step"])
            trained = meta["config"]
            tokenizer = get_tokenizer(meta["tokenizer"])
            self.encode, self.decode = tokenizer.encode_ordinary, tokenizer.decode
            self.eot, self.vocab = tokenizer.eot_token, tokenizer.n_vocab
        else:
            from nanonexus.hf import fetch, read_config
            folder = fetch(path)
            self.model = GPT.from_hf(folder, **overrides).to(device).eval()
            self.identity, trained = dict(path=path), read_config(folder)
            tokenizer = read_tokenizer(folder)
            self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
            self.decode = tokenizer.decode
            self.eot = tokenizer.token_to_id("<|endoftext|>")
            self.vocab = tokenizer.get_vocab_size()
        config = self.model.config
        if self.vocab > config.vocab_size:
            raise UserError(f"the tokenizer of {path} has {self.vocab} tokens, its model only "
                            f"{config.vocab_size}: they do not belong together")
        if config.nexus_order != trained["nexus_order"]:
            print(f"note: {path} was trained at order {trained['nexus_order']} and is read at "
                  f"order {config.nexus_order}: the start of a retrofit, not a trained Nexus",
                  file=sys.stderr)

    def encode_pair(self, context, continuation):
        """Token ids of both, encoded together and split by the context's count; white space that
        ends the context goes to the continuation."""
        if context == "":
            ids = self.encode(continuation)
            return ([self.eot], ids) if ids[0] != self.eot else (ids[:1], ids[1:])
        kept = context.rstrip()
        continuation, context = context[len(kept):] + continuation, kept
        start = self.encode(context)
        return start, self.encode(context + continuation)[len(start):]

    @torch.no_grad()
    def loglikelihoods(self, pairs, say="scoring"):
        """For each (context ids, continuation ids): (sum of log-probabilities, whether greedy).

        Requests with the same context share its pass: it is computed once, into a cache, and the
        cache is copied to all its continuations. Equal requests are one, so that they tie exactly.
        Contexts of equal length make a batch; too long a request loses its beginning.
        """
        size, budget = self.model.config.block_size, 1 << (16 if self.device.type == "cuda" else 12)
        groups, requests = {}, []  # context -> {continuation: result}
        for context, continuation in pairs:
            if not 0 < len(continuation) <= size:
                raise UserError(f"a continuation has {len(continuation)} tokens; it must have at "
                                f"least 1 and fit the context of {size}")
            context = tuple(context[-(size + 1 - len(continuation)):])
            requests.append((context, tuple(continuation)))
            groups.setdefault(context, {})[tuple(continuation)] = None
        by_length = sorted(groups, key=len, reverse=True)  # largest first, as memory goes
        bar = tqdm(total=len(by_length), desc=say, unit="prompt", disable=None, leave=False)
        with bar:
            while by_length:
                length, batch = len(by_length[0]), []
                most = budget // length if self.batch_size == "auto" else self.batch_size
                while by_length and len(by_length[0]) == length and len(batch) < max(1, most):
                    batch.append(by_length.pop(0))
                self.score_batch(batch, groups, budget)
                bar.update(len(batch))
        return [groups[context][continuation] for context, continuation in requests]

    def score_batch(self, contexts, groups, budget):
        """Fill groups[context] for contexts of one length."""
        rows = [(i, c) for i, context in enumerate(contexts) for c in groups[context]]
        length, longest = len(contexts[0]), max(len(c) for _, c in rows)
        cache = KVCache(length + longest - 1)
        x = torch.tensor(contexts, device=self.device)
        with self.autocast:  # the output layer on the last token alone: it predicts the next
            last = self.model.head(self.model.hidden(x, cache=cache)[:, -1:])  # (B, 1, V)
        rows.sort(key=lambda row: len(row[1]))  # little padding in a part
        step = max(1, budget // 2 // longest)
        for part in (rows[i:i + step] for i in range(0, len(rows), step)):
            width = len(part[-1][1])
            owners = torch.tensor([i for i, _ in part], device=self.device)
            ids = torch.tensor([c + (0,) * (width - len(c)) for _, c in part], device=self.device)
            scored = [log_probabilities(last[owners], ids[:, :1])]
            if width > 1:
                with self.autocast:  # padding is on the right: causal, so without effect
                    logits = self.model(ids[:, :-1], cache=cache.select(owners))[0]
                scored.append(log_probabilities(logits, ids[:, 1:]))
            chosen, greedy = (torch.cat(s, dim=1) for s in zip(*scored, strict=True))
            for (i, c), lp, hit in zip(part, chosen, greedy, strict=True):
                n = len(c)
                groups[contexts[i]][c] = (lp[:n].sum().item(), bool(hit[:n].all()))


def log_probabilities(logits, ids):
    """The log-softmax of logits (B, T, V) at ids (B, T), in float32, and whether each is greedy."""
    lp = logits.float().log_softmax(-1)
    return lp.gather(-1, ids[:, :, None])[:, :, 0], lp.argmax(-1) == ids


def read_tokenizer(folder):
    from tokenizers import Tokenizer

    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"no tokenizer.json in {folder}: the scores need the model's own tokenizer")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer ({error})") from error


# --- scores ---------------------------------------------------------------------------------------

def evaluate(scorer, name, docs):
    """A task's entry of the JSON file, with every document's log-likelihoods."""
    pairs = [scorer.encode_pair(doc.context, " " + choice)
             for doc in docs for choice in doc.choices]
    results = iter(scorer.loglikelihoods(pairs, name))
    entries, hits, hits_norm = [], [], []
    for doc in docs:
        lls = [next(results)[0] for _ in doc.choices]
        norm = [ll / len(choice) for ll, choice in zip(lls, doc.choices, strict=True)]
        hits.append(float(lls.index(max(lls)) == doc.gold))  # a tie goes to the first
        hits_norm.append(float(norm.index(max(norm)) == doc.gold))
        entries.append(dict(lls=lls, gold=doc.gold, acc=hits[-1], acc_norm=hits_norm[-1]))
    return dict(n=len(docs), acc=statistics.mean(hits), acc_stderr=stderr(hits),
                acc_norm=statistics.mean(hits_norm), acc_norm_stderr=stderr(hits_norm),
                chance=statistics.mean(1 / len(doc.choices) for doc in docs), docs=entries)


def compare(first, second):
    """Paired difference, second minus first, of one task's two entries."""
    result = {}
    for metric in ("acc", "acc_norm"):
        a, b = ([doc[metric] for doc in entry["docs"]] for entry in (first, second))
        gaps = [y - x for x, y in zip(a, b, strict=True)]
        result[metric] = dict(difference=statistics.mean(gaps), stderr=stderr(gaps),
                              p=mcnemar(a, b))
    return result


def print_table(tasks):
    print(f"{'task':15}{'n':>6}  {'acc':>15}  {'acc_norm':>15}  {'chance':>6}")
    for name, r in tasks.items():
        print(f"{name:15}{r['n']:>6}  {r['acc']:.4f} ± {r['acc_stderr']:.4f}"
              f"  {r['acc_norm']:.4f} ± {r['acc_norm_stderr']:.4f}  {r['chance']:6.4f}")


def plot(runs, names, path):
    """Bars of acc with their standard errors, a pair a task, and a dash at chance."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.6 * len(names) + 2.5, 4))
    for shift, (label, tasks) in zip((-0.2, 0.2), runs.items(), strict=True):
        axes.bar([i + shift for i in range(len(names))], [tasks[n]["acc"] for n in names], 0.4,
                 yerr=[tasks[n]["acc_stderr"] for n in names], label=label, capsize=3)
    for i, name in enumerate(names):
        axes.plot([i - 0.4, i + 0.4], [next(iter(runs.values()))[name]["chance"]] * 2, "k--", lw=1)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="acc (dashes: chance)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- the harness itself, for its other tasks ------------------------------------------------------

def run_lm_eval(scorer, tasks, limit):
    """lm-evaluation-harness on our model, through a small adapter; prints its table."""
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    except ImportError as error:
        raise UserError("--lm_eval needs lm-evaluation-harness: pip install -e '.[hf]'") from error
    size = scorer.model.config.block_size

    class Adapter(TemplateLM):
        eot_token_id = scorer.eot

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return scorer.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return scorer.loglikelihoods([(context, ids) for _, context, ids in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(scorer.encode(request.args[0]), scorer.eot,
                                                    size, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(ll for ll, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            return [self.complete(*request.args) for request in requests]

        def complete(self, context, settings):
            stops, new = settings.get("until", []), settings.get("max_gen_toks", 256)
            prompt = torch.tensor([scorer.encode(context)[-max(1, size - new):]])
            temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0
            ids, text = [], ""
            for token in scorer.model.stream(prompt.to(scorer.device), new, temperature,
                                             stop=scorer.eot, vocab=scorer.vocab):
                ids.append(token.item())
                text = scorer.decode(ids)
                if token.item() == scorer.eot or any(stop in text for stop in stops):
                    break
            for stop in [*stops, "<|endoftext|>"]:
                text = text.split(stop)[0]
            return text

    try:
        results = lm_eval.simple_evaluate(model=Adapter(), tasks=tasks, limit=limit)
    except KeyError as error:
        if "not a registered task" not in str(error):
            raise
        raise UserError(f"lm-evaluation-harness has no such task: {error.args[0]}") from error
    print(make_table(results))
    return results["results"]


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="a ckpt.pt of ours, or a GPT-NeoX folder, or a "
        "name on the hub such as EleutherAI/pythia-70m (default: out/ckpt.pt)")
    add("--versus", metavar="CHECKPOINT", help="a second model: paired differences on the same "
        "documents, with their p-values, and a bar chart")
    add("--tasks", default="sciq", help=f"a list of {', '.join(TASKS)}, or all for the first six "
        "(default: sciq)")
    add("--data", metavar="DIR", help="folder with <task>_<split>.jsonl files (default: the hub)")
    add("--limit", type=int, help="only the first N documents of each task")
    add("--batch_size", default="auto", help="prompts at once, or auto: bounded memory (default)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the products; "
        "bfloat16 moves log-likelihoods by up to 0.2 and makes ties (default: float32)")
    add("--nexus_order", type=int, help="read the model at this order instead of its own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write the scores here")
    add("--save_docs", action="store_true", help="with each document's log-likelihoods in the JSON")
    add("--plot", metavar="FILE", default="versus.png", help="the chart of --versus (versus.png)")
    add("--lm_eval", action="store_true", help="run any task of lm-evaluation-harness through it")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if args.batch_size != "auto":
        if not args.batch_size.isdecimal() or int(args.batch_size) < 1:
            raise UserError(f"--batch_size must be auto or at least 1, got {args.batch_size}")
        args.batch_size = int(args.batch_size)
    check_device(args.device)
    if args.device == "cpu":
        keep_freed_memory()
    overrides = {} if args.nexus_order is None else dict(nexus_order=args.nexus_order)
    names = list(TASKS)[:6] if args.tasks == "all" else args.tasks.split(",")
    settings = (args.device, args.dtype, args.batch_size)
    if args.lm_eval:
        scores = run_lm_eval(Scorer(args.checkpoint, *settings, **overrides), names, args.limit)
        if args.json:
            write_json(args.json, dict(tasks=scores))
        return
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            raise UserError(f"no task {name!r}: " + (f"did you mean {near[0]}?" if near else
                            f"choose from {', '.join(TASKS)}, or give --lm_eval"))
    data = {name: read_task(name, args.data, args.limit) for name in names}  # before any scoring

    runs, entries = {}, []
    for path in [args.checkpoint, *([args.versus] if args.versus else [])]:
        scorer = Scorer(path, *settings, **overrides)
        config = scorer.model.config
        tasks = {name: evaluate(scorer, name, docs) for name, (docs, _) in data.items()}
        print(f"\n{path}: order {config.nexus_order}, {scorer.model.num_params():,} parameters, "
              f"{args.dtype}")
        print_table(tasks)
        runs[path if path not in runs else path + " "] = tasks
        entries.append(dict(checkpoint=scorer.identity, config=vars(config), tasks={
            name: {k: v for k, v in r.items() if k != "docs" or args.save_docs}
            | dict(data_sha256=data[name][1]) for name, r in tasks.items()}))
    result = entries[0] | dict(dtype=args.dtype, versions=dict(
        python=platform.python_version(), torch=str(torch.__version__)))
    if args.versus:
        first, second = runs.values()
        gaps = {name: compare(first[name], second[name]) for name in names}
        print(f"\n{args.versus} minus {args.checkpoint}, paired by document\n"
              f"{'task':15}{'acc':>19}  {'p':>7}{'acc_norm':>21}  {'p':>7}")
        for name, gap in gaps.items():
            print(f"{name:15}" + "  ".join(f"{g['difference']:+10.4f} ± {g['stderr']:.4f}  "
                                           f"{g['p']:7.2g}" for g in gap.values()))
        result |= dict(versus=entries[1], paired=gaps)
        plot(runs, names, args.plot)
        print(f"wrote {args.plot}")
    if args.json:
        write_json(args.json, result)


def write_json(path, result):
    partial = path + ".partial"
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
    os.replace(partial, path)


if __name__ == "__main__":
    run_script(main)
