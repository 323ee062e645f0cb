"""compare.py trains what it says and continues where it was; its table is the lines' arithmetic."""

import io
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
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import compare
import pytest
import runs
import torch
from test_train import ROOT, tokens  # noqa: F401

import train
from nanonexus.checkpoint import read_checkpoint
from nanonexus.cli import UserError, run_script
from nanonexus.controls import build
from nanonexus.flags import PRESETS, preset_config

SCRIPT = os.path.join(ROOT, "experiments", "compare.py")
SMALL = ["--", "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32",
         "--batch_tokens", "256", "--micro_batch", "8", "--warmup_steps", "1", "--device", "cpu",
         "--eval_windows", "16"]


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


def run(out, *argv):
    """The command, in this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, "--out", str(out), *argv])
        try:
            run_script(compare.main)
        except SystemExit as error:
            code = error.code
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.usefixtures("plots", "here")
def test_compare_and_continue(tmp_path, tokens):  # noqa: F811
    pair = ("--variants", "baseline,cross", "--dataset", str(tokens), "--max_steps", "4",
            "--eval_interval", "2")
    first = run(tmp_path, *pair, "--seeds", "1", *SMALL)
    assert first.returncode == 0, first.stderr
    again = run(tmp_path, *pair, "--seeds", "2", "--against", "cross", *SMALL)
    assert again.returncode == 0, again.stderr
    told = again.stdout.split("variant")[0]  # a row for each run, as it ends
    assert "2 of 4 runs" in told and "-seed0 " not in told  # seed 0 was there
    assert told.count("baseline-seed1 ") == told.count("cross-seed1 ") == 1
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert list(results) == ["baseline", "cross"]
    for name, r in results.items():
        logs = [lines(tmp_path / f"{name}-seed{seed}" / "log.jsonl") for seed in (0, 1)]
        assert r["val_loss"] == [log[-1]["val_loss"] for log in logs] and r["seeds"] == [0, 1]
        assert f"{statistics.mean(r['val_loss']):.4f} ±" in again.stdout
    base, nexus = results["baseline"], results["cross"]
    assert base["parameters"] == nexus["parameters"]
    assert base["flops_per_token"] < nexus["flops_per_token"]
    gap = statistics.mean(b - a for a, b in zip(base["val_loss"], nexus["val_loss"], strict=True))
    assert "minus baseline" in first.stdout and f"{-gap:+.4f}" in again.stdout  # minus cross
    assert "<svg" in (tmp_path / "compare.svg").read_text()
    kept = {(line["variant"], line["seed"]): line for line in lines(tmp_path / "results.jsonl")}
    assert kept.keys() == set(itertools.product(results, (0, 1)))
    one = kept["cross", 0]
    assert (one["steps"], one["tokens"], one["lr"]) == (4, 1024, 3e-3)
    assert [tokens for tokens, _ in one["curve"]] == [0, 512, 1024]

    other = run(tmp_path, "--max_steps", "5", *SMALL)
    assert other.returncode == 2 and "other settings" in other.stderr


@pytest.mark.usefixtures("plots", "here")
def test_rates_are_chosen_on_a_separate_seed_and_controls_are_trained(tmp_path, tokens):  # noqa: F811
    results = tmp_path / "docs" / "text.jsonl"
    results.parent.mkdir()
    argv = ["--seeds", "1", "--max_steps", "16", "--eval_interval", "8", "--lrs", "1e-6,1e-2",
            "--variants", "key-shift", "--jobs", "2", "--results", str(results),
            "--dataset", str(tokens), *SMALL]
    out = run(tmp_path / "out", *argv)
    assert out.returncode == 0, out.stderr
    found = lines(results)
    *grid, final = found  # the grid comes first
    assert sorted((r["seed"], r["steps"], r["lr"]) for r in grid) == [
        (1000, 4, 1e-6), (1000, 4, 1e-2)]
    losses = {r["lr"]: r["val_loss"] for r in grid}
    assert losses[1e-2] < losses[1e-6]  # and its best is taken
    assert (final["seed"], final["steps"], final["lr"]) == (0, 16, 1e-2)
    saved = read_checkpoint(str(tmp_path / "out" / "key-shift-seed0" / "ckpt.pt"))
    assert saved["config"]["control"] == "key-shift" and final["variant"] == "key-shift"
    assert final["parameters"] == sum(p.numel() for p in saved["model"].values())

    # an existing line is a finished run, wherever the folders are; --show runs nothing
    kept = results.read_text()
    again = run(tmp_path / "elsewhere", "--show", *argv)
    assert again.returncode == 0, again.stderr
    assert results.read_text() == kept
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["compare.json", "compare.svg"]
    assert out.stdout[out.stdout.index("variant  "):].split("wrote")[0] \
        == again.stdout[again.stdout.index("variant  "):].split("wrote")[0]
    assert run(tmp_path / "out", *argv).returncode == 0 and results.read_text() == kept
    results.write_text(kept.replace(found[-1]["data"], "0" * 32, 1))
    mixed = run(tmp_path / "elsewhere", "--show", *argv)
    assert mixed.returncode == 2 and "lines of 2 token sets" in mixed.stderr


def line(variant, seed, loss, flops=10):
    return dict(variant=variant, seed=seed, lr=1e-3, parameters=5, flops_per_token=flops,
                tokens_per_sec=7.0, val_loss=loss, curve=[[0, 9.0], [100, loss]])


@pytest.mark.usefixtures("plots")
def test_the_order_is_all_grids_then_seed_by_seed(tmp_path, monkeypatch, tokens):  # noqa: F811
    """Whenever it stops, what exists are paired comparisons: with the training replaced."""
    order = []

    def finished(study, made, dataset):
        order.append(made)
        loss = 5 - 100 * float(made.flags[-1]) - 0.1 * (made.variant == "past")
        study.lines[study.key(made)] = line(made.variant, made.seed, loss)

    monkeypatch.setattr(runs.Study, "train", finished)
    argv = ["--dataset", str(tokens), "--lrs", "1e-3,3e-3", "--variants", "baseline,past,canon",
            "--jobs", "1", *SMALL]
    assert run(tmp_path, "--seeds", "2", *argv).returncode == 0
    names = ("baseline", "past", "canon")
    assert [made.name for made in order] == [
        *(f"{name}-seed1000-lr{lr}" for name in names for lr in ("0.001", "0.003")),
        *(f"{name}-seed{seed}" for seed in (0, 1) for name in names)]
    assert [made.flags[-1] for made in order[6:]] == ["0.003"] * 6  # the better one
    steps = compare.SCALES["tiny"]["max_steps"]
    assert [made.steps for made in order] == [steps // 4] * 6 + [steps] * 6
    gap = json.loads((tmp_path / "compare.json").read_text())["results"]["past"]["minus_baseline"]
    assert gap["seeds"] == [0, 1] and gap["mean"] == pytest.approx(-0.1)


def test_seeds_are_paired_although_one_variant_has_more():
    pytest.importorskip("scipy")
    base = compare.summarise([line("baseline", seed, loss)
                              for seed, loss in ((0, 3.0), (1, 4.0), (2, 5.0), (3, 99.0))])
    other = compare.summarise([line("past", seed, loss)
                               for seed, loss in ((1, 3.9), (0, 2.8), (2, 4.6))])
    gap = compare.minus(other, base)
    assert gap["seeds"] == [1, 0, 2] and gap["mean"] == pytest.approx(-0.7 / 3)
    assert 0 < gap["p"] < 1
    assert compare.minus(compare.summarise([line("past", 7, 1.0)]), base) is None
    single = compare.minus(compare.summarise([line("past", 3, 1.0)]), base)
    assert single["mean"] == -98 and math.isnan(single["p"])
    heading, *body = compare.rows({"baseline": base, "past": other | dict(minus_baseline=gap)},
                                  ["baseline", "self"])
    assert heading[-2:] == ("minus baseline [99% interval]", "Holm, baseline")
    assert body[1][0] == "past" and body[1][6] == 3 and body[1][-2].startswith("-0.2333 [")
    assert body[0][-2:] == ("", "") and body[1][-1] == f"{gap['p']:.2g}"  # one comparison
    _, *two = compare.rows({"baseline": base} | dict.fromkeys(
        ("past", "cross"), other | dict(minus_baseline=gap)), ["baseline"])
    assert two[1][-1] == two[2][-1] == f"{2 * gap['p']:.2g}"


def test_every_variant_is_a_model_and_has_a_style():
    import figures

    args, extra = compare.parse_args(["--max_steps", "40"])
    plan = compare.Plan(args, extra, 320)
    made = {name: plan.run(name, 3) for name in compare.VARIANTS | compare.EQUAL}
    for name, one in made.items():
        flags = compare.PARSER.parse_args(one.flags)
        assert (flags.seed, flags.max_steps) == (3, one.steps) and one.variant == name
        with torch.device("meta"):
            build(config_of(one, 320))
    assert compare.model_fields(made["shift-past-k"].flags)["control"] == "key-shift"
    for first, second in itertools.combinations(made, 2):  # no two are, or look, the same
        assert made[first][3:] != made[second][3:], (first, second)
        assert figures.style(first) != figures.style(second), (first, second)
    quarter = plan.run("longer", 1000, 2e-3, share=4)
    assert quarter.steps == plan.run("longer", 0).steps // 4 and quarter.flags[-2:] == ["--lr",
                                                                                       "0.002"]


def config_of(made, vocab_size):
    """The GPTConfig that train.py makes of a TrainingRun's flags."""
    preset = made.flags[made.flags.index("--preset") + 1]
    return preset_config(preset, **dict(vocab_size=vocab_size) | compare.model_fields(made.flags))


def test_controls_of_equal_compute_spend_it():
    args, extra = compare.parse_args(["--max_steps", "20", *SMALL])
    plan, flops = compare.Plan(args, extra, 256), {}
    for name in ("baseline", "self", "longer", "shift-cross-k", "shift-longer"):
        made = plan.run(name, 0)
        flops[name] = build(config_of(made, 256)).flops_per_token(32) * made.steps
    assert flops["self"] > flops["shift-cross-k"] > flops["baseline"]
    for longer, order_2 in (("longer", "self"), ("shift-longer", "shift-cross-k")):
        assert abs(flops[longer] - flops[order_2]) <= flops["baseline"] / 20 / 2  # half a step
    base = preset_config("tiny", n_layer=3, block_size=2048)
    equal = compare.equals(base, 1)
    layers = equal["deeper"]
    target = build(replace(base, nexus_order=2)).flops_per_token(2048)
    gaps = {n: abs(build(replace(base, n_layer=n)).flops_per_token(2048) - target)
            for n in (layers - 1, layers, layers + 1)}
    assert min(gaps, key=gaps.get) == layers > 5  # several layers at a long context
    larger = build(replace(base, n_layer=equal["larger"])).num_params()
    separate = build(replace(base, nexus_order=2, nexus_inner="separate")).num_params()
    layer = (larger - build(base).num_params()) / (equal["larger"] - 3)
    assert abs(larger - separate) <= layer / 2  # half a layer


def test_measured_lines_are_those_of_todays_flags():
    """Every line of docs/results is found under the flags of its variant, controls included."""
    for name in ("compare", "text", "bytes"):
        for line in lines(pathlib.Path(ROOT, "docs", "results", f"{name}.jsonl")):
            flags = line["flags"].split()
            variant = compare.read_variant(line["variant"], dict(deeper=5, larger=6))
            start = flags.index(variant[0])
            assert flags[start:start + len(variant)] == variant
            assert flags[start + len(variant)] == "--seed", line["flags"]
            given = compare.PARSER.parse_args(flags)
            assert (given.seed, given.max_steps) == (line["seed"], line["steps"])
            assert given.preset in PRESETS


def test_an_interrupt_saves_and_the_same_command_continues(tmp_path, tokens, request):  # noqa: F811
    argv = ["--dataset", str(tokens), "--variants", "baseline", "--seeds", "1", "--max_steps",
            "4000", "--eval_interval", "2000", *SMALL, "--log_interval", "1"]
    process = subprocess.Popen([sys.executable, SCRIPT, "--out", str(tmp_path), *argv], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    output, until = tmp_path / "baseline-seed0" / "output.txt", time.monotonic() + 60
    while not (output.exists() and "step 5/" in output.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to both
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and "the same command continues" in errors
    folder = tmp_path / "baseline-seed0"
    steps = [event["step"] for event in lines(folder / "log.jsonl")]
    assert (folder / "ckpt.pt").exists() and steps == list(range(len(steps))) and 5 < len(steps)
    assert not (tmp_path / "results.jsonl").exists()
    argv[argv.index("4000")] = str(len(steps) + 2)
    (tmp_path / "settings.json").unlink()  # the test's own shorter run
    argv += ["--decay_steps", "4000"]
    request.getfixturevalue("here")
    assert run(tmp_path, *argv).returncode == 0
    steps = [event["step"] for event in lines(folder / "log.jsonl")]
    assert steps == list(range(len(steps)))
    assert lines(tmp_path / "results.jsonl")[0]["steps"] == steps[-1]


def test_what_other_studies_let_it_train(tmp_path, monkeypatch):
    """runs.compare, by which they make their models, calls this script with flags that it has."""
    calls = []
    monkeypatch.setattr(runs.subprocess, "run", lambda argv: calls.append(argv) or SimpleNamespace(
        returncode=len(calls) - 1))
    runs.compare(str(tmp_path), ["baseline", "past"], 2, quick=True)
    (_, script, *argv), = calls
    args, _ = compare.parse_args(argv)
    assert os.path.samefile(script, SCRIPT) and args.out == str(tmp_path)
    assert (args.variants, args.seeds, args.quick) == (["baseline", "past"], 2, True)
    with pytest.raises(UserError, match="compare.py stopped with status 1"):
        runs.compare(str(tmp_path), ["baseline"], 1, quick=False)


def test_a_damaged_file_of_results_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    for text in ('{"flags": \n{"flags": "", "data": ""}\n', '{"task": "one-hop"}\n'):  # recall.py's
        path.write_text(text)
        with pytest.raises(UserError, match="results.jsonl, line 1, is damaged"):
            runs.Study(str(tmp_path), str(path), "", 1)


@pytest.mark.parametrize("argv, message", [
    (["--variants", "nexus2"], "no variant 'nexus2'"), (["--seeds", "0"], "--seeds"),
    (["--lrs", "0"], "--lrs"), (["--jobs", "0"], "--jobs"),
    (["--scale", "text"], "needs --dataset"), (["--show"], "has lines of 0 token sets")])
def test_mistakes(tmp_path, argv, message, request):
    if "--show" in argv:
        request.getfixturevalue("plots")
    out = run(tmp_path, *argv)
    assert out.returncode == 2 and message in out.stderr and out.stderr.count("\n") == 1


def test_checkpoints_are_those_of_the_seeds(tmp_path):
    for name in ("past-seed1", "past-seed0", "past-k-seed0", "past-seed1000-lr0.004", "past-seed2"):
        (tmp_path / name).mkdir()
        if name != "past-seed2":  # not finished
            (tmp_path / name / "ckpt.pt").touch()
    found = runs.checkpoints(tmp_path, "past", 2)
    assert found == [str(tmp_path / f"past-seed{seed}" / "ckpt.pt") for seed in (0, 1)]
    with pytest.raises(UserError, match="past-seed2"):
        runs.checkpoints(tmp_path, "past", 3)
