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


def test_change_is_nought_at_order_1_and_gate_0():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **retrofit.SHAPE)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    changes = retrofit.change(model, torch.randint(64, (2, 20)))
    assert abs(changes["original"]["kl"]) < 1e-6 and abs(changes["order 2, gate 0.0"]["kl"]) < 1e-6
    assert 1e-4 < changes["order 2, gate 0.25"]["kl"] < changes["order 2"]["kl"]
    assert changes["original"]["loss"] == changes["order 2, gate 0.0"]["loss"]


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(retrofit, "VARIANTS", {"order 1": ["--order", "1"],
                                               "order 2, gated": ["--order", "2", "--gate", "0"]})
    argv = "--steps 2 --batch 2 --context 32 --sft_steps 2 --examples 64 --sft_batch 4 --seeds 1"
    monkeypatch.setattr(sys, "argv", ["retrofit.py", *argv.split(), "--out", str(tmp_path)])
    retrofit.main()
    results = json.loads((tmp_path / "retrofit.json").read_text())["results"]
    assert len(results["runs"]["order 1"]["losses"][0]) == 2
    assert results["runs"]["order 1"]["gates"] == [None]
    assert results["runs"]["order 2, gated"]["gates"][0] > 0
    assert "2,425,152 parameters" in capsys.readouterr().out
    assert (tmp_path / "retrofit.png").exists()
    monkeypatch.setattr(sys, "argv", ["retrofit.py", "--terms", "1"])
    with pytest.raises(UserError, match="--terms: must be a number from 2"):
        retrofit.main()
