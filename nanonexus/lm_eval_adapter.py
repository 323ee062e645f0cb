"""
lm-evaluation-harness: any of its tasks on our models.
"""

import torch

from nanonexus.cli import UserError
from nanonexus.generate import generate_stream
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
