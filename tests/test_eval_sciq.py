"""eval_sciq.py as a command: its table, its JSON file, its chart, and one line for a mistake."""

import json
import os
import signal
import subprocess
import sys

import pytest
from questions import ROWS, save, write_rows

import eval_sciq
from model import GPTConfig, ModelError
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.tasks import BENCHMARKS


def run(*argv, cwd=None):
    return subprocess.run([sys.executable, eval_sciq.__file__, "--device", "cpu", *map(str, argv)],
                          capture_output=True, text=True, cwd=cwd)


def test_demo_versus_and_json(checkpoints, tmp_path):
    pytest.importorskip("matplotlib")
    a, b = checkpoints
    out = run("--checkpoint", a, "--versus", b, "--tasks", "demo", "--json", tmp_path / "s.json",
              "--save_docs", "--plot", tmp_path / "v.png", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "s.json").read_text())
    first, second = result["tasks"]["demo"], result["versus"]["tasks"]["demo"]
    assert first["n"] == 60 and first["chance"] == 0.25 and len(first["docs"]) == 60
    assert len(first["docs"][0]["lls"]) == 4 and first["docs"][0]["gold"] == 3
    for metric in ("acc", "acc_norm"):
        gap = result["paired"]["demo"][metric]
        assert gap["difference"] == pytest.approx(second[metric] - first[metric])
        assert f"{first[metric]:.4f} ± {first[f'{metric}_stderr']:.4f}" in out.stdout
        assert f"{gap['difference']:+.4f} ± {gap['stderr']:.4f}" in out.stdout
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    assert result["checkpoint"]["sha256"] and first["data_sha256"]
    assert sorted(os.listdir(tmp_path)) == ["s.json", "v.png"]


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["eval_sciq.py", "--device", "cpu", *map(str, argv)])
    eval_sciq.main()


def test_a_baseline_read_at_order_2_says_so(checkpoints, monkeypatch, capsys):
    call(monkeypatch, "--checkpoint", checkpoints[0], "--nexus_order", 2, "--tasks", "demo",
         "--limit", 2)
    assert "trained at order 1 and is run at order 2" in capsys.readouterr().err


def test_documents_are_written_if_asked_for(checkpoints, tmp_path, monkeypatch):
    flags = ["--checkpoint", checkpoints[0], "--tasks", "demo", "--limit", 3, "--json"]
    call(monkeypatch, *flags, tmp_path / "short.json", "--batch_size", "1")
    call(monkeypatch, *flags, tmp_path / "long.json", "--save_docs")
    short, long = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("short", "long"))
    assert len(long["tasks"]["demo"].pop("docs")) == 3
    assert short == long and list(short) == ["checkpoint", "config", "tasks", "left_out", "dtype",
                                             "versions"]
    assert short["left_out"] == {}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a checkpoint with a context of 64 bytes, a folder with a task that fits and one that does
    not: its row 2 has 71 bytes)."""
    folder = tmp_path_factory.mktemp("small")
    save(build(GPTConfig(vocab_size=320, block_size=64, n_layer=1, n_head=2, n_embd=32,
                         control="key-shift")), folder / "ckpt.pt")
    long = dict(ROWS["piqa"][0], sol2="x" * 70)
    write_rows(folder, dict(ROWS, piqa=[ROWS["piqa"][1], long]))
    return folder / "ckpt.pt", folder


def test_a_task_that_does_not_fit_is_left_out(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path, data = small
    flags = ["--data", data, "--json", tmp_path / "s.json", "--tasks"]
    call(monkeypatch, "--checkpoint", path, "--save_docs", *flags, "all")
    out, result = capsys.readouterr(), json.loads((tmp_path / "s.json").read_text())
    told, *notes = out.err.splitlines()
    assert told == (f"piqa is left out: choices of up to 71 tokens exceed the context of {path} in "
                    "1 of its 2 rows: 2")
    cut = {name: task["cut"] for name, task in result["tasks"].items() if task["cut"]}
    assert cut == {"sciq": 7, "logiqa": 4} and notes == [
        f"note: {name} prompts are longer than 64 tokens and lose their beginning"
        for name in ("sciq: 7 of 16", "logiqa: 4 of 4")]
    assert f"{path}: order 1, key-shift, " in out.out and result["left_out"] == {"piqa": {"2": 71}}
    assert list(result["tasks"]) == [name for name in BENCHMARKS if name != "piqa"]
    assert [line.split()[0] for line in out.out.splitlines()[3:]] == list(result["tasks"])

    os.rename(tmp_path / "s.json", tmp_path / "first.json")
    call(monkeypatch, "--checkpoint", tmp_path / "first.json", "--versus", path, "--plot",
         tmp_path / "v.png", *flags, "sciq,piqa")
    result = json.loads((tmp_path / "s.json").read_text())
    assert list(result["tasks"]) == list(result["versus"]["tasks"]) == ["sciq"]
    assert "piqa is left out" in capsys.readouterr().err

    monkeypatch.setattr(eval_sciq, "evaluate", None)  # nothing is scored before
    with pytest.raises(UserError, match="piqa is left out"):
        call(monkeypatch, "--checkpoint", path, *flags, "piqa")


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnicodeEncodeError("ascii", "±", 0, 1, ""),
                                   "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_what_is_scored_is_written_if_the_rest_fails(small, tmp_path, monkeypatch, error, last):
    pytest.importorskip("matplotlib")
    path, data = small
    real, scored = eval_sciq.evaluate, []

    def evaluate(scorer, name, docs):
        scored.append(name)
        if len(scored) > last:
            if isinstance(error, str):
                signal.raise_signal(getattr(signal, error))
            raise error
        return real(scorer, name, docs)

    monkeypatch.setattr(eval_sciq, "evaluate", evaluate)
    with pytest.raises((KeyboardInterrupt, UnicodeEncodeError, SystemExit)):
        call(monkeypatch, "--checkpoint", path, "--versus", path, "--data", data, "--tasks",
             "sciq,arc_easy", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())
    assert list(result["tasks"]) == ["sciq", "arc_easy"][:last]
    assert list(result["versus"]["tasks"]) == list(result["paired"]) == ["sciq"][:max(0, last - 2)]


def test_all_models_are_opened_before_any_is_scored(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(eval_sciq, "evaluate", None)
    with pytest.raises(ModelError, match="no checkpoint at"):
        call(monkeypatch, "--checkpoint", checkpoints[0], "--versus", tmp_path / "none.pt",
             "--tasks", "demo")
    assert os.listdir(tmp_path) == []


def test_saved_scores_serve_as_a_model(checkpoints, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    paths = [str(tmp_path / f"{n}.json") for n in "ab"]
    tasks, plot = ["--tasks", "demo", "--limit", 9, "--json"], ["--plot", tmp_path / "v.svg"]
    for model, path in zip(checkpoints, paths, strict=True):
        call(monkeypatch, "--checkpoint", model, *tasks, path, "--save_docs")
    results = []
    for a, b in (checkpoints, paths, (paths[0], checkpoints[1])):
        call(monkeypatch, "--checkpoint", a, "--versus", b, *plot, *tasks, tmp_path / "s.json",
             "--save_docs")
        results.append(json.loads((tmp_path / "s.json").read_text()))
    assert results[0] == results[1] == results[2] and results[0]["paired"]["demo"]["acc"]["p"] <= 1
    assert f"{paths[0]}: {checkpoints[0]}, float32, scored before" in capsys.readouterr().out

    mistakes = [("other documents", ["--limit", 8]), ("other documents", ["--dtype", "bfloat16"]),
                ("another dtype or order", ["--nexus_order", 3]),
                ("does not have the documents of sciq", ["--tasks", "sciq", "--data", tmp_path])]
    (tmp_path / "sciq_test.jsonl").write_text(json.dumps(ROWS["sciq"][0]))
    for message, flags in mistakes:
        with pytest.raises(UserError, match=message):
            call(monkeypatch, "--checkpoint", paths[0], *tasks, tmp_path / "s.json", *flags)
    (tmp_path / "sciq_test.jsonl").unlink()
    whole = json.loads((tmp_path / "a.json").read_text())
    whole["tasks"]["demo"]["n"] = whole["checkpoint"]["path"] = "$a$b_{"  # not what is shown
    (tmp_path / "b.json").write_text(json.dumps(whole))
    call(monkeypatch, "--checkpoint", *paths[:1], "--versus", paths[1], *tasks, tmp_path / "s.json")
    whole["tasks"]["demo"]["data_sha256"] = "0"
    for text, message in ((json.dumps(whole), "other documents"), ("[1]", "does not have"),
                          ('{"tasks": {"demo": {"n": 9}}, "dtype": "float32"}', "does not have")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=message):
            call(monkeypatch, "--checkpoint", tmp_path / "c.json", *tasks, tmp_path / "s.json")


def test_scores_are_written_even_if_the_chart_cannot_be(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def savefig(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    flags = ["--checkpoint", checkpoints[0], "--versus", checkpoints[0], "--tasks", "demo",
             "--limit", 2, "--json", tmp_path / "s.json"]
    with pytest.raises(UserError, match="--plot v.xyz: no such kind of picture.* png,"):
        call(monkeypatch, *flags, "--plot", "v.xyz")
    assert not os.listdir(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        call(monkeypatch, *flags, "--plot", tmp_path / "v.png")
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["paired"]["demo"]["acc"] == dict(difference=0.0, stderr=0.0, p=1.0)
    assert os.listdir(tmp_path) == ["s.json"]


@pytest.mark.parametrize("argv, message", [
    (["--tasks", "sciqq"], "did you mean sciq"), (["--tasks", "zz"], "choose from sciq"),
    (["--data", "{0}/none"], "sciq_test.jsonl: task sciq needs it, with the columns"),
    (["--data", "{0}", "--tasks", "piqa"], "piqa_validation.jsonl, line 2: no column 'sol2'"),
    (["--data", "{0}", "--tasks", "arc_easy"], "has no rows"),
    (["--data", "{0}", "--tasks", "logiqa"], "logiqa_test.jsonl, line 1: not JSON"),
    (["--data", "{0}", "--tasks", "hellaswag"], "row 1: not a JSON object"),
    (["--checkpoint", "{0}/no.pt"], "no checkpoint at"), (["--limit", "0"], "--limit"),
    (["--checkpoint", "{0}/file.pt"], "damaged"), (["--batch_size", "big"], "--batch_size"),
    (["--batch_size", "0"], "must be auto or a number from 1, got 0"),
    (["--nexus_order", "0"], "--nexus_order"), (["--save_docs"], "--save_docs adds"),
    (["--plot", "a.png"], "no effect without --versus: --plot"),
    (["--checkpoint", "{0}/file.pt", "--json", "{0}/file.pt"], "file.pt is read as .*file.pt:"),
    (["--versus", "{0}/file.pt", "--plot", "{0}/../{1}/file.pt"], "file.pt is read as .*file.pt:"),
    (["--checkpoint", "{0}"], "not a complete GPT-NeoX")])
def test_mistakes_are_one_line(checkpoints, tmp_path, monkeypatch, argv, message):
    if "GPT-NeoX" in message:
        pytest.importorskip("safetensors", reason="extra hf: safetensors")
    (tmp_path / "file.pt").write_text("no checkpoint")
    (tmp_path / "arc_easy_test.jsonl").write_text("\n")
    (tmp_path / "logiqa_test.jsonl").write_text('{"label": \n')
    (tmp_path / "hellaswag_validation.jsonl").write_text('["a list"]\n')
    (tmp_path / "piqa_validation.jsonl").write_text(
        json.dumps(ROWS["piqa"][0]) + '\n{"goal": "a", "sol1": "b", "label": 1}')
    argv = [a.format(tmp_path, tmp_path.name) for a in argv]
    if "--tasks" not in argv:
        argv += ["--tasks", "sciq" if "--data" in argv else "demo"]
    monkeypatch.setattr(sys, "argv", ["eval_sciq.py", "--checkpoint", checkpoints[0], *argv])
    with pytest.raises((UserError, ModelError), match=message) as caught:
        eval_sciq.main()
    assert "\n" not in str(caught.value)
