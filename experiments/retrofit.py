"""
What does Nexus do to a pretrained model, at once and after fine-tuning?

    python experiments/retrofit.py --text 'books/*.txt.xz' --out out/retrofit
    python experiments/retrofit.py --quick

From nothing to a table, without the hub: a small Qwen2 (transformers' own) is pretrained on bytes
of text; nexus() turns it into orders 2 to 4, with gates more or less open, and the KL
divergence from its own predictions says how much that changes them; then `finetune.py sft` trains
each variant on the same questions in the same order, and it answers new ones.

A question is a sum modulo 10, "3+4+8+6="; its answer goes step by step, "7 5 1", and counts if
every step is right.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from common import ROOT, pyplot, save, table

from nanonexus.cli import Parser, UserError, non_negative, number, positive_int, run_script
from nanonexus.device import keep_freed_memory
from nanonexus.retrofit import load, nexus
from nanonexus.schedule import warmup_cosine
from nanonexus.stats import mean_spread, paired, paired_text
from nanonexus.tokenizer import EOT
from prepare_data import documents

VARIANTS = {"order 1": ["--order", "1"], "order 2": ["--order", "2"],
            "order 2, gated": ["--order", "2", "--gate", "0"],
            "order 2, k only": ["--order", "2", "--streams", "k"]}
SHAPE = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
             intermediate_size=512)  # 2.4M parameters; queries grouped by three


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
    for text in documents(source, [0.0])[0]:
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
    """A Qwen2 trained on windows of ids, in folder OUT/base; used again if it is there."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = os.path.join(args.out, "base")
    if os.path.exists(os.path.join(folder, "config.json")):
        print(f"{folder} is there: used again")
        return load(folder).eval()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    bar = tqdm(range(args.steps), desc="pretraining", disable=None, leave=False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, args.lr, 50, args.steps)
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
    return model.eval()


@torch.no_grad()
def change(model, batch):
    """How each retrofit changes predictions: {name: dict(kl, loss)}, in nats a token."""
    def predict(m):
        return m(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    own, targets, results = predict(model), batch[:, 1:, None], {}
    kinds = {"original": dict(order=1)}
    kinds |= {f"order {m}": dict(order=m) for m in (2, 3, 4)}
    kinds |= {f"order 2, {s} only": dict(order=2, streams=s) for s in "qk"}
    kinds |= {f"order 2, gate {g}": dict(order=2, gate=g) for g in (0.0, 0.1, 0.25, 0.5)}
    kinds["order 2, last layer"] = dict(order=2, layers=[model.config.num_hidden_layers - 1])
    for name, settings in kinds.items():
        new = predict(nexus(copy.deepcopy(model), **settings))
        results[name] = dict(kl=(own.exp() * (own - new)).sum(-1).mean().item(),
                             loss=-new.gather(2, targets).mean().item())
    return results


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
    """Share of the questions that the model answers, greedily, exactly."""
    right = 0
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), 100):
        part = rows[start:start + 100]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=2 * args.terms, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].size(1):],
                                       skip_special_tokens=True)
        right += sum(text == row["answer"] for text, row in zip(texts, part, strict=True))
    return right / len(rows)


def finetune(args, variant, seed):
    """The folder of one run of finetune.py sft; a finished one is used again."""
    folder = os.path.join(args.out, f"{variant.replace(', ', '-').replace(' ', '')}-{seed}")
    data = os.path.join(args.out, f"questions-{seed}.jsonl")
    if not os.path.exists(os.path.join(folder, "trainer_state.json")):
        argv = [sys.executable, os.path.join(ROOT, "finetune.py"), "sft", "--model",
                os.path.join(args.out, "base"), "--data", data, "--out", folder, "--max_steps",
                str(args.sft_steps), "--batch", str(args.sft_batch), "--lr", str(args.sft_lr),
                "--seed", str(seed), "--log_interval", str(max(1, args.sft_steps // 20)),
                "--save_interval", str(args.sft_steps), "--device", "cpu", *VARIANTS[variant]]
        done = subprocess.run(argv, capture_output=True, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
        if done.returncode:
            raise UserError(f"{' '.join(argv)} failed: {done.stderr[-500:]}")
    return folder


def read_run(folder, model):
    """(logged losses, mean size of the gates or None) of the model fine-tuned in folder."""
    with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as f:
        losses = [(e["step"], e["loss"]) for e in json.load(f)["log_history"] if "loss" in e]
    gates = [p.abs().mean().item() for name, p in model.named_parameters() if "nexus_gate" in name]
    return losses, sum(gates) / len(gates) if gates else None


def plot(plt, changes, runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    names = list(changes)[1:]
    left.barh(names, [changes[name]["kl"] for name in names])
    left.invert_yaxis()
    left.set(title="change by the retrofit alone", xlabel="KL from the original, nats a token")
    for name, r in runs.items():
        steps = [step for step, _ in r["losses"][0]]
        mean = [sum(losses[i][1] for losses in r["losses"]) / len(r["losses"])
                for i in range(len(steps))]
        right.plot(steps, mean, label=name)
    right.set(title="fine-tuning on questions", xlabel="step", ylabel="loss on answers")
    right.legend()
    right.grid(alpha=0.3)
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="files to pretrain on, as prepare_data.py takes "
        "them (default: pydocs)")
    add("--steps", type=positive_int, default=600, help="of pretraining (default: 600)")
    add("--batch", type=positive_int, default=16,
        help="windows a step of pretraining (default: 16)")
    add("--context", type=number(int, 16, 2048), default=256, help="bytes a window (default: 256)")
    add("--lr", type=non_negative, default=2e-3, help="of pretraining (default: 2e-3)")
    add("--terms", type=number(int, 2, 1000), default=4, help="digits of a question (default: 4)")
    add("--examples", type=positive_int, default=20_000,
        help="questions to train on (default: 20000)")
    add("--sft_steps", type=positive_int, default=600, help="of fine-tuning (default: 600)")
    add("--sft_batch", type=positive_int, default=32, help="questions a step (default: 32)")
    add("--sft_lr", type=non_negative, default=1e-3, help="of fine-tuning (default: 1e-3)")
    add("--jobs", type=positive_int, default=os.cpu_count() or 1,
        help="runs at once, a core each (default: one a core)")
    add("--seeds", type=positive_int, default=3, help="(default: 3)")
    add("--quick", action="store_true", help="few steps, one seed: under a minute")
    add("--out", default="out/retrofit", help="folder (default: out/retrofit)")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.sft_steps, args.examples, args.seeds = 20, 4, 12, 400, 1
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[retrofit]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plt = pyplot()
    keep_freed_memory()

    os.makedirs(args.out, exist_ok=True)
    tokenizer = byte_tokenizer()
    ids, held = read_text(args, tokenizer)
    model = pretrain(args, tokenizer, ids)
    batch = held[:len(held) // args.context * args.context].view(-1, args.context)[:16]
    changes = change(model, batch)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters\n" + table(
        [["", "KL from the original", "loss, nats a byte"],
         *([name, f"{r['kl']:.4f}", f"{r['loss']:.4f}"] for name, r in changes.items())]))

    test = questions(1000, args.terms - 1, seed=10**6)
    for seed in range(args.seeds):
        rows = questions(args.examples, args.terms - 1, seed)
        with open(os.path.join(args.out, f"questions-{seed}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    jobs = [(name, seed) for seed in range(args.seeds) for name in VARIANTS]
    runs = {name: dict(accuracy=[], losses=[], gates=[]) for name in VARIANTS}
    with ThreadPoolExecutor(args.jobs) as pool, \
            tqdm(total=len(jobs), desc="fine-tuning", disable=None) as bar:
        folders = pool.map(lambda job: finetune(args, *job), jobs)
        for (name, seed), folder in zip(jobs, folders, strict=True):
            tuned = load(folder).eval()
            losses, gate = read_run(folder, tuned)
            runs[name]["accuracy"].append(accuracy(tuned, tokenizer, test, args))
            runs[name]["losses"].append(losses)
            runs[name]["gates"].append(gate)
            bar.update()
            bar.write(f"{name}, seed {seed}: {runs[name]['accuracy'][-1]:.3f}")
    base = runs["order 1"]["accuracy"]
    print(table([["", "accuracy", "minus order 1", "last loss", "mean |gate|"], *(
        [name, mean_spread(r["accuracy"], 3),
         paired_text(paired(r["accuracy"], base), 3) if name != "order 1" else "",
         mean_spread([losses[-1][1] for losses in r["losses"]], 3),
         f"{sum(r['gates']) / len(r['gates']):.2f}" if r["gates"][0] is not None else ""]
        for name, r in runs.items())]))
    save(args, "retrofit", dict(changes=changes, runs=runs), plot(plt, changes, runs))


if __name__ == "__main__":
    run_script(main)
