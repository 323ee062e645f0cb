"""finetune.py: its questions have the answers they claim, and a gate of 0 changes nothing."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
import finetune  # noqa: E402
from nanonexus.cli import UserError  # noqa: E402


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_questions_have_their_answers(steps):
    rows = finetune.questions(200, steps, seed=1)
    assert rows == finetune.questions(200, steps, seed=1) != finetune.questions(200, steps, seed=2)
    for row in rows:
        digits = row["prompt"].rstrip("=").split("+")
        so_far = digits[0]
        for digit, said in zip(digits[1:], row["answer"].split(), strict=True):
            so_far = str(int(so_far) + int(digit))
            assert so_far[-1] == said


def test_bytes_there_and_back():
    tokenizer = finetune.byte_tokenizer()
    text = "naïve 🙂\n\ttwo  spaces"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 258 <= 320


def test_change_is_nought_at_order_1_and_gate_0():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **finetune.SHAPE)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    changes = finetune.change(model, torch.randint(64, (2, 20)))
    assert abs(changes["original"]["kl"]) < 1e-6 and abs(changes["order 2, gate 0.0"]["kl"]) < 1e-6
    assert 1e-4 < changes["order 2, gate 0.25"]["kl"] < changes["order 2"]["kl"]
    assert changes["original"]["loss"] == changes["order 2, gate 0.0"]["loss"]


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(finetune, "VARIANTS", {"order 1": ["--order", "1"],
                                               "order 2, gated": ["--order", "2", "--gate", "0"]})
    argv = "--steps 2 --batch 2 --context 32 --sft_steps 2 --examples 64 --sft_batch 4 --seeds 1"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *argv.split(), "--out", str(tmp_path)])
    finetune.main()
    results = json.loads((tmp_path / "finetune.json").read_text())["results"]
    assert len(results["runs"]["order 1"]["losses"][0]) == 2
    assert results["runs"]["order 1"]["gates"] == [None]
    assert results["runs"]["order 2, gated"]["gates"][0] > 0
    assert "2,425,152 parameters" in capsys.readouterr().out
    assert (tmp_path / "finetune.png").exists()
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--terms", "1"])
    with pytest.raises(UserError, match="--terms from 2"):
        finetune.main()
