"""sample.py: the text is generate()'s, from a prompt or standard input."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from questions import call, save

import sample
from model import GPT, GPTConfig
from nanonexus.generate import generate
from nanonexus.hf import open_model

CONFIG = GPTConfig(vocab_size=320, block_size=32, n_layer=1, n_head=2, n_embd=32, rotary_pct=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sample") / "ckpt.pt"
    save(GPT(replace(CONFIG, nexus_order=2)), path)
    return path


def run(path, *argv):
    """(exit status, standard output, standard error) of the command."""
    return call(sample.main, "--checkpoint", path, "--device", "cpu", "--max_new_tokens", 20, *argv)


def wanted(path, ids, seed=0, **kwargs):
    """What the command must print for the prompt ids, by generate."""
    model, tokenizer, _ = open_model(path)
    ids = generate(model, torch.tensor([ids]), 20, stop=tokenizer.eot_token,
                   vocab=tokenizer.n_vocab, generator=torch.Generator().manual_seed(seed),
                   **kwargs)[0].tolist()
    return tokenizer.decode(ids).removesuffix("<|endoftext|>") + "\n"


def test_the_text_is_what_generate_gives(checkpoint):
    ids = list("naïve ".encode())
    want = "---\n".join(wanted(checkpoint, ids, seed, temperature=0.9, top_k=200)
                        for seed in (5, 6))
    flags = ["--temperature", "0.9", "--top_k", "200", "--seed", "5", "--num_samples", "2"]
    name = f"{checkpoint}: order 2, self\n"  # which model it is
    assert run(checkpoint, "--prompt", "naïve ", *flags) == (0, want, name)
    done = subprocess.run(
        [sys.executable, sample.__file__, "--checkpoint", str(checkpoint), "--device", "cpu",
         "--max_new_tokens", "20", *flags], input="naïve \n".encode(),  # as `echo` writes it
        capture_output=True, env=os.environ | dict(PYTHONUTF8="1"))
    assert done.stdout.replace(os.linesep.encode(), b"\n").decode() == want, done.stderr


def test_the_end_of_a_text_begins_a_new_one(checkpoint):
    """<|endoftext|> in a prompt is one token, as it is to the checkpoint's export."""
    assert run(checkpoint, "--prompt", "<|endoftext|>", "--temperature", "0")[1] == wanted(
        checkpoint, [256], temperature=0)


def test_a_tiny_temperature_takes_the_most_likely(checkpoint):
    first, *others = [run(checkpoint, "--prompt", "abc", "--temperature", value)
                      for value in ("0", "1e-40", "1e-300")]
    assert others == [first] * 2 and len(first[1]) > 4


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_model_that_has_diverged_is_refused(tmp_path, temperature):
    model = GPT(CONFIG)
    model.blocks[0].mlp.up.weight.data[3] = torch.nan
    save(model, tmp_path / "now.pt")
    torch.save(dict(model=model.state_dict(), config=vars(model.config), step=1,
                    tokenizer="bytes"), tmp_path / "before.pt")  # the first format: no logits
    for name in ("now.pt", "before.pt"):
        status, out, said = run(tmp_path / name, "--prompt", "abc", "--temperature", temperature)
        assert (status, out) == (2, "") and "the model has diverged" in said.splitlines()[-1]
        assert "order" not in said
