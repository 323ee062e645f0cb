"""
The zero-shot tasks: where their rows are, and how a row becomes a prompt and its choices.

Prompts are lm-evaluation-harness's to the letter. Rows come from the hub, or from a folder with
<task>_<split>.jsonl files of the same columns. `demo` is demo_test.jsonl next to this file: 60
questions in SciQ's format, written for this project.
"""

import hashlib
import json
import os
import re
from typing import NamedTuple

from nanonexus.cli import UserError
from nanonexus.data import load_hub
from nanonexus.files import sha256

HERE = os.path.dirname(os.path.abspath(__file__))


class Doc(NamedTuple):
    """A question: score each of " " + choice after context."""

    context: str
    choices: list  # of str
    gold: int  # index of the correct one


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
BENCHMARKS = [name for name in TASKS if name != "demo"]


def read_task(name, folder=None, limit=None):
    """(documents, sha256 of the data) of a task, from folder if given, else from the hub.

    limit: only the first N documents. Raises UserError, naming the row, if one cannot be read.
    """
    read = TASKS[name][3]
    rows, source, unit, digest = (read_file if folder or name == "demo" else read_hub)(name, folder)
    docs = []
    for number, row in enumerate(rows[:limit], 1):
        where = f"{source}, {unit} {number}"
        try:
            doc = read(json.loads(row) if isinstance(row, str) else row)
            if not all(isinstance(text, str) and text for text in doc.choices) \
                    or not 0 <= doc.gold < len(doc.choices):
                raise ValueError("a choice is empty or not text, or the gold index is out of range")
        except KeyError as error:
            raise UserError(f"{where}: no column {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} is not a row of {name}: {error}") from error
        docs.append(doc)
    if not docs:
        raise UserError(f"{source} has no rows")
    return docs, digest


def read_file(name, folder):
    """(rows as JSON, their path, "line", sha256 of the file) from folder; demo's is in this one."""
    repo, _, split, _ = TASKS[name]
    path = os.path.join(HERE if name == "demo" else folder, f"{name}_{split}.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}: task {name} needs it, with the columns of {repo}, or "
                        "leave out --data to read the hub")
    try:
        with open(path, encoding="utf-8") as f:
            rows = [line for line in f.read().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return rows, path, "line", sha256(path)


def read_hub(name, folder=None):
    """(rows as dicts, their repository, "row", sha256 of the rows) from the hub."""
    repo, config, split, _ = TASKS[name]
    try:
        rows = list(load_hub(repo, config, split))
    except UserError as error:
        raise UserError(f"{error}; with no network, give --data DIR with a file "
                        f"{name}_{split}.jsonl") from error
    return rows, repo, "row", hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
