"""Prompts are the harness's to the letter, from files as from the hub."""

import pytest
from questions import ROWS, write_rows

from nanonexus import tasks
from nanonexus.cli import UserError
from nanonexus.tasks import TASKS, read_task


def test_prompts_are_to_the_letter():
    read = {task: [TASKS[task][3](row) for row in rows] for task, rows in ROWS.items()}
    assert read["sciq"][0].context == "Ice melts at 0 °C.\nQuestion: When does ice melt?\nAnswer:"
    assert read["sciq"][1].context == "\nQuestion: What do bees make?\nAnswer:"
    assert read["arc_easy"][0] == ("Question: Pick three.\nAnswer:", ["one", "two", "three"], 2)
    bake, ice, white = read["hellaswag"]
    assert bake.context == "Baking : A man mixes. He pours the milk"
    assert bake.choices == [" and stirs it  well", "on the floor", "for Bob", "away"]
    assert ice.context == "Removing ice: She scrapes.. Then"
    assert ice.choices == ["goes. on.", "sleeps", "stops ", "runs off"]
    assert white.context == "Query ends: in white Space "
    assert read["logiqa"][0] == (
        "Passage: All men are mortal.\nQuestion: What follows?\nChoices:\nA. Nothing.\n"
        "B. Some are mortal.\nC. None.\nD. Men are stones.\nAnswer:",
        ROWS["logiqa"][0]["options"], 1)
    assert read["piqa"][1] == ("Question: Dry hair\nAnswer:", ["use a fork", "use a towel "], 1)


def test_rows_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_hub(*where):
        asked.append(where)
        return ROWS["arc_easy"]

    monkeypatch.setattr(tasks, "load_hub", load_hub)
    write_rows(tmp_path, dict(arc_easy=ROWS["arc_easy"]))
    docs, digest = read_task("arc_easy", None, limit=1)
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test")] and len(digest) == 64
    assert docs == read_task("arc_easy", tmp_path, limit=1)[0] and len(docs) == 1

    def offline(*where):
        raise UserError("cannot read allenai/ai2_arc from the hub (ConnectionError)")

    monkeypatch.setattr(tasks, "load_hub", offline)
    with pytest.raises(UserError, match="--data DIR with a file arc_easy_test.jsonl"):
        read_task("arc_easy", None)


@pytest.mark.parametrize("task, column, value", [
    ("arc_easy", "question", None), ("logiqa", "context", None), ("piqa", "goal", None),
    ("sciq", "support", None), ("hellaswag", "ctx_b", None),
    ("piqa", "label", 0.5), ("piqa", "label", True), ("piqa", "label", float("inf")),
    ("hellaswag", "label", ""), ("logiqa", "label", "ab"),
    ("logiqa", "options", "abcd"), ("arc_easy", "choices", dict(text="abc", label=list("123")))])
def test_a_question_without_its_text_or_answer_is_refused(task, column, value, tmp_path):
    rows = [ROWS[task][0], ROWS[task][0] | {column: value}]
    write_rows(tmp_path, {task: rows})
    with pytest.raises(UserError, match="line 2 is not a row of"):
        read_task(task, tmp_path)
    assert len(read_task(task, tmp_path, limit=1)[0]) == 1
