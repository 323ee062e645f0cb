"""What several tests use: scripts in this process, what a figure must have, rows of every task, a
small random GPT-NeoX folder, two checkpoints of ours, a choice's log-likelihood without cache or
batch, and the harness's of the same rows."""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict, replace
from typing import Literal, get_args

import figures
import pytest
import torch

from model import GPT, CausalSelfAttention, GPTConfig, attend
from nanonexus.checkpoint import probe, save_checkpoint
from nanonexus.cli import run_script
from nanonexus.tasks import TASKS
from nanonexus.tokenizer import EOT

# Rows in the hub's columns. Each trap of the scoring rules has a row.
LONG = "The river carries sand and clay to the sea, where they sink and slowly turn into rock. " * 4
ROWS = {
    "sciq": [
        dict(support="  \n Ice melts at 0 °C.", question="When does ice melt?", distractor1="never",
             distractor2="at 10 °C", distractor3="at 50 °C", correct_answer="at 0 °C"),
        dict(support="", question="What do bees make?", distractor1="milk", distractor2="silk",
             distractor3="wax and milk", correct_answer="honey"),  # begins with a newline
        dict(support=LONG, question="What carries sand?", distractor1="the wind",  # does not fit
             distractor2="a bird", distractor3="rain that falls on the sea", correct_answer="it"),
        dict(support="Trailing space. ", question="Same?", distractor1="yes", distractor2="yes",
             distractor3="yes", correct_answer="yes"),  # all tie: the first wins, it is wrong
    ],
    "arc_easy": [
        dict(question="Pick three.", choices=dict(text=["one", "two", "three"], label=list("123")),
             answerKey="3"),
        dict(question="Pick five.", choices=dict(text=["a", "bb", "ccc", "dd dd", "five 5"],
                                                 label=list("ABCDE")), answerKey="E")],
    "arc_challenge": [
        dict(question="Which is naïve?", choices=dict(text=["Łódź", "🙂🙂", "é", "naïve answer"],
                                                      label=list("ABCD")), answerKey="D")],
    "hellaswag": [
        dict(activity_label="Baking [x]", ctx_a="A man [header] mixes.", ctx_b="he Pours The MILK",
             endings=["[step] and stirs  it   well", "on the [substeps] floor", "for Bob", "away "],
             label="2", ind=1),
        dict(activity_label="Removing ice", ctx_a="She scrapes. [title] Then", ctx_b="",
             endings=["goes [title] on.", "sleeps", "stops [step]", "runs off"], label="0", ind=2),
        dict(activity_label="Query ends", ctx_a="in white", ctx_b="space [step]",
             endings=["one", "two", "three", "four"], label="3", ind=3)],
    "logiqa": [
        dict(label=" b\n", context="All men are mortal.", question="What follows?",
             options=["Nothing.", "Some are mortal.", "None.", "Men are stones."])],
    "piqa": [dict(goal="Open a jar", sol1="twist the lid", sol2="sing to it", label=0),
             dict(goal="Dry hair", sol1="use a fork", sol2="use a towel ", label=1)],
}


def call(main, *argv):
    """(exit status, stdout, stderr) of a script, in this process."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        try:
            run_script(main)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), errors.getvalue()


def done(main, *argv):
    """What a script prints that ends well."""
    status, out, errors = call(main, *argv)
    assert status == 0, errors
    return out


def refused(main, *argv):
    """What a script says, in one line, of a mistake before its work."""
    status, _, errors = call(main, *argv)
    assert status == 2 and errors.count("\n") == 1
    return errors


def drawn(path, variants):
    """The SVG, which has the name and the colour of each of these variants, and no pictures."""
    svg = path.read_text()
    assert "<image" not in svg  # lines and text alone
    for name in variants:
        assert f">{name}<" in svg, f"no label says {name}"
        assert figures.style(name.removesuffix("-gated"))["color"] in svg, f"{name} has no line"
    return svg


def write_rows(folder, rows):
    for task, lines in rows.items():
        path = os.path.join(folder, f"{task}_{TASKS[task][2]}.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in lines)


@pytest.fixture(scope="session")
def neox(tmp_path_factory):
    """A folder with a random GPT-NeoX, a tokenizer made of the rows' text, and the rows."""
    transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("neox")
    write_rows(folder, ROWS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([json.dumps(ROWS, ensure_ascii=False)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                                eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=448, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=96))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # scores that differ clearly
    model.save_pretrained(folder)
    return folder


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


def add_inner_step(monkeypatch, name="again"):
    """What a student writes into model.py: a word in the type and a case, here `past`'s own."""
    field, step = GPTConfig.__dataclass_fields__["nexus_inner"], CausalSelfAttention.inner_step

    def with_case(self, n, h, s, ctx, loop):
        if self.config.nexus_inner == name:
            return s + attend(h[n], h[n], s, ctx, loop, strict=True)
        return step(self, n, h, s, ctx, loop)

    longer = Literal[(*get_args(field.type), name)]
    monkeypatch.setattr(field, "type", longer)
    monkeypatch.setitem(GPTConfig.__annotations__, "nexus_inner", longer)
    monkeypatch.setattr(CausalSelfAttention, "inner_step", with_case)


def save(gpt, path, **others):
    """A checkpoint as train.py writes it, as far as readers need it."""
    save_checkpoint(str(path), dict(model=gpt.state_dict(), probe=probe(gpt),
                                    config=asdict(gpt.config), step=0, tokenizer="bytes") | others)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two checkpoints of ours, on bytes: order 1 and order 2."""
    folder, paths = tmp_path_factory.mktemp("ours"), []
    config = GPTConfig(vocab_size=320, block_size=512, n_layer=1, n_head=2, n_embd=32,
                       rotary_pct=1.0)
    for order in (1, 2):
        torch.manual_seed(order)
        c = replace(config, nexus_order=order)
        paths.append(str(folder / f"order{order}.pt"))
        save(GPT(c), paths[-1])
    return paths


def plain_ll(scorer, context, continuation):
    """One choice, by the rules, without cache or batch."""
    seq = (context + continuation)[-(scorer.model.config.block_size + 1):]
    with torch.no_grad():
        lp = scorer.model(torch.tensor([seq[:-1]]))[0].log_softmax(-1)
    rows = lp[-len(continuation):]
    return rows[range(len(continuation)), continuation].sum().item(), \
        rows.argmax(-1).tolist() == continuation


def write_tasks(tasks, data, out):
    """Write the harness's own files for some of TASKS into the folder out, under the names
    ours_<task>, pointed at <task>_<split>.jsonl in the folder data."""
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


def score_documents(model, tasks, folder, limit=None):
    """({task: its metrics}, {task: [(log-likelihoods, acc, acc_norm) of each document]}) of the
    tasks that write_tasks has written into folder; model: one of the harness's."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model, tasks=[f"ours_{task}" for task in tasks], limit=limit, bootstrap_iters=1,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    documents = {}
    for task in tasks:
        docs = sorted(results["samples"][f"ours_{task}"], key=lambda doc: doc["doc_id"])
        documents[task] = [([float(ll) for ll, _ in doc["filtered_resps"]], doc["acc"],
                            doc["acc_norm"]) for doc in docs]
    return {task: results["results"][f"ours_{task}"] for task in tasks}, documents
