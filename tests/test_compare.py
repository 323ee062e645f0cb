"""compare.py trains what it says and continues where it was; its table is the lines' arithmetic."""

import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import compare
import figures
import pytest
import runs
import torch
from questions import call, done, drawn, refused
from test_train import ROOT, read_log, tokens  # noqa: F401

import common

import train
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.files import read_lines
from nanonexus.flags import PRESETS, preset_config

SMALL = ("-- --n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_tokens 256 --micro_batch 8 "
         "--warmup_steps 1 --eval_windows 16 --device cpu").split()


@pytest.fixture
def here(monkeypatch):
    """Training in this process: each would take a while to start."""
    one = threading.Lock()

    class Popen:
        def __init__(self, command, **kwargs):
            assert os.path.samefile(command[1], train.__file__)
            with one:
                train.main(command[2:])

        def wait(self):
            return 0

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=Popen, run=subprocess.run))


@pytest.mark.usefixtures("plots", "here")
def test_compare_continue_and_show(tmp_path, tokens):  # noqa: F811
    out, kept = tmp_path / "out", tmp_path / "docs/text.jsonl"
    argv = ["--variants", "baseline,key-shift", "--dataset", tokens, "--max_steps", 4, "--lrs",
            "1e-3", "--eval_interval", 2, "--results", kept]
    first = done(compare.main, "--out", out, *argv, "--seeds", 1, *SMALL)
    argv += ["--seeds", 2, "--against", "key-shift"]
    again = done(compare.main, "--out", out, *argv, *SMALL)
    told = again.split("variant")[0]  # a row for each run, as it ends
    assert "2 of 4 runs" in told and "-seed0 " not in told  # seed 0 was there
    assert told.count("baseline-seed1 ") == told.count("key-shift-seed1 ") == 1
    found = read_lines(kept)
    assert sorted((line["variant"], line["seed"], line["steps"], line["tokens"], line["lr"])
                  for line in found) == [(name, seed, 4, 1024, 1e-3) for name in (
                      "baseline", "key-shift") for seed in (0, 1)]
    results = json.loads((out / "compare.json").read_text())["results"]
    for name, r in results.items():
        logs = [read_log(out / f"{name}-seed{seed}") for seed in (0, 1)]
        assert r["val_loss"] == [log[-1]["val_loss"] for log in logs] and r["seeds"] == [0, 1]
        assert f"{statistics.mean(r['val_loss']):.4f} ±" in again
        assert r["tokens"] == [0, 512, 1024]
        norms = [event["grad_norm"] for event in logs[0] if event["grad_norm"]]
        line = next(x for x in found if (x["variant"], x["seed"]) == (name, 0))
        assert line["largest_norm"] == max(norms[len(norms) // 2:])
        saved = torch.load(out / f"{name}-seed0/ckpt.pt")
        assert saved["config"]["control"] == ("" if name == "baseline" else name)
        assert r["parameters"] == sum(p.numel() for p in saved["model"].values())
    base, shift = results["baseline"], results["key-shift"]
    gap = statistics.mean(b - s for b, s in zip(base["val_loss"], shift["val_loss"], strict=True))
    assert "minus baseline" in first and f"{gap:+.4f}" in again  # minus key-shift
    assert "nats per byte" in drawn(out / "compare.svg", results)

    assert "(dataset, max_steps)" in refused(compare.main, "--out", out, "--max_steps", 5, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "sha256", lambda path: "as if it were edited")
        assert "other settings (code)" in refused(compare.main, "--out", out, *argv, *SMALL)
    # an existing line is a finished run, wherever the folders are; --show runs nothing
    argv, before = ["--out", tmp_path / "elsewhere", "--show", *argv, *SMALL], kept.read_text()
    shown = done(compare.main, *argv).split("wrote")[0]
    assert len(shown) > 300 and again.split("wrote")[0].endswith(shown)
    assert kept.read_text() == before
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["compare.json", "compare.svg"]
    kept.write_text(before.replace(found[-1]["data"], "0" * 32, 1))
    assert "lines of 2 datasets" in refused(compare.main, *argv)


def line(variant, seed, loss):
    return dict(variant=variant, seed=seed, lr=1e-3, parameters=5, flops_per_token=10,
                tokens_per_sec=7.0, val_loss=loss, curve=[[0, 9.0], [100, loss]])


@pytest.mark.usefixtures("plots")
def test_the_order_is_all_grids_then_seed_by_seed(tmp_path, monkeypatch, tokens):  # noqa: F811
    """Whenever it stops, what exists are paired comparisons; rates are chosen on a separate seed.
    With the training replaced."""
    order = []

    def finished(study, made, dataset):
        order.append(made)
        loss = 5 - 100 * float(made.flags[-1]) - 0.1 * (made.variant == "past")
        study.lines[study.key(made)] = line(made.variant, made.seed, loss)

    monkeypatch.setattr(runs.Study, "train", finished)
    names = ("baseline", "past", "canon")
    done(compare.main, "--out", tmp_path, "--dataset", tokens, "--lrs", "1e-3,3e-3", "--variants",
         ",".join(names), "--jobs", 1, "--seeds", 2, *SMALL)
    steps = compare.SCALES["tiny"]["max_steps"]
    assert [(made.name, made.steps) for made in order] == [
        *((f"{name}-seed1000-lr{lr}", steps // 4) for name in names for lr in ("0.001", "0.003")),
        *((f"{name}-seed{seed}", steps) for seed in (0, 1) for name in names)]
    assert [made.flags[-1] for made in order[6:]] == ["0.003"] * 6  # the better one
    gap = json.loads((tmp_path / "compare.json").read_text())["results"]["past"]["minus_baseline"]
    assert gap["seeds"] == [0, 1] and gap["mean"] == pytest.approx(-0.1)


def test_seeds_are_paired_although_one_variant_has_more():
    pytest.importorskip("scipy")
    base, other, single, none = (compare.summarise([line("", seed, x) for seed, x in row]) for row
                                 in (enumerate((3.0, 4.0, 5.0, 99.0)),
                                     ((1, 3.9), (0, 2.8), (2, 4.6)), [(3, 1.0)], [(7, 1.0)]))
    gap, alone = compare.minus(other, base), compare.minus(single, base)
    assert gap["seeds"] == [1, 0, 2] and gap["mean"] == pytest.approx(-0.7 / 3)
    assert 0 < gap["p"] < 1 and alone["mean"] == -98 and math.isnan(alone["p"])
    assert compare.minus(none, base) is None
    for names in (["past"], ["past", "cross"]):
        heading, first, *rest = compare.rows({"baseline": base} | dict.fromkeys(
            names, other | dict(minus_baseline=gap)), ["baseline", "self"])
        assert heading[-2:] == ("minus baseline [99% interval]", "Holm, baseline")
        assert first[-2:] == ("", "") and [row[0] for row in rest] == names
        for row in rest:  # p corrected for as many comparisons
            assert row[6] == 3 and row[-2].startswith("-0.2333 [")
            assert row[-1] == f"{len(names) * gap['p']:.2g}"


def config_of(made, vocab_size=320):
    """The GPTConfig that train.py makes of a TrainingRun's flags."""
    flags = compare.PARSER.parse_args(made.flags)
    return preset_config(flags.preset, vocab_size=vocab_size, **compare.model_fields(made.flags))


def test_every_variant_is_a_model_and_has_a_style():
    plan = compare.Plan(*compare.parse_args(["--max_steps", "40"]), 320)
    made = {name: plan.run(name, 3) for name in compare.VARIANTS | compare.EQUAL}
    for name, one in made.items():
        flags = compare.PARSER.parse_args(one.flags)
        assert (flags.seed, flags.max_steps) == (3, one.steps) and one.variant == name
        with torch.device("meta"):
            build(config_of(one))
    for first, second in itertools.combinations(made, 2):  # no two are, or look, the same
        assert made[first][3:] != made[second][3:], (first, second)
        assert figures.style(first) != figures.style(second), (first, second)
    quarter = plan.run("longer", 1000, 2e-3, share=4)
    assert quarter.steps == made["longer"].steps // 4
    assert compare.PARSER.parse_args(quarter.flags).lr == 2e-3


def test_controls_of_equal_compute_spend_it():
    plan, flops = compare.Plan(*compare.parse_args(["--max_steps", "20", *SMALL]), 320), {}
    for name in ("baseline", "self", "longer", "shift-cross-k", "shift-longer"):
        made = plan.run(name, 0)
        flops[name] = build(config_of(made)).flops_per_token(32) * made.steps
    assert flops["self"] > flops["shift-cross-k"] > flops["baseline"]
    for longer, order_2 in (("longer", "self"), ("shift-longer", "shift-cross-k")):
        assert abs(flops[longer] - flops[order_2]) <= flops["baseline"] / 20 / 2  # half a step
    base = preset_config("tiny", n_layer=3, block_size=2048)
    for name, size, order_2 in (("deeper", lambda gpt: gpt.flops_per_token(2048), "self"),
                                ("larger", lambda gpt: gpt.num_params(), "separate")):
        layers = compare.equals(base, 1)[name]
        low, near, high = (size(build(replace(base, n_layer=layers + i))) for i in (-1, 0, 1))
        target = size(build(replace(base, nexus_order=2, nexus_inner=order_2)))
        assert layers > 3 and abs(near - target) <= (high - low) / 4  # half a layer


def test_measured_lines_are_those_of_todays_flags():
    """Every line of docs/results is found under the flags of its variant, controls included."""
    for name in ("compare", "text", "bytes"):
        for line in read_lines(pathlib.Path(ROOT, "docs", "results", f"{name}.jsonl")):
            variant = compare.read_variant(line["variant"], dict(deeper=5, larger=6))
            assert f" {' '.join(variant)} --seed " in line["flags"], line["flags"]
            given = compare.PARSER.parse_args(line["flags"].split())
            assert (given.seed, given.max_steps) == (line["seed"], line["steps"])
            assert given.preset in PRESETS


def test_an_interrupt_saves_and_the_same_command_continues(tmp_path, tokens, request):  # noqa: F811
    argv = ["--out", str(tmp_path), "--dataset", str(tokens), "--variants", "baseline", "--seeds",
            "1", "--eval_interval", "2000", *SMALL, "--log_interval", "1"]
    process = subprocess.Popen([sys.executable, compare.__file__, "--max_steps", "4000", *argv],
                               text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)
    folder, until = tmp_path / "baseline-seed0", time.monotonic() + 60
    output = folder / "output.txt"
    while not (output.exists() and "step 5/" in output.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to both
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "the same command continues" in errors
    count = len(read_log(folder))
    assert (folder / "ckpt.pt").exists() and count > 5
    assert not (tmp_path / "results.jsonl").exists()
    (tmp_path / "settings.json").unlink()  # the test's own shorter run
    (folder / "run.json").unlink()
    request.getfixturevalue("here")
    done(compare.main, "--max_steps", count + 2, *argv, "--decay_steps", 4000)
    steps = [event["step"] for event in read_log(folder)]
    assert steps == list(range(count + 3))
    assert read_lines(tmp_path / "results.jsonl")[0]["steps"] == steps[-1]


def test_what_other_studies_let_it_train(tmp_path, monkeypatch):
    """runs.compare, by which they make their models, calls this script with flags that it has."""
    calls = []
    monkeypatch.setattr(runs.subprocess, "run", lambda argv: calls.append(argv) or SimpleNamespace(
        returncode=len(calls) - 1))
    runs.compare(str(tmp_path), ["baseline", "past"], 2, quick=True)
    (_, script, *argv), = calls
    args, _ = compare.parse_args(argv)
    assert os.path.samefile(script, compare.__file__) and args.out == str(tmp_path)
    assert (args.variants, args.seeds, args.quick) == (["baseline", "past"], 2, True)
    with pytest.raises(UserError, match="compare.py stopped with status 1"):
        runs.compare(str(tmp_path), ["baseline"], 1, quick=False)


def test_the_commit_says_whether_files_were_changed_since(monkeypatch):
    said = {"rev-parse": "abc\n", "status": ""}
    monkeypatch.setattr(common.subprocess, "run", lambda argv, **kwargs: SimpleNamespace(
        stdout=said[argv[3]]))
    assert common.commit() == "abc"
    said["status"] = " M README.md\n"
    assert common.commit() == "abc+"


def test_results_of_other_code_are_told(capsys):
    kept = [dict(commit="012", code=runs.code())]
    assert runs.source(kept) == dict(commit=common.COMMIT, code=runs.code())
    assert not capsys.readouterr().err
    runs.source(kept + [dict(commit="abc"), dict(commit=None, code="0")])
    assert "2 results of other code (commit None, abc) are kept" in capsys.readouterr().err


@pytest.mark.usefixtures("plots", "here")
def test_a_folder_is_not_taken_for_another_run(tmp_path, tokens, monkeypatch, capsys):  # noqa: F811
    """Not by other flags of the script, of a variant, or data at the same path; and results of
    other code are told even where they are kept in a file elsewhere."""
    argv = ["--variants", "baseline", "--dataset", tokens, "--max_steps", 2, "--seeds", 1, "--out",
            out := tmp_path / "out", "--results", kept := tmp_path / "lines.jsonl"]
    done(compare.main, *argv, "--lrs", "1e-3", *SMALL)
    before = kept.read_text()
    other = f"{out}/baseline-seed0 holds a run with other"
    assert f"{other} flags" in refused(compare.main, *argv, "--lrs", "1e-2", *SMALL)
    with monkeypatch.context() as patch:
        patch.setitem(compare.VARIANTS, "baseline", "--nexus_order 3")
        assert f"{other} flags" in refused(compare.main, *argv, "--lrs", "1e-3", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(compare.Dataset, "fingerprint", "other")
        assert f"{other} data" in refused(compare.main, *argv, "--lrs", "1e-3", *SMALL)
    assert kept.read_text() == before
    capsys.readouterr()
    monkeypatch.setattr(runs, "sha256", lambda path: "as if it were edited")
    *rest, = (x if x != out else tmp_path / "another" for x in argv)
    *_, errors = call(compare.main, *rest, "--lrs", "1e-3", *SMALL)
    assert "1 results of other code" in errors and kept.read_text() == before


@pytest.mark.parametrize("extra, word", [
    (["--dataset", "T"], "--dataset"), (["--seed", "7"], "--seed"), (["--max_steps=20"],
    "--max_steps"), (["--no-sample"], "--no-sample"), (["--lr", "1"], "--lr")])
def test_what_the_script_sets_cannot_stand_after_the_dashes(extra, word):
    argv = ["--quick", "--lrs", "1e-3", "--", *extra]
    with pytest.raises(UserError, match=f"{word} cannot stand after --"):
        compare.parse_args(argv)


def test_quick_is_a_default():
    assert compare.parse_args(["--quick"])[0].max_steps == 40
    assert compare.parse_args(["--quick", "--max_steps", "7"])[0].max_steps == 7


def test_an_inner_step_cannot_have_a_control_s_name():
    code = ("import typing, model; model.GPTConfig.__annotations__['nexus_inner'] = "
            "typing.Literal['self', 'mean']; import nanonexus.controls")
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert job.stderr.strip().endswith("an inner step has the name of a control: rename it")
