"""
lm-evaluation-harness: any of its tasks on our models, and its own task files on local data.
"""

import os

import torch

from nanonexus.cli import UserError
from nanonexus.generate import generate_stream
from nanonexus.tasks import TASKS
from nanonexus.tokenizer import EOT


def run_tasks(model, tasks, folder=None, limit=None, **settings):
    """The harness's results for a model (one of its own, or a Scorer) on its tasks.

    tasks: names, patterns or .yaml files. folder: look names up in its .yaml files only.
    limit: only the first documents of each. settings: other arguments of lm_eval.simple_evaluate.
    Raises UserError if the harness is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("this needs lm-evaluation-harness: pip install -e '.[hf]'") from error
    if not isinstance(model, LM):
        model = adapt(model)
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    try:
        return lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit, task_manager=manager,
                                       **settings)
    except KeyError as error:
        if "not a registered task" not in str(error):
            raise
        raise UserError(f"lm-evaluation-harness has no such task: {error.args[0]}") from error


def check_tasks(tasks, folder=None):
    """Raises UserError if the harness (or the folder, see run_tasks) lacks one of the tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    if unknown := set(tasks) - set(manager.all_tasks):
        raise UserError(f"lm-evaluation-harness has no such task: {', '.join(sorted(unknown))}")


def adapt(scorer):
    """A Scorer as a model of the harness."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, size = scorer.tokenizer, scorer.model.config.block_size
    if tokenizer.eot_token is None:
        raise UserError(f"the tokenizer has no {EOT}, which the harness's tasks need")

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return scorer.loglikelihoods([(context, ids) for _, context, ids in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(tokenizer.encode_ordinary(request.args[0]),
                                                    tokenizer.eot_token, size, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(ll for ll, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            return [complete(scorer, *request.args) for request in requests]

    return Adapter()


def complete(scorer, context, settings):
    """The continuation of context, up to one of settings["until"]; greedy unless do_sample.

    settings: those of a harness request."""
    tokenizer = scorer.tokenizer
    stops, new = settings.get("until") or [], settings.get("max_gen_toks", 256)
    stops = [stops] if isinstance(stops, str) else stops
    prompt = tokenizer.encode_ordinary(context) or [tokenizer.eot_token]
    prompt = prompt[-max(1, scorer.model.config.block_size - new):]
    temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0
    ids, text = [], ""
    for token in generate_stream(scorer.model, torch.tensor([prompt], device=scorer.device), new,
                                 temperature, stop=tokenizer.eot_token, vocab=tokenizer.n_vocab):
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if token.item() == tokenizer.eot_token or any(stop in text for stop in stops):
            break
    for stop in [*stops, EOT]:
        text = text.split(stop)[0]
    return text


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
    tasks that write_tasks has written into folder; model as in run_tasks."""
    results = run_tasks(model, [f"ours_{task}" for task in tasks], folder, limit, bootstrap_iters=1)
    documents = {}
    for task in tasks:
        docs = sorted(results["samples"][f"ours_{task}"], key=lambda doc: doc["doc_id"])
        documents[task] = [([float(ll) for ll, _ in doc["filtered_resps"]], doc["acc"],
                            doc["acc_norm"]) for doc in docs]
    return {task: results["results"][f"ours_{task}"] for task in tasks}, documents
