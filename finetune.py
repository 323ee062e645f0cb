"""
Nexus inside pretrained transformers models: fine-tuning with its Trainer, scores with lm-eval.

    python finetune.py sft --model Qwen/Qwen2.5-1.5B --data train.jsonl --order 2 --out DIR
    python finetune.py eval --model DIR --tasks gsm8k --versus OTHER
"""

import importlib
import math
import os
import sys

import torch

from nanonexus.cli import (
    Parser,
    UserError,
    listed,
    non_negative,
    number,
    positive_int,
    run_script,
    whole,
)
from nanonexus.decoder import describe, load, override, pretrained
from nanonexus.device import check_device
from nanonexus.files import output_file, output_folder, read_json, sha256, write_json
from nanonexus.flags import agree
from nanonexus.hf import commit_of, fetch
from nanonexus.processes import Stop
from nanonexus.retrofit import INNERS, check_map
from nanonexus.stats import mcnemar, stderr
from nanonexus.text import TABLES, rows
from train import warmup_cosine

# A resumed run must agree with these, which it wrote to this file in --out, or it would be another.
FIXED = ["model", "data", "order", "streams", "layers", "gate", "inner", "epochs", "max_steps",
         "batch", "accumulate", "lr", "gate_lr", "warmup", "weight_decay", "max_length", "lora",
         "dtype", "seed"]
RUN = "run.json"


def read_examples(path, tokenizer, max_length):
    """[{input_ids, labels}] of the rows of a file; labels are -100 except on the answers.

    A row is {"messages": [{"role", "content"}, ...]}, for the tokenizer's chat template, or
    {"prompt", "answer"}, concatenated as they are. A row that lacks a text is skipped, and counted.
    Raises UserError, naming the line.
    """
    from jinja2 import TemplateError

    examples, long, empty = [], 0, 0
    for place, row in rows(path):
        turns = row.get("messages")
        needed, other = ("chat_template", "prompts") if turns else ("eos_token", "messages")
        if not getattr(tokenizer, needed):
            raise UserError(f"{place}: the model's tokenizer has no {needed}, which it needs: "
                            f"add one to its tokenizer_config.json, or give {other} instead")
        try:
            texts = [row.get("prompt"), row.get("answer")] if not turns else [
                turn.get("tool_calls") or turn.get("content") for turn in turns]
            if None in texts:
                empty += 1
                continue
            if not all(isinstance(text, (str, list) if turns else str) for text in texts):
                raise TypeError("a text is not a string")
            ids, answers = chat(turns, tokenizer) if turns else plain(*texts, tokenizer)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError,
                TemplateError) as error:
            raise UserError(f"{place}: needs messages (with role and content), or prompt and "
                            f"answer ({type(error).__name__}: {error})") from error
        if len(ids) > max_length:
            long += 1
        elif any(answers):
            labels = [i if answer else -100 for i, answer in zip(ids, answers, strict=True)]
            examples.append(dict(input_ids=ids, labels=labels))
    if empty:
        print(f"{empty} rows without messages, or prompt and answer, are skipped")
    if long:
        print(f"{long} examples of more than {max_length} tokens are skipped (--max_length)")
    if not examples:
        raise UserError(f"{path} has no example with an answer of up to {max_length} tokens "
                        "(--max_length): rows need messages (with role and content), or prompt "
                        "and answer")
    return examples


def plain(prompt, answer, tokenizer):
    """Ids of what the tokenizer begins a text with, prompt, answer and the end of text, and which
    of them are the answer's."""
    prompt, answer, some = tokenizer([prompt, answer, "a"], add_special_tokens=False)["input_ids"]
    begin = tokenizer("a")["input_ids"]
    begin = begin[:begin.index(some[0])]
    if prompt[:len(begin)] != begin:
        prompt = begin + prompt
    answer = answer + [tokenizer.eos_token_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def chat(messages, tokenizer):
    """Ids of a conversation, and which of them are the assistant's (with what ends its turn)."""
    def ids(n, **kwargs):
        return tokenizer.apply_chat_template(messages[:n], return_dict=False, **kwargs)

    conversation = ids(len(messages))
    answers = [False] * len(conversation)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = ids(n, add_generation_prompt=True), ids(n + 1)
            if conversation[:len(after)] != after or after[:len(before)] != before:
                raise ValueError("the chat template does not write a conversation turn by turn")
            answers[len(before):len(after)] = [True] * (len(after) - len(before))
    return conversation, answers


def make_optimizer(model, args):
    """AdamW with weight decay for the matrices and a separate learning rate for the gates."""
    gates, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (gates if "nexus_gate" in name else matrices if p.dim() > 1 else rest).append(p)
    return torch.optim.AdamW([
        dict(params=matrices, weight_decay=args.weight_decay), dict(params=rest),
        dict(params=gates, lr=args.gate_lr)], lr=args.lr, weight_decay=0)


def count_steps(examples, settings):
    """How many steps a Trainer with these TrainingArguments takes on this many examples."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(examples / (settings.train_batch_size * settings.world_size))
    epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    return math.ceil(settings.num_train_epochs * epoch)


def make_scheduler(optimizer, steps, warmup):
    """train.py's schedule, down to 0 at the last step; warmup in steps or, if < 1, a fraction."""
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup, steps, floor=0.0))


def stop_callback(stop):
    """Tells a Trainer to save and to end after the step in which a stop was asked for."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stop.asked():
                control.should_save = control.should_training_stop = True

    return Callback()


def sft(args):
    """Fine-tune on the answers in --data; --order 1 is the control. load() reads the resulting
    folder. A batch's examples are packed into one row; positions that start again at 0 keep each
    from seeing the others, in the inner loops too."""
    from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    run, newest = os.path.join(args.out, RUN), None
    if os.path.isdir(args.out):
        newest = get_last_checkpoint(args.out)
    if args.resume and newest is None:
        raise UserError(f"no checkpoint in {args.out} to --resume: drop the flag to begin")
    if os.path.isdir(args.out) and {*os.listdir(args.out)} - {RUN} and not args.resume:
        raise UserError(f"{args.out} is not empty: --resume continues its run, another --out "
                        "starts a new one")
    output_folder(args.out)
    if args.report_to != "none":
        importlib.import_module(args.report_to)  # fail now if it is missing
    rows(args.data)  # or if that cannot be read
    given = {name: getattr(args, name) for name in FIXED}
    if os.path.isdir(args.model):
        given["model"] = os.path.realpath(args.model)
    given["data"] = sha256(args.data)
    before = saved_run(args)
    agree(given, before, given)
    torch.manual_seed(args.seed)
    folder = fetch(args.model)
    # trained weights are float32, products args.dtype; under adapters all are args.dtype
    model = pretrained(load, folder, dtype=args.dtype if args.lora else "float32")
    if commit := commit_of(folder):
        model.config.base_model = f"{args.model.partition('@')[0]}@{commit}"
    set_nexus(model, args)
    given |= getattr(model.config, "nexus", dict(order=1))
    check_map(before, model.config.model_type, args.out)
    what = describe(model)
    tokenizer = pretrained(AutoTokenizer.from_pretrained, folder)
    examples = read_examples(args.data, tokenizer, args.max_length)
    if args.lora:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear",
            modules_to_save=None if args.gate is None else ["nexus_gate"]))
    settings = TrainingArguments(
        output_dir=args.out, num_train_epochs=args.epochs, max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
        seed=args.seed, bf16=args.dtype == "bfloat16", logging_steps=args.log_interval,
        report_to=args.report_to, save_steps=args.save_interval, save_total_limit=2,
        use_cpu=args.device == "cpu", use_cache=False)  # a cache would mix packed examples
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, count_steps(len(examples), settings), args.warmup)
    trainer = Trainer(model=model, args=settings, train_dataset=examples,
                      data_collator=DataCollatorWithFlattening(), optimizers=(optimizer, scheduler))
    if trainer.is_world_process_zero():
        write_json(run, given)
    with Stop(math.inf) as stop:
        trainer.add_callback(stop_callback(stop))
        trainer.train(resume_from_checkpoint=newest if args.resume else None)
    if stop.signal:
        print(f"stopped at step {trainer.state.global_step}, saved in {args.out}; the same command "
              "with --resume continues")
        sys.exit(128 + stop.signal)
    if args.lora:
        model = model.merge_and_unload()
    model.config.use_cache = True
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    trainer.save_state()  # trainer_state.json: every logged loss
    print(f"wrote {args.out} ({what}); score it with: python finetune.py eval --model {args.out}")


def set_nexus(model, args):
    """Make a model what the flags say; what they do not say stays, or is nexus()'s default."""
    override(model, order=args.order, streams=args.streams, layers=args.layers, gate=args.gate,
             inner=args.inner)


def saved_run(args):
    """What the run that --resume continues was given, {} if its folder does not tell."""
    path = os.path.join(args.out, RUN)
    return read_json(path) if args.resume and os.path.exists(path) else {}


# --- scores ---------------------------------------------------------------------------------------

def task_manager(args):
    """lm-eval's tasks, only those of --include_path if given. UserError if it lacks one."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=args.include_path, include_defaults=not args.include_path)
    if unknown := set(args.tasks) - set(manager.all_tasks):
        raise UserError(f"lm-evaluation-harness has no such task: {', '.join(sorted(unknown))}")
    return manager


def score(path, folder, tokenizer, manager, args):
    """{(task, metric, filter): a list of one score per document}, and lm-eval's own results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = pretrained(load, folder, dtype=args.dtype).to(args.device).eval()
    if args.order is not None:
        set_nexus(model, args)
    print(f"{path}: {describe(model)}")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
    results = simple_evaluate(
        model=harness, tasks=args.tasks, limit=args.limit, task_manager=manager,
        num_fewshot=args.fewshot, apply_chat_template=args.chat, log_samples=True,
        bootstrap_iters=0) | dict(revision=commit_of(folder))
    documents = {}
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                documents.setdefault((task, metric, sample["filter"]), []).append(sample[metric])
    return documents, results


def evaluate(args):
    """Print lm-eval's table for --model and, with --versus, the differences paired by document."""
    from lm_eval.utils import make_table
    from transformers import AutoTokenizer

    if args.json:
        output_file(args.json, args.model, args.versus)
    paths = [args.model, args.versus] if args.versus else [args.model]
    folders = [fetch(path) for path in paths]
    tokenizers = [pretrained(AutoTokenizer.from_pretrained, folder) for folder in folders]
    manager, documents, report = task_manager(args), [], {"revisions": {}}
    with Stop():
        try:
            for path, folder, tokenizer in zip(paths, folders, tokenizers, strict=True):
                scores, results = score(path, folder, tokenizer, manager, args)
                print(make_table(results))
                documents.append(scores)
                report[path] = results["results"]
                report["revisions"][path] = results["revision"]
            if args.versus:
                print(f"{args.versus} minus {args.model}, paired by document")
                report["paired"] = list(pair(*documents))
        finally:  # whatever ends it, what has been scored is written
            if args.json and documents:
                write_json(args.json, report)


def pair(first, second):
    """Print and yield the difference of each metric that is a number for each document."""
    for (task, metric, kind), a in first.items():
        try:
            a, b = ([float(x) for x in scores] for scores in (a, second[task, metric, kind]))
        except (TypeError, ValueError):  # as of f1 or a perplexity: pairs, for the task as a whole
            print(f"{task} {metric} {kind}: not paired, a document has no number of its own")
            continue
        gaps = [y - x for x, y in zip(a, b, strict=True)]
        gap, p = sum(gaps) / len(gaps), mcnemar(a, b) if {*a, *b} <= {0, 1} else None
        print(f"{task} {metric} {kind}: {gap:+.4f} ± {stderr(gaps):.4f}"
              + (f"  p = {p:.2g}" if p is not None else ""))
        yield dict(task=task, metric=metric, filter=kind, difference=gap, stderr=stderr(gaps), p=p)


def main():
    parser = Parser(__doc__, "%(prog)s sft|eval [flags]")
    commands = parser.add_subparsers(prog=parser.prog, dest="command", required=True,
                                     metavar="sft|eval")
    train = commands.add_parser("sft", help="supervised fine-tuning", doc=sft.__doc__)
    test = commands.add_parser("eval", help="lm-evaluation-harness", doc=evaluate.__doc__)
    for add in (train.add_argument, test.add_argument):
        add("--model", required=True, help="a folder, or NAME or NAME@REVISION on the hub")
        add("--streams", choices=["qk", "q", "k"], help="which streams to refine (default: the "
            "model's, or qk)")
        add("--inner", choices=INNERS, help="the map of an inner loop, see nanonexus/retrofit.py "
            "(default: the model's, or self, as in model.py)")
        add("--layers", type=whole, nargs="+", help="indices of the layers (default: the model's, "
            "or all)")
        add("--gate", type=number(float, -100, 100), help="initial value of a gate per head; 0 "
            "starts as the original model (default: the model's, or no gate)")
        add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32",
            choices=["float32", "bfloat16"], help="(default: bfloat16 on CUDA, else float32)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
            help="(default: cuda if there is one)")
    add = train.add_argument
    add("--data", required=True, metavar="FILE", help="rows of messages, or of prompt and answer: "
        f"{', '.join(TABLES)}")
    add("--out", required=True, help="folder for the model and its checkpoints")
    add("--order", type=positive_int, help="1 is the control (default: the model's, or 2)")
    add("--epochs", type=number(float, 0, 1e30, above=True), default=3, help="(3)")
    add("--max_steps", type=positive_int, help="instead of --epochs")
    add("--batch", type=positive_int, default=8,
        help="examples that a process packs into a row (8)")
    add("--accumulate", type=positive_int, default=1, help="micro-steps per step (1)")
    add("--lr", type=non_negative, default=1e-5, help="peak learning rate (1e-5)")
    add("--gate_lr", type=non_negative, default=1e-2,
        help="for the gates, which take larger steps (1e-2)")
    add("--warmup", type=non_negative, default=0.03, help="steps or, if < 1, a fraction (0.03)")
    add("--weight_decay", type=non_negative, default=0.0, help="of matrices (0)")
    add("--max_length", type=positive_int, default=4096,
        help="longer examples are skipped (4096)")
    add("--lora", type=positive_int,
        help="rank: train adapters alone, merged into the model at the end")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--save_interval", type=positive_int, default=500, help="steps between checkpoints (500)")
    add("--log_interval", type=positive_int, default=10, help="steps between log lines (10)")
    add("--report_to", default="none", choices=["none", "tensorboard", "wandb"])
    add("--seed", type=whole, default=0, help="for data order, dropout and adapters")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add = test.add_argument
    add("--tasks", type=listed(str), default=["sciq"], help="of the harness, e.g. "
        "hendrycks_math500,aime24,gpqa_diamond_cot_zeroshot,gsm8k (default: sciq)")
    add("--versus", metavar="MODEL", help="a second model: differences paired by document")
    add("--order", type=positive_int, help="run the model at this order instead of its own")
    add("--limit", type=positive_int, help="only the first N documents of each task")
    add("--fewshot", type=whole, help="examples before the question (default: the task's)")
    add("--chat", action="store_true", help="apply the chat template to the questions")
    add("--batch", type=positive_int, default=8, help="questions per batch (8)")
    add("--include_path", metavar="DIR", help="take the tasks from this folder of .yaml files")
    add("--json", metavar="FILE", help="write the scores to this file")
    args = parser.parse_args()
    if args.command == "sft":  # flags not given keep the values of the run
        train.set_defaults(**saved_run(args))
        args = parser.parse_args()
    needed = ["streams", "inner", "layers", "gate"]
    if args.command == "sft" and args.order == 1:
        train.refuse(args, needed, "with --order 1")
    elif args.command == "eval" and args.order is None:
        test.refuse(args, needed, "without --order")
    check_device(args.device)
    try:
        (sft if args.command == "sft" else evaluate)(args)
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[retrofit]'") from error


if __name__ == "__main__":
    run_script(main)
