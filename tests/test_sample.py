"""sample.py: the text is generate()'s, from a prompt or standard input; mistakes are one line."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from questions import save

import sample
from model import GPT, GPTConfig
from nanonexus.cli import run_script
from nanonexus.controls import build
from nanonexus.generate import generate
from nanonexus.hf import open_model
from nanonexus.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=320, block_size=32, n_layer=1, n_head=2, n_embd=32,
                          rotary_pct=1.0, nexus_order=2))
    path = tmp_path_factory.mktemp("sample") / "ckpt.pt"
    save(model, path)
    return path, model.eval()


def run(path, *argv, stdin=""):
    done = subprocess.run([sys.executable, sample.__file__, "--checkpoint", str(path), "--device",
                           "cpu", *argv], input=stdin.encode(), capture_output=True,
                          env=os.environ | dict(PYTHONUTF8="1"))
    done.stdout = done.stdout.replace(os.linesep.encode(), b"\n")
    return done


def test_the_text_is_what_generate_gives(checkpoint):
    path, model = checkpoint
    tokenizer = get_tokenizer("bytes")
    prompt = torch.tensor([list("naïve ".encode())])
    want = []
    for seed in (5, 6):
        ids = generate(model, prompt, 60, temperature=0.9, top_k=200, vocab=257, stop=256,
                       generator=torch.Generator().manual_seed(seed))[0].tolist()
        want.append(tokenizer.decode_bytes([i for i in ids if i != 256]).decode(errors="replace"))
    flags = ["--max_new_tokens", "60", "--temperature", "0.9", "--top_k", "200", "--seed", "5",
             "--num_samples", "2"]
    out = run(path, "--prompt", "naïve ", *flags)
    assert out.stdout.decode() == "\n---\n".join(want) + "\n", out.stderr
    assert out.stderr.decode() == f"{path}: order 2, self\n"  # which model it is
    assert run(path, *flags, stdin="naïve \n").stdout == out.stdout  # as `echo` writes it


@pytest.mark.parametrize("argv, stdin, message", [
    (["--prompt", ""], "", "--prompt: expected a value"), ([], "", "the prompt is empty"),
    (["--prompt", "x" * 40], "", "has 40 tokens, the model's context is 32"),
    (["--prompt", "a", "--top_p", "2"], "", "top_p"),
    (["--prompt", "a", "--seed", "x"], "", "seed"),
    (["--prompt", "a", "--device", "cpu:1"], "", "no device 'cpu:1' here"),
    (["--prompt", "a", "--num_samples", "0"], "", "--num_samples: must be a number from 1")])
def test_mistakes(checkpoint, argv, stdin, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(checkpoint[0]), "--device",
                                      "cpu", *argv])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as end:
        run_script(sample.main)
    out = capsys.readouterr()
    assert end.value.code == 2 and message in out.err and out.err.count("\n") == 1
    assert out.out == ""


def call(monkeypatch, path, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(path), "--device", "cpu",
                                      "--max_new_tokens", "5", *argv])
    run_script(sample.main)


def test_a_control_says_what_it_is(tmp_path, monkeypatch, capsys):
    config = GPTConfig(vocab_size=320, block_size=32, n_layer=1, n_head=2, n_embd=32)
    save(build(replace(config, control="key-shift")), tmp_path / "c.pt")
    call(monkeypatch, tmp_path / "c.pt", "--prompt", "a")
    out = capsys.readouterr()
    assert out.err == f"{tmp_path / 'c.pt'}: order 1, key-shift\n" and out.out.startswith("a")


def test_the_end_of_a_text_begins_a_new_one(checkpoint, monkeypatch, capsys):
    """<|endoftext|> in a prompt is one token, as it is to the checkpoint's export."""
    path, model = checkpoint
    call(monkeypatch, path, "--prompt", "<|endoftext|>", "--temperature", "0")
    want = generate(model, torch.tensor([[256]]), 5, temperature=0, vocab=257, stop=256)[0].tolist()
    text = get_tokenizer("bytes").decode_bytes([i for i in want[1:] if i != 256])
    assert capsys.readouterr().out == "<|endoftext|>" + text.decode(errors="replace") + "\n"


@pytest.mark.parametrize("temperature", ["1e-40", "1e-300"])
def test_a_tiny_temperature_takes_the_most_likely(checkpoint, temperature, monkeypatch, capsys):
    texts = []
    for value in ("0", temperature):
        call(monkeypatch, checkpoint[0], "--prompt", "abc", "--temperature", value)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 4


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_model_that_has_diverged_is_refused(tmp_path, temperature, monkeypatch, capsys):
    model = GPT(GPTConfig(vocab_size=320, block_size=32, n_layer=1, n_head=2, n_embd=32))
    model.blocks[0].mlp.up.weight.data[3] = torch.nan
    save(model, tmp_path / "now.pt")
    torch.save(dict(model=model.state_dict(), config=vars(model.config), step=1,
                    tokenizer="bytes"), tmp_path / "before.pt")  # the first format: no logits
    for name in ("now.pt", "before.pt"):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, tmp_path / name, "--prompt", "abc", "--temperature", temperature)
        out = capsys.readouterr()
        assert end.value.code == 2 and "the model has diverged" in out.err.splitlines()[-1]
        assert out.out == "" and "order" not in out.err


def test_text_from_a_hugging_face_folder(neox):
    model, tokenizer, _ = open_model(neox)
    ids = tokenizer.encode_ordinary("The river 🙂")
    want = generate(model, torch.tensor([ids]), 40, temperature=1.5, stop=tokenizer.eot_token,
                    vocab=tokenizer.n_vocab, generator=torch.Generator().manual_seed(3))[0].tolist()
    out = run(neox, "--prompt", "The river 🙂", "--max_new_tokens", "40", "--temperature", "1.5",
              "--seed", "3")
    assert out.stdout.decode() == tokenizer.decode(want).removesuffix("<|endoftext|>") + "\n"
    assert len(set(want)) > 20, out.stderr


def test_no_checkpoint(tmp_path):
    out = run(os.path.join(tmp_path, "none.pt"), "--prompt", "a")
    assert out.returncode == 2 and b"no checkpoint at" in out.stderr
