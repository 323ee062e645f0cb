"""
lm-evaluation-harness: its tasks on its models of transformers.
"""

from nanonexus.cli import UserError


def run_tasks(model, tasks, folder=None, limit=None, **settings):
    """The harness's results for one of its models on its tasks.

    tasks: names, patterns or .yaml files. folder: look names up in its .yaml files only.
    limit: only the first documents of each. settings: other arguments of lm_eval.simple_evaluate.
    Raises UserError if the harness is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("this needs lm-evaluation-harness: pip install -e '.[hf]'") from error
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
