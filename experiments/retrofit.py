"""
What does a retrofit do to a pretrained model, at once and after fine-tuning?

    python experiments/retrofit.py --text 'books/*.txt.xz' --seeds 5 --out out/retrofit
    python experiments/retrofit.py --show --results docs/results/retrofit.jsonl
    python experiments/retrofit.py --quick

From scratch to a table, without the hub: a small Qwen2 (transformers' own) is pretrained on bytes
of text; nexus() turns it into its Nexus versions, with each inner map and with gates more or less
open, and the KL divergence from the original's predictions measures the change; then
`finetune.py sft` trains each variant on the same questions in the same order, and it answers new
ones.

A question is a sum modulo 10, "3+4+8+6="; its answer goes step by step, "7 5 1", and counts if
all steps are right. Each finished run appends one line to --results and is never run again while
that line is there; the same command continues. --show prints the tables of those lines.
"""

import argparse
import collections
import copy
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import figures
import torch
from runs import commit
from tqdm import tqdm

from common import ROOT, parse, pyplot, save, table

from nanonexus.cli import (
    Parser,
    UserError,
    listed,
    non_negative,
    number,
    positive_int,
    run_script,
)
from nanonexus.device import keep_freed_memory
from nanonexus.files import append_line, output_file, read_json, read_lines, write_json
from nanonexus.retrofit import INNERS, load, nexus
from nanonexus.stats import mean_spread, paired, paired_text
from nanonexus.tokenizer import EOT
from prepare_data import documents
from train import warmup_cosine

VARIANTS = {  # name -> flags of finetune.py sft, in addition to --order 2
    "baseline": "--order 1",
    "self": "--inner self",
    "past": "--inner past",
    "cross": "--inner cross",
    "past-k": "--inner past --streams k",
    "past-gated": "--inner past --gate 0",
    "cross-gated": "--inner cross --gate 0",
    "past-k-gated": "--inner past --streams k --gate 0",
    "key-shift": "--inner shift --streams k --gate 0",
    "self-gated": "--inner self --gate 0",
    "self-k": "--inner self --streams k",
    "cross-k": "--inner cross --streams k",
}
MAPS = [inner for inner in INNERS if inner != "shift"]  # that attend
CHANGES = {  # name -> arguments of nexus()
    "original": dict(order=1),
    **{f"{inner}{'-' * bool(streams)}{streams}": dict(inner=inner, streams=streams or "qk")
       for inner in MAPS for streams in ("", "q", "k")},
    **{f"self-{order}": dict(order=order) for order in (3, 4)},
    **{f"{inner}, gate {gate}": dict(inner=inner, gate=gate)
       for inner in MAPS for gate in (0.0, 0.1, 0.25, 0.5)},
    **{f"key-shift, gate {gate}": dict(inner="shift", streams="k", gate=gate)
       for gate in (0.1, 0.25, 0.5)},
}
PRETRAINING = ("steps", "batch", "context", "lr")  # flags
TUNING = ("terms", "examples", "sft_steps", "sft_batch", "sft_lr")
SHAPE = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
             intermediate_size=512)  # 2.4M parameters; groups of three queries


def byte_tokenizer():
    """A transformers tokenizer whose tokens are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT,
                                   pad_token="<|pad|>")


def read_text(args, tokenizer):
    """Token ids of the text, int64: (for training, held out)."""
    source = argparse.Namespace(dataset="text" if args.text else "pydocs", input=args.text,
                                text_field=None)
    texts, size = [], 0
    for text in documents(source, collections.Counter())[0]:
        texts.append(text)
        size += len(text)
        if size > args.steps * args.batch * args.context:
            break
    ids = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
    held = max(args.context * 8, len(ids) // 20)
    if len(ids) < 2 * held:
        raise UserError(f"{len(ids)} bytes of text are too few for windows of {args.context}")
    return ids[:-held], ids[-held:]


def pretrain(args, tokenizer, ids):
    """A Qwen2 trained on windows of ids, in folder OUT/base; reused if it exists."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, settings = os.path.join(args.out, "base"), settings_of(args, PRETRAINING)
    path = os.path.join(folder, "settings.json")  # written when all is done
    if os.path.exists(path):
        if read_json(path) != settings:
            raise UserError(f"{folder} was pretrained with other settings: use another --out")
        print(f"reusing {folder}")
        return load(folder).eval()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    bar = tqdm(range(args.steps), desc="pretraining", disable=None, leave=False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup_cosine(step, 50, args.steps)
        starts = torch.randint(len(ids) - args.context, (args.batch, 1))
        batch = ids[starts + torch.arange(args.context)]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(path, settings)
    return model.eval()


@torch.no_grad()
def change(model, batch, settings):
    """How much a retrofit changes predictions: dict(kl, loss), in nats per token."""
    def predict(m):
        return m(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    own, new = predict(model), predict(nexus(copy.deepcopy(model), **settings))
    return dict(kl=(own.exp() * (own - new)).sum(-1).mean().item(),
                loss=-new.gather(2, batch[:, 1:, None]).mean().item())


def questions(n, steps, seed):
    """n of {"prompt", "answer"}: sums of steps + 1 digits modulo 10, the answer step by step."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        digits = [rng.randint(0, 9) for _ in range(steps + 1)]
        sums = [sum(digits[:i + 2]) % 10 for i in range(steps)]
        rows.append(dict(prompt="+".join(map(str, digits)) + "=", answer=" ".join(map(str, sums))))
    return rows


@torch.no_grad()
def accuracy(model, tokenizer, rows, args):
    """(fraction of the questions that greedy decoding answers exactly; the same for each step)"""
    right, steps = 0, [0] * (args.terms - 1)
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), 100):
        part = rows[start:start + 100]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=2 * args.terms, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].size(1):],
                                       skip_special_tokens=True)
        for text, row in zip(texts, part, strict=True):
            right += text == row["answer"]
            for i, (said, step) in enumerate(zip(text.split(), row["answer"].split(),
                                                 strict=False)):
                steps[i] += said == step
    return right / len(rows), [n / len(rows) for n in steps]


def settings_of(args, names):
    """What identifies a run, in addition to its variant and seed."""
    return {name: getattr(args, name) for name in names} | dict(
        text=[os.path.basename(path) for path in args.text or ["pydocs"]])


class Results:
    """The file of lines, {(variant, seed): line} of one set of settings; seed None: a change. With
    --show the settings are those of the lines; UserError if these differ."""

    def __init__(self, args):
        self.path, self.commit = args.results, commit()
        lines = read_lines(args.results, "variant", "seed", "settings")
        self.settings = settings_of(args, PRETRAINING + TUNING)
        if args.show and lines:
            self.settings = lines[0]["settings"]
            if any(line["settings"] != self.settings for line in lines):
                raise UserError(f"{self.path} has lines of several settings: keep only one's")
        self.found = {(line["variant"], line["seed"]): line for line in lines
                      if line["settings"] == self.settings}

    def add(self, variant, seed, **measured):
        line = dict(variant=variant, seed=seed, **measured, settings=self.settings,
                    commit=self.commit, torch=torch.__version__)
        self.found[variant, seed] = line
        append_line(self.path, line)


def finetune(args, variant, seed):
    """The folder of one run of finetune.py sft, which fine-tunes OUT/base; a finished one is
    reused. UserError if it fails."""
    folder = os.path.join(args.out, f"{variant}-{seed}")
    if not os.path.exists(os.path.join(folder, "trainer_state.json")):
        shutil.rmtree(folder, ignore_errors=True)  # one that was stopped
        argv = [sys.executable, os.path.join(ROOT, "finetune.py"), "sft", "--model",
                os.path.join(args.out, "base"), "--data",
                os.path.join(args.out, f"questions-{seed}.jsonl"), "--out", folder, "--max_steps",
                str(args.sft_steps), "--batch", str(args.sft_batch), "--lr", str(args.sft_lr),
                "--seed", str(seed), "--log_interval", str(max(1, args.sft_steps // 20)),
                "--save_interval", str(args.sft_steps), "--device", "cpu",
                *VARIANTS[variant].split()]
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace",
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
        if done.returncode:
            raise UserError(f"{' '.join(argv)} failed: {done.stderr[-500:]}")
    return folder


def measure(args, folder, tokenizer, test):
    """What goes into a run's line: accuracies on the questions `test`, losses, gates."""
    model = load(folder).eval()
    right, steps = accuracy(model, tokenizer, test, args)
    log = read_json(os.path.join(folder, "trainer_state.json"))["log_history"]
    losses = [(e["step"], e["loss"]) for e in log if "loss" in e]
    gates = [p.abs().mean().item() for name, p in model.named_parameters() if "nexus_gate" in name]
    return dict(accuracy=right, steps=steps, losses=losses,
                gate=sum(gates) / len(gates) if gates else None)


def run_all(args, results):
    """Pretrain if necessary, measure every change, fine-tune what the results lack."""
    output_file(args.results)
    tokenizer = byte_tokenizer()
    ids, held = read_text(args, tokenizer)
    model = pretrain(args, tokenizer, ids)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    batch = held[:len(held) // args.context * args.context].view(-1, args.context)[:16]
    for name, settings in tqdm(CHANGES.items(), desc="changes", disable=None, leave=False):
        if (name, None) not in results.found:
            results.add(name, None, **change(model, batch, settings))

    test = questions(1000, args.terms - 1, seed=10**6)
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.variants
            if (name, seed) not in results.found]
    for seed in {seed for _, seed in jobs}:
        with open(os.path.join(args.out, f"questions-{seed}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n"
                         for row in questions(args.examples, args.terms - 1, seed))
    with ThreadPoolExecutor(args.jobs) as pool, \
            tqdm(total=len(jobs), desc="fine-tuning", disable=None) as bar:
        folders = pool.map(lambda job: finetune(args, *job), jobs)
        for (name, seed), folder in zip(jobs, folders, strict=True):
            results.add(name, seed, **measure(args, folder, tokenizer, test))
            shutil.rmtree(folder)  # the line has it all
            bar.update()
            bar.write(f"{name}, seed {seed}: {results.found[name, seed]['accuracy']:.3f}")


def summarise(results, variants):
    """({name: line} of the changes, {variant: {seed: line}} of the runs), as far as they exist."""
    changes = {name: results.found[name, None] for name in CHANGES if (name, None) in results.found}
    runs = {name: {seed: line for (v, seed), line in sorted(results.found.items(), key=str)
                   if v == name and seed is not None} for name in variants}
    return changes, {name: lines for name, lines in runs.items() if lines}


def rows(runs):
    """The table of the runs: differences from the baseline are paired over the seeds of both."""
    base = runs.get("baseline", {})
    yield ("", "accuracy", "minus baseline [99% interval]", "last loss", "mean |gate|", "by seed")
    for name, lines in runs.items():
        both = [seed for seed in lines if seed in base] if name != "baseline" else []
        gap = paired([lines[seed]["accuracy"] for seed in both],
                     [base[seed]["accuracy"] for seed in both]) if both else None
        gates = [line["gate"] for line in lines.values()]
        yield (name, mean_spread([line["accuracy"] for line in lines.values()], 3),
               paired_text(gap, 3) if gap else "",
               mean_spread([line["losses"][-1][1] for line in lines.values()], 3),
               f"{sum(gates) / len(gates):.2f}" if gates[0] is not None else "",
               " ".join(f"{line['accuracy']:.2f}" for line in lines.values()))


def plot(plt, changes, runs):
    """How much a retrofit changes at once, and each seed's accuracy after fine-tuning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.6))
    for panel, names in ((left, [name for name in changes if "gate" not in name][1:]),
                         (right, list(runs))):
        panel.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        panel.set_yticklabels(names)
        for y, name in enumerate(names):
            color = figures.style(name.split("-gated")[0].replace("self-4", "self-3"))["color"]
            if panel is left:
                left.barh(y, changes[name]["kl"], color=color)
                continue
            lines = list(runs[name].values())
            for i, line in enumerate(lines):  # slightly apart, so that equal ones stay visible
                right.plot(line["accuracy"], y + 0.6 * ((i + 0.5) / len(lines) - 0.5), "o", ms=3.6,
                           mec=color, mfc="none" if "gated" in name else color, clip_on=False)
    left.set(title="change by the retrofit alone", xlabel="KL from the original (nats per token)")
    right.set(title="after fine-tuning, a dot per seed (open: gated)", xlabel="questions answered",
              xlim=(0, 1))
    return figure


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variants", type=listed(str),
        help=f"a list of {', '.join(VARIANTS)} (default: all; with --quick three)")
    add("--text", nargs="+", metavar="FILE", help="files to pretrain on, as prepare_data.py takes "
        "them (default: pydocs)")
    add("--steps", type=positive_int, default=600, help="steps of pretraining (default: 600)")
    add("--batch", type=positive_int, default=16,
        help="windows per step of pretraining (default: 16)")
    add("--context", type=number(int, 16, 2048), default=256,
        help="bytes per window (default: 256)")
    add("--lr", type=non_negative, default=2e-3, help="of pretraining (default: 2e-3)")
    add("--terms", type=number(int, 2, 1000), default=4, help="digits per question (default: 4)")
    add("--examples", type=positive_int, default=20_000,
        help="questions to train on (default: 20000)")
    add("--sft_steps", type=positive_int, default=600, help="steps of fine-tuning (default: 600)")
    add("--sft_batch", type=positive_int, default=32, help="questions per step (default: 32)")
    add("--sft_lr", type=non_negative, default=1e-3, help="of fine-tuning (default: 1e-3)")
    add("--jobs", type=positive_int, default=os.cpu_count() or 1,
        help="runs in parallel, one core each (default: one per core)")
    add("--seeds", type=positive_int, default=3, help="seeds 0 to N-1 (default: 3)")
    add("--quick", action="store_true", help="few steps, one seed: about a minute")
    add("--out", default="out/retrofit", help="folder (default: out/retrofit)")
    add("--results", metavar="FILE", help="each finished run appends a line to it (default: "
        "OUT/results.jsonl)")
    add("--show", action="store_true", help="run nothing: the tables of the existing lines")
    return parser


def main():
    args = parse(build_parser())
    if args.quick:
        args.steps, args.batch, args.sft_steps, args.examples, args.seeds = 20, 4, 12, 400, 1
    args.variants = args.variants or (["baseline", "past", "key-shift"] if args.quick else
                                      list(VARIANTS))
    if unknown := set(args.variants) - set(VARIANTS):
        raise UserError(f"no variant {', '.join(sorted(unknown))}: choose from "
                        f"{', '.join(VARIANTS)}")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[retrofit]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plt = pyplot(args.out)
    keep_freed_memory()
    args.results = args.results or os.path.join(args.out, "results.jsonl")

    results = Results(args)
    if not args.show:
        run_all(args, results)
    changes, runs = summarise(results, args.variants)
    if not changes and not runs:
        raise UserError(f"{args.results} has no line of these settings and variants yet")
    print(table([["", "KL from the original", "loss, nats per byte"],
                 *([name, f"{r['kl']:.4f}", f"{r['loss']:.4f}"] for name, r in changes.items())]))
    print(table(list(rows(runs))))
    save(args, "retrofit", dict(changes=changes, runs=runs), plot(plt, changes, runs))


if __name__ == "__main__":
    run_script(main)
