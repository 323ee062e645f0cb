"""recall.py: its problems have one answer each, and one refined layer solves what one cannot."""

import itertools
import json

import puzzles
import pytest
import recall
import torch
from questions import done, drawn

RUN = recall.RecallRun("one-hop", "baseline", seed=0, lr=1e-2, pairs=3, steps=160, width=32,
                       heads=2, batch=32)


def problems(task, count, n, exam=False):
    """[(tokens, targets)] of problems of a task, and its targets as {place: answer}."""
    one = puzzles.TASKS[task]
    idx, targets = (one.exam if exam else one.problems)(count, n, torch.Generator().manual_seed(0))
    assert idx.shape == targets.shape and len(idx) == count and 0 <= idx.min()
    assert idx.max() < one.vocab and not torch.equal(idx[0], idx[1])
    return [(row, {t: x for t, x in enumerate(wanted) if x >= 0})
            for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True)]


def test_problems_have_the_answers_they_say(n=5):
    for row, wanted in problems("one-hop", 30, n):
        follows = dict(zip(row[0:2 * n:2], row[1:2 * n:2], strict=True))
        assert len(follows) == n and sorted(row[2 * n:]) == sorted(follows)  # each is asked once
        assert wanted == {t: follows[row[t]] for t in range(2 * n, len(row))}


@pytest.mark.parametrize("task, reach", [("gapped", 3), ("gapped-12", 12)])
def test_gapped_problems_can_be_read_off_and_have_every_gap(task, reach, n=5):
    kinds, between, gaps = puzzles.SYMBOLS, set(), set()
    for row, wanted in problems(task, 300, n):
        told = [(t, x) for t, x in enumerate(row) if x < 2 * kinds]  # all but fillers
        pairs, asked = told[:2 * n], dict(told[2 * n:])
        follows = {key: value for (_, key), (_, value) in zip(pairs[::2], pairs[1::2], strict=True)}
        assert pairs[0][0] == 0 and all(key < kinds <= value for key, value in follows.items())
        for (end, _), (start, _) in zip(pairs[1::2], pairs[2::2], strict=False):
            assert start == end + 1  # no filler between pairs
        assert sorted(asked.values()) == sorted(follows)
        assert wanted == {t: follows[key] for t, key in asked.items()}
        between |= {pairs[i + 1][0] - pairs[i][0] - 1 for i in range(0, 2 * n, 2)}
        first = min(asked)
        gaps.add(first - pairs[-1][0] - 1)
        assert list(asked) == list(range(first, first + n))
    assert between == set(range(reach + 1)) and gaps == set(range(13))


@pytest.mark.parametrize("task, n", [("mqar-64", 4), ("mqar-64-v64", 4)])
def test_mqar_is_zoologys(task, n):
    vocab, distances = 64 if "v64" in task else 8192, []
    assert puzzles.TASKS[task].vocab == vocab
    for row, wanted in problems(task, 400, n):
        keys, values = row[0:2 * n:2], row[1:2 * n:2]
        assert len(row) == 16 * n and len(set(keys)) == len(set(values)) == n
        assert min(keys) > 0 and max(keys) < vocab // 2 <= min(values)
        asked = {t: x for t, x in enumerate(row) if t >= 2 * n and x}
        assert sorted(asked.values()) == sorted(keys) and all(t % 2 == 0 for t in asked)
        follows = dict(zip(keys, values, strict=True))
        assert wanted == {t: follows[key] for t, key in asked.items()}
        distances += [(t - 2 * n) // 2 for t in asked]
    first, late = (sum(low <= d < high for d in distances) / (high - low)
                   for low, high in ((0, 4), (3 * n, 7 * n)))
    assert first > 3 * late > 0  # a power law, not an even spread


@pytest.mark.parametrize("k", [1, 2])
def test_hops_end_where_they_say(k):
    def end(x, t, times):  # the definition, word for word
        for _ in range(times):
            earlier = [i for i in range(t) if x[i] == x[t]]
            if not earlier:
                return -1
            t = max(earlier) + 1
        return x[t]

    for exam, times in ((False, set(range(k + 1))), (True, {k})):
        found = problems(f"hops-{k}-2-layers", 60, 40, exam)
        assert {row[0] - 4 for row, _ in found} == times
        for (first, *x), wanted in found:
            ends = {t + 1: end(x, t, first - 4) for t in range(1, len(x))}
            assert wanted == {t: x for t, x in ends.items() if x >= 0}
            assert set(x) <= {0, 1, 2, 3} and all(a != b for a, b in itertools.pairwise(x))


def test_one_layer_that_mixes_keys_looks_up_and_one_that_does_not_cannot():
    for variant, low, high in (("past", 0.95, 1), ("key-shift", 0.95, 1), ("baseline", 0, 0.6)):
        curve, _ = recall.train(RUN._replace(variant=variant))
        assert low <= curve[-1] <= high and len(curve) == 20
    short = RUN._replace(steps=20)
    assert recall.train(short)[0] == recall.train(short)[0]  # the same seed, the same run


@torch.no_grad()
def test_initialisations_are_what_their_names_say():
    def start(variant):
        torch.manual_seed(0)
        return recall.build(RUN._replace(variant=variant))

    base, shifted = (start(name).state_dict() for name in ("baseline", "key-shift"))
    assert shifted.keys() - base == {"blocks.0.attn.shift"}
    assert all(torch.equal(w, shifted[name]) for name, w in base.items())
    shift = start("key-shift-0.12").blocks[0].attn.shift.sigmoid()
    torch.testing.assert_close(shift, torch.full_like(shift, 0.12))

    plain, small = (start(name).state_dict() for name in ("two-layers", "two-layers-small"))
    for name, w in plain.items():
        tenth = name.endswith(("attn.proj.weight", "mlp.down.weight"))
        assert torch.equal(small[name], 0.1 * w if tenth else w), name
    model = start("two-layers-fan-in")
    assert model.embed.weight.std() == pytest.approx(1, rel=0.1)
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            output = 0.5 if name.endswith(("proj", "down")) else 1  # sqrt(2 x 2 layers)
            assert linear.weight.std() * linear.in_features ** 0.5 == pytest.approx(output, rel=0.1)


def test_permutation_p_is_exact():
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.1, 0.9, 0.4, 0.8], [0.2, 0.3, 0.05, 0.5, 0.45]
    wanted = stats.permutation_test((a, b), lambda x, y: abs(x.mean() - y.mean()),
                                    vectorized=False, n_resamples=1000, alternative="greater")
    assert recall.permutation_p(a, b) == pytest.approx(wanted.pvalue)
    assert recall.permutation_p([1, 1], [1, 1]) == 1


def test_steps_to_an_accuracy():
    line = dict(steps=400, curve=[0.2, 0.95, 0.5, 0.99])  # seen after 20, 40, 60, 80 steps
    assert [recall.steps_to(line, *level) for level in ((), (0.96,), (1,))] == [40, 80, None]


@pytest.mark.usefixtures("plots")
def test_the_command_continues_and_show_trains_nothing(tmp_path, monkeypatch):
    argv = ("--pairs 2 --width 16 --steps 4 --seeds 2 --lrs 1e-3,1e-2 --tasks one-hop,gapped "
            "--variants baseline,past --maps past").split() + ["--out", tmp_path]
    trained = []
    monkeypatch.setattr(recall, "train", lambda run, train=recall.train:
                        trained.append(run) or train(run))
    said = done(recall.main, *argv)
    text = (tmp_path / "results.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    keys = {(x["task"], x["variant"], x["seed"], x["lr"]) for x in lines}
    assert len(keys) == len(lines) == 2 * 2 * (2 + 2)
    found = json.loads((tmp_path / "recall.json").read_text())["results"]
    assert list(found) == ["one-hop", "gapped"]
    for task, variant in itertools.product(found, ("baseline", "past")):
        area = {x["lr"]: sum(x["curve"]) for x in lines if x["seed"] == recall.LR_SEED
                and (x["task"], x["variant"]) == (task, variant)}
        counted = found[task][variant]
        assert [x["seed"] for x in counted] == [0, 1]
        assert {area[x["lr"]] for x in counted} == {max(area.values())}
        accuracies = " ".join(f"{x['curve'][-1]:.2f}" for x in counted)
        assert any(row.split()[0] == variant and accuracies in row
                   for row in said.split(f"\n{task} (")[1].split("\n\n")[0].splitlines()[1:])
    assert (tmp_path / "maps.svg").exists() and drawn(tmp_path / "recall.svg", found["one-hop"])

    at = argv.index("--maps")
    del argv[at:at + 2]
    runs = list(trained)
    (tmp_path / "results.jsonl").write_text("".join(text.splitlines(True)[:4]))  # as if stopped
    done(recall.main, *argv, "--show")
    assert trained == runs
    done(recall.main, *argv)
    again = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) | dict(cpu_seconds=0) for line in again] == [
        line | dict(cpu_seconds=0) for line in lines]

    trained.clear()
    done(recall.main, *argv, "--lrs", "3e-3")  # nothing to choose
    assert {(run.seed, run.lr) for run in trained} == {(0, 3e-3), (1, 3e-3)}
