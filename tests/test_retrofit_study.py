"""experiments/retrofit.py: questions have the answers they claim, a gate of 0 changes nothing."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
import retrofit  # noqa: E402

from nanonexus.cli import UserError  # noqa: E402


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_questions_have_their_answers(steps):
    rows = retrofit.questions(200, steps, seed=1)
    assert rows == retrofit.questions(200, steps, seed=1) != retrofit.questions(200, steps, seed=2)
    for row in rows:
        digits = row["prompt"].rstrip("=").split("+")
        so_far = digits[0]
        for digit, said in zip(digits[1:], row["answer"].split(), strict=True):
            so_far = str(int(so_far) + int(digit))
            assert so_far[-1] == said


def test_bytes_there_and_back():
    tokenizer = retrofit.byte_tokenizer()
    text = "naïve 🙂\n\ttwo  spaces"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 258 <= 320


def test_change_is_zero_at_order_1_and_gate_0():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **retrofit.SHAPE)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    batch = torch.randint(64, (2, 20))
    names = ["original", *(f"{inner}{gate}" for inner in ("self", "past", "cross")
                           for gate in ("", ", gate 0.0", ", gate 0.25")), "key-shift, gate 0.25"]
    changes = {name: retrofit.change(model, batch, retrofit.CHANGES[name]) for name in names}
    assert abs(changes["original"]["kl"]) < 1e-6
    for inner in ("self", "past", "cross"):
        assert abs(changes[f"{inner}, gate 0.0"]["kl"]) < 1e-6
        assert 1e-4 < changes[f"{inner}, gate 0.25"]["kl"] < changes[inner]["kl"]
        assert changes["original"]["loss"] == changes[f"{inner}, gate 0.0"]["loss"]
    assert changes["key-shift, gate 0.25"]["kl"] > 1e-4
    assert len({r["kl"] for r in changes.values()}) >= 8  # each is a different retrofit


def test_accuracy_counts_answers_and_their_steps():
    class Model:  # answers every question except its last step
        def generate(self, input_ids, **kwargs):
            answers = [row["answer"][:-1] + str((int(row["answer"][-1]) + 1) % 10) for row in rows]
            ends = tokenizer(answers, return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, ends], dim=1)

    tokenizer, rows = retrofit.byte_tokenizer(), retrofit.questions(30, 3, seed=0)
    args = retrofit.build_parser().parse_args([])
    assert retrofit.accuracy(Model(), tokenizer, rows, args) == (0, [1, 1, 0])


@pytest.mark.usefixtures("plots")
def test_runs_end_in_a_line_and_are_never_run_again(tmp_path, monkeypatch, capsys):
    for package in ("accelerate", "jinja2"):
        pytest.importorskip(package, reason=f"extra retrofit: {package}")
    argv = ("--steps 2 --batch 2 --context 32 --sft_steps 2 --examples 64 --sft_batch 4 --seeds 1 "
            f"--variants baseline,past-gated --out {tmp_path}").split()

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["retrofit.py", *argv, *flags])
        retrofit.main()
        return capsys.readouterr().out

    few = dict(list(retrofit.CHANGES.items())[:2])
    monkeypatch.setattr(retrofit, "CHANGES", few)
    assert "2,425,152 parameters" in run()
    results = json.loads((tmp_path / "retrofit.json").read_text())["results"]
    assert len(results["runs"]["baseline"]["0"]["losses"]) == 2
    assert results["runs"]["baseline"]["0"]["gate"] is None
    assert results["runs"]["past-gated"]["0"]["gate"] > 0
    assert list(results["changes"]) == list(few)
    assert (tmp_path / "retrofit.svg").exists()

    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 2
    monkeypatch.setattr(retrofit, "finetune", lambda *args: pytest.fail("run twice"))
    shown = run("--show")  # neither the text nor the flags of the runs are needed for it
    assert run("--results", str(tmp_path / "results.jsonl")).endswith(shown)
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    with pytest.raises(UserError, match="pretrained with other settings"):
        run("--steps", "3")
    other = json.loads(lines[-1])
    other["settings"]["sft_steps"] = 3
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    with pytest.raises(UserError, match="lines of several settings"):
        run("--show")
    with pytest.raises(UserError, match="no variant nonsense"):
        run("--variants", "nonsense")
    with pytest.raises(UserError, match="--terms: must be a number from 2"):
        run("--terms", "1")
