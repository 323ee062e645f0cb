"""gpu.py, rehearsed on a CPU: it is interrupted, continues, and every part yields its numbers."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import gpu
import h200
import pytest
from test_train import ROOT
from test_train import tokens as tokens_on_disk  # noqa: F401

from nanonexus.files import read_lines

RUNS = ["baseline-1", "key-shift-1"]


def call(tokens, folder, *flags, until=None):
    """The lines that gpu.py prints; it is stopped when the file `until` is there."""
    script = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "experiments", "gpu.py"), "--tokens", str(tokens),
         "--out", str(folder / "out"), "--work", str(folder / "work"), "--device", "cpu",
         "--preset", "tiny", "--variants", "baseline,key-shift", "--tasks", "demo", *flags,
         "--windows", "1", "--steps", "60", "--", "--n_layer", "1", "--n_head", "2", "--n_embd",
         "32", "--eval_windows", "2", "--save_interval", "30"],
        stdout=subprocess.PIPE, text=True)
    while until and not read_lines(until) and script.poll() is None:
        time.sleep(0.02)
    if until:
        script.send_signal(signal.SIGTERM)
    said = script.communicate()[0].splitlines()
    assert script.returncode == 0 and said[-1].endswith("end"), said
    return [line.partition("] ")[2] for line in said[1:-1]]


def test_every_part_yields_its_numbers_and_none_is_repeated(tokens_on_disk, tmp_path):  # noqa: F811
    packed, work = tmp_path / "set.tar.xz", tmp_path / "work"
    with tarfile.open(packed, "w:xz") as tar:
        tar.add(tokens_on_disk, "set")
    said = call(packed, tmp_path, "--parts", "train,scores", "--jobs", "1",
                until=work / "runs" / RUNS[0] / "log.jsonl")
    assert ": stopped after" in said[0] and said[1] == f"train-{RUNS[1]}: no time left", said
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert all(line in summary for line in said)
    kinds = h200.read(tmp_path / "out" / "results.jsonl")
    assert [line["run"] for line in kinds["curve"]] == RUNS[:1] and "scores" not in kinds

    parts = "--parts", "parity,train,scores,copying,speed"
    said = call(packed, tmp_path, *parts)
    assert len(said) == 8 and all(": done after" in line for line in said), said
    assert "resumed at step" in (work / "log" / f"train-{RUNS[0]}.log").read_text()
    kinds = h200.read(tmp_path / "out" / "results.jsonl")
    values = {"parity": list(kinds["parity"][0]["found"]["found"].values())}
    for kind, keys in dict(speed=("ms", "tokens_per_sec", "peak_gib", "busy_ms"), copying=(
            "repeated", "changed", "new", "twice", "head", "uniform")).items():
        values[kind] = [line[key] for line in kinds[kind] for key in keys]
    values["curve"] = [loss for line in kinds["curve"] for _, loss in line["val"]]
    values["scores"] = [line["tasks"]["demo"][key] for line in kinds["scores"]
                        for key in ("acc", "acc_norm", "se")]
    for kind, found in values.items():
        numbers = json.loads(json.dumps(found), parse_constant=lambda text: math.nan)
        flat = [x for value in numbers for x in (value if isinstance(value, list) else [value])]
        assert len(flat) >= 4 and all(map(math.isfinite, flat)), (kind, found)
    assert kinds["parity"][0]["found"]["bad"] == []
    assert all(len(line["kernels"]) == 16 for line in kinds["speed"])
    for kind in ("curve", "scores"):
        assert [line["run"] for line in kinds[kind]] == RUNS
    steps = {run: [line["step"] for line in kinds["copying"] if line["run"] == run] for run in RUNS}
    assert steps[RUNS[1]] == [30, 60] and {30, 60} <= set(steps[RUNS[0]]), steps
    base, shift = (line["tasks"]["demo"] for line in kinds["scores"])
    gap = shift["minus_baseline"]["acc"]
    assert gap["difference"] == pytest.approx(shift["acc"] - base["acc"]) and 0 <= gap["p"] <= 1
    assert [row[0] for row in h200.trained(h200.runs(kinds))[1:]] == ["baseline", "key shift"]
    assert "nan" not in str(h200.correct(kinds["parity"][0]["found"]["found"]))
    with tarfile.open(tmp_path / "out" / "details.tar.gz") as tar:
        assert {"log/parity.log", f"scores-{RUNS[0]}.json"} <= set(tar.getnames())
    assert call(packed, tmp_path, *parts) == []


def test_a_failed_jobs_finished_part_is_kept_and_it_is_done_again(tmp_path):
    args = SimpleNamespace(deadline=math.inf, preset="tiny", work=str(tmp_path), out=str(tmp_path),
                           machine={}, jobs=1)
    (tmp_path / "log").mkdir()
    (tmp_path / "runs").mkdir()
    session = gpu.Session(args, [], [], time.monotonic())
    result = tmp_path / "scores-a-1.json"
    code = f"open({str(result)!r}, 'w').write('1'); raise SystemExit({{}})"
    session.job("scores", ["-c", code.format(1)], str(result))
    assert session.failed == ["scores"] and os.listdir(tmp_path / "log") == ["scores.log"]
    assert (tmp_path / "scores-a-1.json.partial").exists() and not result.exists()
    session.job("scores", ["-c", code.format(0)], str(result))
    assert session.failed == ["scores"] and result.read_text() == "1"
