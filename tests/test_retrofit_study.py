"""experiments/retrofit.py: what it trains on and measures, and that nothing is measured twice."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from questions import ROWS, byte_tokenizer, call, done, drawn, refused, write_rows

pytest.importorskip("transformers", reason="extra retrofit: transformers")
import retrofit  # noqa: E402
from test_retrofit import make  # noqa: E402

import finetune  # noqa: E402
from nanonexus.cli import UserError  # noqa: E402
from nanonexus.decoder import Decoder  # noqa: E402
from nanonexus.files import read_lines  # noqa: E402
from nanonexus.retrofit import INNERS, nexus  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small Llama whose tokens are bytes, questions, and a text of 20 documents."""
    folder = tmp_path_factory.mktemp("study")
    model = make("llama", torch.float32, vocab_size=320, max_position_embeddings=8192)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder, dict(sciq=ROWS["sciq"]))
    (folder / "sciq_validation.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS["sciq"] * 3))
    books = ["\n".join(f"{i} is the book and {j} the line" for j in range(200)) for i in range(20)]
    (folder / "books.txt").write_text("\n<|endoftext|>\n".join(books))
    return folder


def flags(place, out, *others):
    return ["--model", str(place / "model"), "--data", str(place), "--text", str(
        place / "books.txt"), "--out", str(out), "--pieces", "4", "--batch", "2", "--tasks", "sciq",
        "--device", "cpu", *"--limit 3 --steps 2 --answer_steps 2 --seeds 1".split(), *others]


def study(*given):
    return retrofit.build_parser().parse_args(flags(*given))


def test_no_document_is_both_trained_on_and_held_out(place, tmp_path):
    args = study(place, tmp_path, "--steps", "8")
    train, held = retrofit.pieces(args)
    assert (train, held) == retrofit.pieces(args)  # the same whenever it continues
    assert len(train) == len(set(train)) == 16 and len(held) == len(set(held)) == 4
    books = [{piece.rsplit("\n", 2)[-2].split()[0] for piece in part} for part in (train, held)]
    assert books[1] == {"9", "19"} and not books[0] & books[1]
    with pytest.raises(UserError, match="8000 and 4 are needed"):
        retrofit.pieces(study(place, tmp_path, "--steps", "4000"))


def test_every_retrofit_without_training_is_a_model_of_its_own():
    torch.manual_seed(0)
    idx, seen = torch.randint(3, 100, (1, 12)), {}
    for name, settings in retrofit.CHANGES.items():
        order, rest = settings["nexus_order"], {k: v for k, v in settings.items()
                                                if k != "nexus_order"}
        with torch.no_grad():
            seen[name] = Decoder(nexus(make("llama", torch.float32), order, **rest))(idx)
        assert rest.get("inner", "") in name
    assert {settings.get("inner") for settings in retrofit.CHANGES.values()} == {None, *INNERS}
    for first, second in itertools.combinations(seen, 2):
        assert not torch.allclose(seen[first], seen[second], atol=1e-5), (first, second)


def test_the_loss_is_over_the_labels_of_each_example():
    torch.manual_seed(0)
    model, total = make("llama", torch.float32), 0
    examples = [dict(input_ids=ids, labels=[-100] * 2 + ids[2:]) for ids in (
        torch.randint(3, 100, (n,)).tolist() for n in (9, 5))]
    alone, loss = retrofit.losses(model, examples)
    for example, found in zip(examples, alone, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, 1:-1]
        labels = torch.tensor(example["labels"][2:])
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found == pytest.approx(expected, abs=1e-4)
        total += expected * len(labels)
    assert loss == pytest.approx(total / (7 + 3), abs=1e-4)


def in_this_process(argv, run=subprocess.run, **kwargs):
    """finetune.py without a process of its own, which takes longer to start than to train."""
    if argv[0] != sys.executable:
        return run(argv, **kwargs)
    return SimpleNamespace(returncode=call(finetune.main, *argv[2:])[0])


@pytest.mark.usefixtures("plots")
def test_a_gpt_neox_is_refused_before_the_work(neox, tmp_path):
    assert "is a GPT-NeoX" in refused(retrofit.main, "--model", neox, "--text", "no.txt", "--out",
                                      tmp_path)


@pytest.mark.usefixtures("plots")
def test_every_part_ends_in_lines_and_none_is_made_twice(place, tmp_path, monkeypatch):
    for package in ("accelerate", "jinja2"):
        pytest.importorskip(package, reason=f"extra retrofit: {package}")
    monkeypatch.setattr(retrofit, "CHANGES", dict(list(retrofit.CHANGES.items())[:2]))
    monkeypatch.setattr(retrofit, "PIECE", 100)
    monkeypatch.setattr(retrofit.subprocess, "run", in_this_process)

    def run(*others):
        argv = flags(place, tmp_path, "--variants", "control,cross-k-gated", *others)
        return done(retrofit.main, *argv)

    run("--parts", "loss,scores,text", "--lrs", "1e-3,1e-2")
    assert (tmp_path / "results.jsonl").read_text().count('"model": "model ') == 8
    drawn(tmp_path / "retrofit.svg", ["cross-k-gated"])
    shown = run("--parts", "answers", "--lrs", "1e-3", "--variants", "control")
    lines = read_lines(tmp_path / "results.jsonl")
    assert [line["part"] for line in lines] == (
        ["loss"] * 2 + ["scores"] * 2 + ["text"] * 4 + ["answers"])
    *grid, control, gated = (line for line in lines if line["part"] == "text")
    assert [line["seed"] for line in grid] == [1000, 1000] and control["seed"] == 0
    best = min(grid, key=lambda line: line["loss"])
    assert control["lr"] == gated["lr"] == best["lr"] and "scores" not in best
    assert control["gates"] == [] and any(g for layer in gated["gates"] for g in layer)
    assert len(gated["gates"]) == 2 and set(control["scores"]["sciq"]) <= {"0", "1"}
    assert "answers" in shown
    monkeypatch.setattr(retrofit, "finetune", lambda *args: pytest.fail("run twice"))
    assert "cross-k-gated" in run("--show", "--steps", "9")
    assert run("--parts", "answers", "--lrs", "1e-3", "--variants", "control") == shown
    with open(place / "books.txt", "a") as f:  # another text of the same name is measured again
        f.write("\nmore")
    run("--parts", "loss")
    assert len(read_lines(tmp_path / "results.jsonl")) == len(lines) + 2
    assert "settings, which differ in text" in refused(retrofit.main, *flags(place, tmp_path),
                                                       "--show")
    assert "no file" in refused(retrofit.main, "--show", "--results", tmp_path / "none.jsonl")


@pytest.mark.usefixtures("plots")
def test_maps_that_do_not_fit_a_model_are_left_out_and_data_is_read_first(place, tmp_path):
    model = make("qwen3", torch.float32, vocab_size=320)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    argv = flags(place, tmp_path / "out", "--quick", "--model", tmp_path / "model", "--parts")
    assert "no file" in refused(retrofit.main, *argv, "scores", "--tasks", "sciq,piqa")
    assert not (tmp_path / "out/results.jsonl").exists()
    done(retrofit.main, *argv, "scores")
    assert [line["variant"] for line in read_lines(tmp_path / "out/results.jsonl")] == [
        "order 1", *(f"{inner} on k" for inner in INNERS if inner != "tokens")]
