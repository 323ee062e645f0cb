"""homework.ipynb can be solved, and its checks find what is missing or wrong, each in its place."""

import inspect
import os
import sys

import pytest
import recall
from homework_solutions import SOLUTIONS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# an exercise, a line of its solution, what a student might write instead, what the check says then
WRONG = [
    ("exercise-1", "attn(h, h, s) if", "attn(h, h, h) if", "order=3: the logits are not"),
    ("exercise-1", "return h", "return h + s.mean(2, keepdim=True) * (order > 1)", "not causal"),
    ("exercise-1", "h = s\n", "h = s.detach()\n", "wrong gradient"),
    ("exercise-2", "return not torch.equal(*said)", "return not gpt.config.parallel_residual",
     "measure, do not read the config"),
    ("exercise-2", "    replaced.remove()\n", "", "remove your hooks"),
    ("exercise-2", '"parallel_residual": False', '"nexus_inner": "past"', "still does not see"),
    ("exercise-3", "2 * attentions", "(1 + attentions)", "the cache keeps 48 floats"),
    ("exercise-4", 'previous(v, ctx, "v", first_stays=True)',
     "torch.cat([v[:, :, :1], v[:, :, :-1]], 2)", "with a cache it says something else"),
    ("exercise-4", 'previous(v, ctx, "v", first_stays=True)', "v.roll(1, 2)", "the first token"),
    ("exercise-4", "self.shift.sigmoid()", "self.shift.sigmoid().detach()", "no gradient"),
    ("exercise-5", 'gap["low"] >', 'gap["mean"] >', "the seeds contradict each other"),
    ("exercise-5", "> smallest", "> 0", "50 times less than `smallest`"),
    ("exercise-5", '"baseline", "key-shift"', '"baseline"', "held against the key shift too"),
    ("exercise-5", "lr_seed=1000", "lr_seed=3", "must not count once more"),
]


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("scipy")  # nanonexus.stats
    return nbformat.read(os.path.join(ROOT, "homework.ipynb"), as_version=4)


def cells(notebook):
    """{tag: cell} of the cells that have one."""
    tagged = {cell.metadata.tags[0]: cell for cell in notebook.cells if cell.metadata.get("tags")}
    assert len(tagged) == 1 + 2 * len(SOLUTIONS) + 2  # setup, exercises, checks, the comparison
    return tagged


def solution(exercise):
    return "\n\n".join(inspect.getsource(part) for part in SOLUTIONS[exercise])


def test_it_is_saved_unsolved_and_runs_solved(notebook):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("<details>") == text.count("</details>") == len(SOLUTIONS)  # hints
    assert not any(cell.get("outputs") for cell in notebook.cells)
    tagged = cells(notebook)
    for exercise in SOLUTIONS:
        code = [line.strip() for line in solution(exercise).splitlines() if len(line.strip()) > 25
                and not line.strip().startswith(("def ", "class ", "super()"))]
        assert code and not any(line in text for line in code)  # no answer in the notebook
        assert "raise NotImplementedError" in tagged[exercise].source
        tagged[exercise].source = solution(exercise)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources=dict(metadata=dict(path=ROOT))).execute()
    printed = {tag: "".join(output.get("text", "") for output in cell.outputs)
               for tag, cell in tagged.items() if cell.cell_type == "code"}
    assert "past against baseline: better" in printed["run-5"]
    assert "past against key-shift: worse" in printed["run-5"]
    for number in "1345":
        assert printed[f"check-{number}"].startswith(f"{number}: ")
    assert "without its MLP" in printed["check-2"]


def test_what_is_missing_or_wrong_fails_its_own_check(notebook, monkeypatch):
    tagged = cells(notebook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(recall, "VARIANTS", dict(recall.VARIANTS))

    def run(exercise, source):
        space = {}
        for part in ("setup", source, exercise.replace("exercise", "check")):
            exec(tagged[part].source if part in tagged else part, space)

    monkeypatch.setattr(recall, "train", lambda one: pytest.fail(f"{one} was trained"))
    for exercise in SOLUTIONS:
        with pytest.raises(NotImplementedError, match="^[^\n]+$"):
            run(exercise, tagged[exercise].source)
    for exercise, right, wrong, said in WRONG:
        assert solution(exercise).count(right) == 1, right
        with pytest.raises(AssertionError) as error:
            run(exercise, solution(exercise).replace(right, wrong))
        assert said in str(error.value), (exercise, wrong, str(error.value))
