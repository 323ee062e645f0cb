"""
lm-evaluation-harness: any of its tasks on our models.
"""

import inspect

import torch

from nanonexus.cli import UserError
from nanonexus.generate import generate_stream
from nanonexus.scoring import count_cut
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
        eot_token_id, prefix_token_id = tokenizer.eot_token, scorer.bos_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return (scorer.encode if add_special_tokens is None else
                    tokenizer.encode_ordinary)(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return scorer.loglikelihoods([(context, ids) for _, context, ids in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(scorer.encode(request.args[0]),
                                                    scorer.bos_token, size, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(ll for ll, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            prompts = [scorer.encode(request.args[0]) or [scorer.bos_token] for request in requests]
            wanted = [dict(max_gen_toks=256) | request.args[1] for request in requests]
            rooms = [room(size, **settings) for settings in wanted]
            for most in sorted(set(rooms)):
                count_cut("generation", [len(prompt) for prompt, own in
                                         zip(prompts, rooms, strict=True) if own == most], most)
            return [complete(scorer, prompt[-most:], **settings) for prompt, most, settings
                    in zip(prompts, rooms, wanted, strict=True)]

    return Adapter()


def room(size, max_gen_toks, **settings):
    """How many tokens of a context of `size` are left for the prompt. UserError if there are none,
    or for a setting of a harness request that complete does not have."""
    known = inspect.signature(complete).parameters
    if unknown := ", ".join(name for name in settings if name not in known):
        raise UserError(f"the task generates with {unknown}, which is not supported here")
    if max_gen_toks >= size:
        raise UserError(f"the task generates max_gen_toks = {max_gen_toks} tokens, which leaves no "
                        f"room for a prompt in the model's context of {size}")
    return size - max_gen_toks


def complete(scorer, prompt, max_gen_toks, until=(), do_sample=None, temperature=None, top_k=None,
             top_p=None):
    """The text that follows the ids of prompt, up to one of `until`; greedy unless the settings of
    the harness request, the other arguments, say do_sample or a temperature."""
    tokenizer, ids, text = scorer.tokenizer, [], ""
    end = tokenizer.eot_token
    if temperature is None or do_sample is False:
        temperature = 1.0 if do_sample else 0.0
    stops = [stop for stop in ([until] if isinstance(until, str) else until or []) if stop]
    for token in generate_stream(scorer.model, torch.tensor([prompt], device=scorer.device),
                                 max_gen_toks, temperature, top_k or None, top_p,
                                 stop=end, vocab=tokenizer.n_vocab):
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if ids[-1] == end or any(stop in text for stop in stops):
            break
    for stop in [*stops, tokenizer.decode([end])]:
        text = text.split(stop)[0]
    return text
