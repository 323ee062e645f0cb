"""
Nexus inside pretrained models of transformers: Qwen2.5, Llama, Mistral, Pythia and their like.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B")
    nexus(model, order=2)                 # in place; no weight is added or changed
    nexus(model, order=1)                 # the original again

    python retrofit.py sft --model Qwen/Qwen2.5-1.5B --data train.jsonl --order 2 --out DIR
    python retrofit.py eval --model DIR --tasks gsm8k --versus OTHER

Every decoder here turns its queries and keys by one function, apply_rotary_pos_emb, just before it
attends. That is where Nexus comes in: what is to be turned is first refined, by loops of the
model's own attention (same mask, scaling and backend). All else is the model's own code.
"""

import argparse
import copy
import functools
import importlib
import inspect
import json
import os
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn as nn

from checkpoint import check_device
from data import Parser, UserError, run_script
from eval_sciq import mcnemar, stderr, write_json
from hf import fetch
from model import ModelError

# Shapes in comments: B batch, T new tokens, S all tokens seen, H query heads, K key heads (fewer,
# with grouped queries), D head width.

# Tested, with their mask, cache and scaling. Others turn only a part of each head, or not always.
FAMILIES = ("gemma", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "qwen2",
            "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")


# --- the retrofit ---------------------------------------------------------------------------------

class Turn(NamedTuple):
    """What refining needs, carried to the rotary function in the place of its cosines."""

    attention: nn.Module
    cos: torch.Tensor
    mask: object  # as the model made it: None, a tensor or a BlockMask
    cache: object
    extra: dict  # what else the model hands to its attention


class Heads:
    """What transformers' attention functions ask a module for, where each head has its own key."""

    num_key_value_groups, is_causal = 1, True

    def __init__(self, attention):
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.training = attention.training


class Gate(nn.Module):
    """One number a head, h <- s + g (h - s): 0 is the original model, 1 is Nexus."""

    def __init__(self, heads, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, 1, 1), float(start)))

    def forward(self, s, h):
        return s + self.weight * (h - s)


class Nexus:
    """Comes before a model's own attention class: both together are that attention, refined."""

    def forward(self, *args, **kwargs):
        given = dict(zip(self.nexus_names, args, strict=False)) | kwargs
        cos, sin = given["position_embeddings"]
        extra = {k: v for k, v in given.items() if k not in self.nexus_names}
        cache = given.get("past_key_values", given.get("layer_past"))
        turn = Turn(self, cos, given.get("attention_mask"), cache, extra)
        return self.nexus_forward(**given | dict(position_embeddings=(turn, sin)))

    def refine(self, s, rotary, turn):
        """h <- Attn(h, h, s), order - 1 times, of streams s (B, heads, T, D) before rotary: as
        Attention.refine in model.py, the reading `self`."""
        h, values, attend = s, s, attention_function(self)
        for loop in range(1, self.nexus_order):
            query = key = rotary(h)
            if turn.cache is not None:  # the values are those of the first loop: kept once
                new = s if loop == 1 else s[..., :0]
                key, seen = keep(turn.cache, self.layer_idx, loop, key, new)
                values = seen if loop == 1 else values
            h = attend(Heads(self), query, key, values, turn.mask, dropout=0.0,
                       scaling=self.scaling, sliding_window=getattr(self, "sliding_window", None),
                       **turn.extra)[0].transpose(1, 2)  # they give (B, T, heads, D)
        return self.nexus_gate(s, h) if self.nexus_gate is not None else h


def attention_function(attention):
    """The backend that the model's config names: sdpa, eager, flex_attention, ..."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = attention.nexus_forward.__globals__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, eager)


def keep(cache, layer, loop, key, value):
    """Append to what this loop of this layer has seen, (B, heads, S, D) each. It is a layer more of
    the model's own cache, of the kind its own layer has: beams, windows and cropping follow."""
    while len(cache.layers) <= layer:  # a cache that grows as layers come
        cache.layers.append(cache.layer_class_to_replicate())
    places = cache.__dict__.setdefault("nexus", {})  # (layer, loop) -> index in cache.layers
    if (layer, loop) not in places:
        own = cache.layers[layer]
        if own.is_initialized and own.get_seq_length():
            raise ModelError("this cache was filled before nexus(): begin with a new one")
        fresh = copy.deepcopy(own)
        fresh.is_initialized = False
        places[layer, loop] = len(cache.layers)
        cache.layers.append(fresh)
    return cache.update(key, value, places[layer, loop])


def refined_rotary(rotary):
    """apply_rotary_pos_emb of a model's file, with Nexus before it."""
    def apply(q, k, turn, sin, *args, **kwargs):
        attention, H = turn.attention, q.size(1)

        def turned(h):
            return rotary(h, h[:, :0], turn.cos, sin, *args, **kwargs)[0]

        if attention.nexus_streams == "qk":  # side by side as H + K heads: one call for both
            q, k = attention.refine(torch.cat([q, k], dim=1), turned, turn).split(
                [H, k.size(1)], dim=1)
        elif attention.nexus_streams == "q":
            q = attention.refine(q, turned, turn)
        else:
            k = attention.refine(k, turned, turn)
        return rotary(q, k, turn.cos, sin, *args, **kwargs)

    return apply


@functools.cache
def nexus_class(attention_class):
    """attention_class with Nexus before it: its own forward, but with refined_rotary in scope."""
    forward = inspect.unwrap(attention_class.forward)
    scope = dict(forward.__globals__)
    scope["apply_rotary_pos_emb"] = refined_rotary(scope["apply_rotary_pos_emb"])
    scope.pop("__name__")  # else torch.compile would look its names up in their file
    refined = FunctionType(forward.__code__, scope, "forward", forward.__defaults__,
                           forward.__closure__)
    names = [p.name for p in inspect.signature(forward).parameters.values()
             if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return type("Nexus" + attention_class.__name__, (Nexus, attention_class),
                dict(nexus_forward=refined, nexus_names=names))


def attentions(model):
    """The decoder's attention modules, in order. ModelError if Nexus does not fit this model."""
    family = getattr(model.config, "model_type", None)
    if family not in FAMILIES:
        raise ModelError(f"nexus() knows the rotary decoders {', '.join(FAMILIES)}; this model is "
                         f"{family!r}")
    return [m for m in model.modules()
            if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def nexus(model, order=2, streams="qk", layers=None, gate=None):
    """Turn a causal language model of transformers into its Nexus version, in place; returns it.

    order: 1 gives the original back, m > 1 adds m - 1 inner loops to each attention.
    streams: what is refined, "qk", "q" or "k". layers: numbers of the layers (None: all).
    gate: None, or what a new parameter a head and stream starts at; 0 starts as the original model,
    since at order 2 without a gate a pretrained model changes at once.
    Asked again with the same settings, it keeps what the gates have learnt.
    The settings stand in model.config.nexus: save_pretrained writes them, load() obeys them.
    Raises ModelError if they are out of range, or the model is of no family in FAMILIES.
    """
    if type(order) is not int or order < 1:
        raise ModelError(f"order must be a whole number from 1 up, got {order!r}")
    if streams not in ("qk", "q", "k"):
        raise ModelError(f"streams must be qk, q or k, got {streams!r}")
    modules = attentions(model)
    chosen = range(len(modules)) if layers is None else layers
    for i in chosen:
        if type(i) is not int or not 0 <= i < len(modules):
            raise ModelError(f"layers must be from 0 to {len(modules) - 1}, got {i!r}")
    if gate is not None and order == 1:
        raise ModelError("a gate needs order 2 or more: order 1 has nothing to let through")

    settings = dict(order=order, streams=streams, gate=gate,
                    layers=None if layers is None else list(layers))
    if any(isinstance(m, Nexus) for m in modules) and model.config.nexus == settings:
        return model  # as it is, with the gates it has learnt
    for attention in modules:  # the original, whatever it was before
        if isinstance(attention, Nexus):
            attention.__class__ = type(attention).__bases__[1]
            del attention.nexus_gate
    model.config.__dict__.pop("nexus", None)
    if order == 1:
        return model
    for i in set(chosen):
        attention, c = modules[i], model.config
        attention.__class__ = nexus_class(type(attention))
        attention.nexus_order, attention.nexus_streams = order, streams
        query, key = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
        heads = {"qk": query + key, "q": query, "k": key}[streams]
        device = next(attention.parameters()).device
        attention.nexus_gate = None if gate is None else Gate(heads, gate).to(device, model.dtype)
    model.config.nexus = settings
    return model


def load(path, **kwargs):
    """A model as save_pretrained left it, Nexus or not; kwargs go to from_pretrained.

    (from_pretrained alone would give the original attention with those weights.) Raises ModelError
    if its config.json has settings that nexus() does not take, or gates are missing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if settings := getattr(config, "nexus", None):  # gates are read below, with nothing said here
        own = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        own._keys_to_ignore_on_load_unexpected = ["nexus_gate"]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if settings:
        try:
            nexus(model, **settings)
        except TypeError as error:
            raise ModelError(f"{path}: config.json has no settings of nexus() ({error})") from error
        load_gates(model, path)
    return model


def load_gates(model, path):
    """Give the gates their saved values: they are no weights of the model's own class, which has
    left them out."""
    from safetensors import safe_open

    gates = {name: p for name, p in model.named_parameters() if "nexus_gate" in name}
    folder = fetch(path) if gates else ""
    for name in sorted(os.listdir(folder)) if gates else []:
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                for key in gates.keys() & file.keys():
                    gates.pop(key).data.copy_(file.get_tensor(key))
    if gates:
        raise ModelError(f"{path} says that it has gates, but not {min(gates)}")


# --- supervised fine-tuning -----------------------------------------------------------------------

def read_examples(path, tokenizer, max_length):
    """[{input_ids, labels}] of a .jsonl file; labels are -100 but on the answers.

    A line is {"messages": [{"role", "content"}, ...]}, for the tokenizer's chat template, or
    {"prompt", "answer"}, joined as they are. Raises UserError, naming the line.
    """
    from jinja2 import TemplateError

    examples, long = [], 0
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                turns = row["messages"] if "messages" in row else None
                ids, answers = chat(turns, tokenizer) if turns else plain(row, tokenizer)
            except (ValueError, KeyError, TypeError, TemplateError) as error:
                raise UserError(
                    f"{path}, line {number}: needs messages (with role and content), or prompt and "
                    f"answer ({type(error).__name__}: {error})") from error
            if len(ids) > max_length:
                long += 1
            elif any(answers):
                labels = [i if answer else -100 for i, answer in zip(ids, answers, strict=True)]
                examples.append(dict(input_ids=ids, labels=labels))
    if long:
        print(f"{long} examples of more than {max_length} tokens are left out (--max_length)")
    if not examples:
        raise UserError(f"{path} has no example with an answer of up to {max_length} tokens")
    return examples


def plain(row, tokenizer):
    """Ids of prompt, answer and the end of text, and which of them are the answer's."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    answer = answer + [tokenizer.eos_token_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def chat(messages, tokenizer):
    """Ids of a conversation, and which of them are the assistant's (with what ends its turn)."""
    def ids(n, **kwargs):
        return tokenizer.apply_chat_template(messages[:n], return_dict=False, **kwargs)

    whole = ids(len(messages))
    answers = [False] * len(whole)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = ids(n, add_generation_prompt=True), ids(n + 1)
            if whole[:len(after)] != after or after[:len(before)] != before:
                raise ValueError("the chat template does not write a conversation turn by turn")
            answers[len(before):len(after)] = [True] * (len(after) - len(before))
    return whole, answers


def pretrained(loader, path, **kwargs):
    """loader(path); UserError if it is neither a folder of transformers nor on the hub."""
    try:
        return loader(path, **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load {path}: give a folder, or a name on the hub and a network "
                        f"({reason})") from error


def sft(args):
    """Fine-tune on the answers of args.data; --order 1 is the control. The folder is then a model
    for load(). Examples of a batch are packed into one row, and positions that begin anew keep each
    from seeing the others, in the inner loops too."""
    from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(args.out) if os.path.isdir(args.out) else None
    if args.resume and newest is None:
        raise UserError(f"no checkpoint in {args.out} to --resume: drop the flag to begin")
    if os.path.isdir(args.out) and os.listdir(args.out) and not args.resume:
        raise UserError(f"{args.out} is not empty: --resume goes on with it, another --out starts "
                        "anew")
    if args.report_to != "none":
        importlib.import_module(args.report_to)  # is it there?
    torch.manual_seed(args.seed)
    tokenizer = pretrained(AutoTokenizer.from_pretrained, args.model)
    examples = read_examples(args.data, tokenizer, args.max_length)
    # trained weights are float32, products args.dtype; under adapters the weights stay as they are
    model = pretrained(load, args.model, dtype=args.dtype if args.lora else "float32")
    nexus(model, args.order, args.streams, args.layers, args.gate)
    if args.lora:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear",
            modules_to_save=None if args.gate is None else ["nexus_gate"]))
    settings = TrainingArguments(
        output_dir=args.out, num_train_epochs=args.epochs, max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
        lr_scheduler_type="cosine", warmup_steps=args.warmup, seed=args.seed,
        bf16=args.dtype == "bfloat16", logging_steps=args.log_interval, report_to=args.report_to,
        save_steps=args.save_interval, save_total_limit=2, use_cpu=args.device == "cpu",
        use_cache=False)  # a cache would join packed examples
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    gates, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (gates if "nexus_gate" in name else matrices if p.dim() > 1 else rest).append(p)
    optimizer = torch.optim.AdamW([
        dict(params=matrices, weight_decay=args.weight_decay), dict(params=rest),
        dict(params=gates, lr=args.gate_lr)], lr=args.lr, weight_decay=0)
    trainer = Trainer(model=model, args=settings, train_dataset=examples,
                      data_collator=DataCollatorWithFlattening(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=newest if args.resume else None)
    if args.lora:
        model = model.merge_and_unload()
    model.config.use_cache = True
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    trainer.save_state()  # trainer_state.json: every logged loss
    print(f"wrote {args.out}; score it with: python retrofit.py eval --model {args.out}")


# --- scores ---------------------------------------------------------------------------------------

def score(path, args):
    """{(task, metric, filter): a list of one score a document}, and lm-eval's own results."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer.from_pretrained, path)
    manager = TaskManager(include_path=args.include_path,
                          include_defaults=args.include_path is None)
    if unknown := set(args.tasks) - set(manager.all_tasks):
        raise UserError(f"lm-evaluation-harness has no such task: {', '.join(sorted(unknown))}")
    model = pretrained(load, path, dtype=args.dtype).to(args.device).eval()
    if args.order is not None:
        nexus(model, args.order, args.streams, args.layers, args.gate)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
    results = lm_eval.simple_evaluate(
        model=harness, tasks=args.tasks, limit=args.limit, num_fewshot=args.fewshot,
        apply_chat_template=args.chat, log_samples=True, bootstrap_iters=0, task_manager=manager)
    documents = {}
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                documents.setdefault((task, metric, sample["filter"]), []).append(sample[metric])
    return documents, results


def evaluate(args):
    """Print lm-eval's table for --model and, beside another, the differences paired by document."""
    from lm_eval.utils import make_table

    first, results = score(args.model, args)
    print(make_table(results))
    report = {args.model: results["results"]}
    if args.versus:
        second, results = score(args.versus, args)
        print(make_table(results))
        report |= {args.versus: results["results"], "paired": []}
        print(f"{args.versus} minus {args.model}, paired by document")
        for (task, metric, kind), a in first.items():
            b = second[task, metric, kind]
            gaps = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
            gap, p = sum(gaps) / len(gaps), mcnemar(a, b) if {*a, *b} <= {0, 1} else None
            print(f"{task} {metric} {kind}: {gap:+.4f} ± {stderr(gaps):.4f}"
                  + (f"  p = {p:.2g}" if p is not None else ""))
            report["paired"].append(dict(task=task, metric=metric, filter=kind, difference=gap,
                                         stderr=stderr(gaps), p=p))
    if args.json:
        write_json(args.json, report)


def number(kind, least):
    """The type of a flag that is an int or a float from `least` up."""
    def read(text):
        value = kind(text)
        if not least <= value < 2**31:  # nan neither
            raise argparse.ArgumentTypeError(f"must be a number from {least} up, got {text}")
        return value

    read.__name__ = kind.__name__  # in argparse's own message
    return read


def main():
    parser, whole, share = Parser(__doc__), number(int, 1), number(float, 0)
    commands = parser.add_subparsers(dest="command", required=True, metavar="sft|eval")
    train = commands.add_parser("sft", help="supervised fine-tuning", doc=sft.__doc__)
    test = commands.add_parser("eval", help="lm-evaluation-harness", doc=evaluate.__doc__)
    for add in (train.add_argument, test.add_argument):
        add("--model", required=True, help="a folder, or a name on the hub")
        add("--streams", default="qk", choices=["qk", "q", "k"], help="refined (default: qk)")
        add("--layers", type=number(int, 0), nargs="+", help="numbers of the layers (default: all)")
        add("--gate", type=number(float, -100), help="start of a gate a head; 0 starts as the "
            "original model (default: no gate)")
        add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32",
            choices=["float32", "bfloat16"])
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add = train.add_argument
    add("--data", required=True, metavar="FILE", help=".jsonl: messages, or prompt and answer")
    add("--out", required=True, help="folder for the model and its checkpoints")
    add("--order", type=whole, default=2, help="1 is the control (default: 2)")
    add("--epochs", type=share, default=3)
    add("--max_steps", type=whole, help="instead of --epochs")
    add("--batch", type=whole, default=8, help="examples that a process packs into a row (8)")
    add("--accumulate", type=whole, default=1, help="micro-steps a step (1)")
    add("--lr", type=share, default=1e-5)
    add("--gate_lr", type=share, default=1e-2, help="of the gates, which have a way to go (1e-2)")
    add("--warmup", type=share, default=0.03, help="steps, or a share of all (0.03)")
    add("--weight_decay", type=share, default=0.0)
    add("--max_length", type=whole, default=4096, help="longer examples are left out (4096)")
    add("--lora", type=whole, help="rank: train adapters alone, merged into the model at the end")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--save_interval", type=whole, default=500, help="steps between checkpoints (500)")
    add("--log_interval", type=whole, default=10, help="steps between log lines (10)")
    add("--report_to", default="none", choices=["none", "tensorboard", "wandb"])
    add("--seed", type=number(int, 0), default=0, help="of the data's order, dropout and adapters")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add = test.add_argument
    add("--tasks", type=lambda text: text.split(","), default=["sciq"], help="of the harness, e.g. "
        "hendrycks_math500,aime24,gpqa_diamond_cot_zeroshot,gsm8k (default: sciq)")
    add("--versus", metavar="MODEL", help="a second model: differences paired by document")
    add("--order", type=whole, help="read the model at this order instead of its own")
    add("--limit", type=whole, help="only the first N documents of each task")
    add("--fewshot", type=number(int, 0), help="examples before the question (default: the task's)")
    add("--chat", action="store_true", help="put questions into the chat template")
    add("--batch", type=whole, default=8, help="questions at once (8)")
    add("--include_path", metavar="DIR", help="take the tasks from this folder of .yaml files")
    add("--json", metavar="FILE", help="write the scores here")
    args = parser.parse_args()
    check_device(args.device)
    try:
        (sft if args.command == "sft" else evaluate)(args)
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[retrofit]'") from error


if __name__ == "__main__":
    run_script(main, ModelError)
