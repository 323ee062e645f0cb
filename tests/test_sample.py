"""sample.py: the text is generate()'s, from a prompt or standard input; mistakes are one line."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import sample
from model import GPT, GPTConfig
from nanonexus.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=320, block_size=32, n_layer=1, n_head=2, n_embd=32,
                          rotary_pct=1.0, nexus_order=2))
    path = tmp_path_factory.mktemp("sample") / "ckpt.pt"
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), step=1, tokens=0,
                    tokenizer="bytes"), path)
    return path, model.eval()


def run(path, *argv, stdin=""):
    return subprocess.run([sys.executable, sample.__file__, "--checkpoint", str(path), "--device",
                           "cpu", *argv], input=stdin.encode(), capture_output=True)


def test_the_text_is_what_generate_gives(checkpoint):
    path, model = checkpoint
    tokenizer = get_tokenizer("bytes")
    prompt = torch.tensor([list("naïve ".encode())])
    want = []
    for seed in (5, 6):
        ids = model.generate(prompt, 60, temperature=0.9, top_k=200, vocab=257, stop=256,
                             generator=torch.Generator().manual_seed(seed))[0].tolist()
        want.append(tokenizer.decode_bytes([i for i in ids if i != 256]).decode(errors="replace"))
    flags = ["--max_new_tokens", "60", "--temperature", "0.9", "--top_k", "200", "--seed", "5",
             "--num_samples", "2"]
    out = run(path, "--prompt", "naïve ", *flags)
    assert out.stdout.decode() == "\n---\n".join(want) + "\n", out.stderr
    assert run(path, *flags, stdin="naïve ").stdout == out.stdout


@pytest.mark.parametrize("argv, stdin, message", [
    (["--prompt", ""], "", "the prompt is empty"), ([], "", "the prompt is empty"),
    (["--prompt", "x" * 40], "", "has 40 tokens, the model's context is 32"),
    (["--prompt", "a", "--top_p", "2"], "", "top_p"),
    (["--prompt", "a", "--seed", "x"], "", "seed"),
    (["--prompt", "a", "--num_samples", "0"], "", "at least 1")])
def test_mistakes(checkpoint, argv, stdin, message):
    out = run(checkpoint[0], *argv, stdin=stdin)
    assert out.returncode == 2 and message in out.stderr.decode() and out.stderr.count(b"\n") == 1
    assert out.stdout in (b"", b"a")


def test_no_checkpoint(tmp_path):
    out = run(os.path.join(tmp_path, "none.pt"), "--prompt", "a")
    assert out.returncode == 2 and b"no checkpoint at" in out.stderr
