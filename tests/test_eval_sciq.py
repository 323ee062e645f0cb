"""eval_sciq.py as a command: its table, its JSON file, its chart, and one line for a mistake."""

import json
import os
import signal
import sys

import pytest
from questions import ROWS, save, write_rows

import eval_sciq
from model import GPTConfig, ModelError
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.files import write_json
from nanonexus.tasks import BENCHMARKS

pytest.importorskip("matplotlib")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the command in an empty folder; what it has written to s.json."""
    monkeypatch.chdir(tmp_path)

    def call(checkpoint, *argv, tasks="demo", json_file="s.json"):
        monkeypatch.setattr(sys, "argv", [
            "eval_sciq.py", "--device", "cpu", "--checkpoint", str(checkpoint), "--tasks", tasks,
            "--json", json_file, *map(str, argv)])
        eval_sciq.main()
        return json.loads((tmp_path / json_file).read_text())

    return call


def test_demo_versus_and_json(checkpoints, call, capsys):
    result = call(checkpoints[0], "--versus", checkpoints[1], "--save_docs", "--plot", "v.png")
    first, second = result["tasks"]["demo"], result["versus"]["tasks"]["demo"]
    assert first["n"] == 60 and first["chance"] == 0.25 and len(first["docs"]) == 60
    out = capsys.readouterr().out
    for metric in ("acc", "acc_norm"):
        gap = result["paired"]["demo"][metric]
        assert gap["difference"] == pytest.approx(second[metric] - first[metric])
        assert f"{first[metric]:.4f} ± {first[f'{metric}_stderr']:.4f}" in out
        assert f"{gap['difference']:+.4f} ± {gap['stderr']:.4f}" in out
    with open("v.png", "rb") as f:
        assert f.read().startswith(b"\x89PNG")
    assert result["checkpoint"]["sha256"] and first["data_sha256"]
    assert sorted(os.listdir()) == ["s.json", "v.png"]

    flags = [checkpoints[0], "--limit", 3, "--nexus_order", 2]
    short, long = call(*flags, "--batch_size", 1), call(*flags, "--save_docs")
    assert len(long["tasks"]["demo"].pop("docs")) == 3 and short == long  # written if asked for
    assert "trained at order 1 and is run at order 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a checkpoint with a context of 64 bytes, a folder with a task that fits and one that does
    not: its row 2 has 71 bytes)."""
    folder = tmp_path_factory.mktemp("small")
    save(build(GPTConfig(vocab_size=320, block_size=64, n_layer=1, n_head=2, n_embd=32,
                         control="key-shift")), folder / "ckpt.pt")
    long = dict(ROWS["piqa"][0], sol2="x" * 70)
    write_rows(folder, dict(ROWS, piqa=[ROWS["piqa"][1], long]))
    return str(folder / "ckpt.pt"), folder


def test_a_task_that_does_not_fit_is_left_out(small, call, monkeypatch, capsys):
    path, data = small
    result = call(path, "--save_docs", "--data", data, tasks="all", json_file="first.json")
    out = capsys.readouterr()
    told, *notes = out.err.splitlines()
    assert told == (f"piqa is left out: choices of up to 71 tokens exceed the context of {path} in "
                    "1 of its 2 rows: 2")
    cut = {name: task["cut"] for name, task in result["tasks"].items() if task["cut"]}
    assert cut == {"sciq": 7, "logiqa": 4}
    assert len(notes) == 2 and "sciq: 7 of 16 prompts are longer than 64 tokens" in notes[0]
    assert f"{path}: order 1, key-shift, " in out.out and result["left_out"] == {"piqa": {"2": 71}}
    assert list(result["tasks"]) == [name for name in BENCHMARKS if name != "piqa"]
    assert [line.split()[0] for line in out.out.splitlines()[3:]] == list(result["tasks"])

    result = call("first.json", "--versus", path, "--data", data, tasks="sciq,piqa")
    assert list(result["tasks"]) == list(result["versus"]["tasks"]) == ["sciq"]
    assert "piqa is left out" in capsys.readouterr().err
    monkeypatch.setattr(eval_sciq, "evaluate", None)  # nothing is scored before
    with pytest.raises(UserError, match="piqa is left out"):
        call(path, "--data", data, tasks="piqa")


@pytest.mark.parametrize("last, error", [(1, KeyboardInterrupt()), (2, "SIGTERM"), (3, "SIGHUP"),
                                         (4, OSError("No space left for the chart"))])
def test_what_is_scored_is_written_if_the_rest_fails(small, call, monkeypatch, error, last):
    real, scored, names = eval_sciq.evaluate, [], ["sciq", "arc_easy"]

    def fail(*args):
        if isinstance(error, str):
            signal.raise_signal(getattr(signal, error))
        raise error

    def evaluate(*args):
        scored.append(args)
        return fail() if len(scored) > last else real(*args)

    monkeypatch.setattr(eval_sciq, "evaluate", evaluate)
    monkeypatch.setattr(eval_sciq, "plot", fail)
    with pytest.raises((KeyboardInterrupt, OSError, SystemExit)):
        call(small[0], "--versus", small[0], "--data", small[1], tasks=",".join(names))
    with open("s.json") as f:
        result = json.load(f)
    assert list(result["tasks"]) == names[:last]
    assert list(result["versus"]["tasks"]) == list(result["paired"]) == names[:max(0, last - 2)]


def test_saved_scores_serve_as_a_model(checkpoints, call, capsys):
    nine = ["--limit", 9, "--save_docs"]
    whole, _ = (call(model, *nine, json_file=path) for model, path in zip(
        checkpoints, ("a.json", "b.json"), strict=True))
    results = [call(a, "--versus", b, *nine) for a, b in (checkpoints, ("a.json", "b.json"),
                                                          ("a.json", checkpoints[1]))]
    assert results[0] == results[1] == results[2] and results[0]["paired"]["demo"]["acc"]["p"] <= 1
    assert f"a.json: {checkpoints[0]}, float32, scored before" in capsys.readouterr().out

    write_rows(".", dict(sciq=ROWS["sciq"]))
    for message, flags in [("other documents", ["--limit", 8]),
                           ("other documents", ["--dtype", "bfloat16"]),
                           ("dtype or order", ["--nexus_order", 3]),
                           ("the documents of sciq", ["--tasks", "sciq", "--data", "."])]:
        with pytest.raises(UserError, match=message):
            call("a.json", *nine, *flags)
    whole["checkpoint"]["path"] = "$b_{$"  # not parsed as a formula
    write_json("b.json", whole)
    call("a.json", "--versus", "b.json", *nine)
    whole["tasks"]["demo"]["data_sha256"] = "0"
    for content, message in ((whole, "other documents"), ([1], "does not have"),
                             (dict(tasks=dict(demo=dict(n=9)), dtype="float32"), "does not have")):
        write_json("c.json", content)
        with pytest.raises(UserError, match=message):
            call("c.json", *nine)


@pytest.mark.parametrize("argv, message", [
    ("--tasks zz", "choose from all, sciq"),
    ("--tasks sciq --data none", "sciq_test.jsonl: task sciq needs it, with the columns"),
    ("--data . --tasks piqa", "piqa_validation.jsonl, line 2: no column 'sol2'"),
    ("--data . --tasks arc_easy", "has no rows"), ("--checkpoint no.pt", "no checkpoint at"),
    ("--checkpoint file.pt", "damaged"), ("--limit 0", "--limit"),
    ("--batch_size 0", "must be a number from 1"),
    ("--plot a.png", "no effect without --versus"), ("--versus none.pt", "no checkpoint at"),
    ("--versus ours.pt --plot v.xyz", "--plot v.xyz: no such kind of picture.* png,"),
    ("--checkpoint file.pt --json file.pt", "file.pt is read as file.pt:"),
    ("--versus file.pt --plot ./file.pt", "file.pt is read as file.pt:")])
def test_mistakes_are_one_line_before_anything_is_scored(checkpoints, call, monkeypatch, argv,
                                                         message, tmp_path):
    (tmp_path / "file.pt").write_text("no checkpoint")
    (tmp_path / "arc_easy_test.jsonl").write_text("\n")
    write_rows(".", dict(piqa=[ROWS["piqa"][0], dict(goal="a", sol1="b", label=1)]))
    monkeypatch.setattr(eval_sciq, "evaluate", None)
    before = os.listdir()
    with pytest.raises((UserError, ModelError), match=message) as caught:
        call(checkpoints[0], *argv.split())
    assert "\n" not in str(caught.value) and os.listdir() == before
