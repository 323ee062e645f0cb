"""
The zero-shot tasks: where their rows are, and how a row becomes a prompt and its choices.

Prompts are lm-evaluation-harness's to the letter. Rows come from the hub, or from a folder with
<task>_<split>.jsonl files of the same columns. `demo` is demo_test.jsonl next to this file: 60
questions in SciQ's format, written for this project.
"""

import hashlib
import itertools
import json
import os
import re
from typing import NamedTuple

from nanonexus.cli import UserError
from nanonexus.data import load_hub
from nanonexus.files import sha256
from nanonexus.text import rows

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
    return Doc("Question: " + row["question"] + "\nAnswer:", row["choices"]["text"],
               labels.index(row["answerKey"]))


def hellaswag(row):
    def clean(text):  # the order matters: strip() first, and one pass over double spaces
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()  # which lower-cases the rest
    return Doc(clean(row["activity_label"] + ": " + context), [clean(e) for e in row["endings"]],
               int(str(row["label"])))


def logiqa(row):
    options = "".join(f"{letter}. {option}\n"
                      for letter, option in zip("ABCD", row["options"], strict=True))
    return Doc("Passage: " + row["context"] + "\nQuestion: " + row["question"] + "\nChoices:\n"
               + options + "Answer:", row["options"], list("abcd").index(row["label"].strip()))


def piqa(row):
    return Doc("Question: " + row["goal"] + "\nAnswer:", [row["sol1"], row["sol2"]],
               int(str(row["label"])))


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


def read_task(name, folder=None, limit=None, split=None):
    """(documents, sha256 of the data) of a task, from folder if given, else from the hub.

    limit: only the first N documents. split: another than the one that counts. Raises UserError,
    naming the row, if one cannot be read.
    """
    read = TASKS[name][3]
    found, source, digest = (read_file if folder or name == "demo" else read_hub)(
        name, folder, split or TASKS[name][2])
    docs = []
    for place, row in itertools.islice(found, limit):
        try:
            doc = read(row)
            if not isinstance(doc.choices, list) or not 0 <= doc.gold < len(doc.choices) \
                    or not all(isinstance(text, str) and text for text in doc.choices):
                raise ValueError("a choice is empty or not text, or the gold index is out of range")
        except KeyError as error:
            raise UserError(f"{place}: no column {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{place} is not a row of {name}: {str(error):.200}") from error
        docs.append(doc)
    if not docs:
        raise UserError(f"{source} has no rows")
    return docs, digest


def read_file(name, folder, split):
    """((place, row) of each row, their path, sha256 of the file) from folder; demo's is in this
    one."""
    repo = TASKS[name][0]
    path = os.path.join(HERE if name == "demo" else folder, f"{name}_{split}.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}: task {name} needs it, with the columns of {repo}, or "
                        "leave out --data to read the hub")
    return rows(path), path, sha256(path)


def read_hub(name, folder, split):
    """((place, row) of each row, their repository, sha256 of the rows) from the hub."""
    repo, config = TASKS[name][:2]
    try:
        found = list(load_hub(repo, config, split))
    except UserError as error:
        raise UserError(f"{error}; with no network, give --data DIR with a file "
                        f"{name}_{split}.jsonl") from error
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return ((f"{repo}, row {i}", row) for i, row in enumerate(found, 1)), repo, digest
