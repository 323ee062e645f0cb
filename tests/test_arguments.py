"""Whatever is typed, a script ends with status 0 or 2, one line, and leaves nothing behind."""

import argparse
import contextlib
import os
import shutil

import pytest
from test_train import TINY, run, tokens  # noqa: F401

import eval_sciq
import finetune
import prepare_data
import sample
import train
from nanonexus import view

hypothesis = pytest.importorskip("hypothesis")
transformers = pytest.importorskip("transformers")
from hypothesis import given, settings, strategies  # noqa: E402
from questions import byte_tokenizer, call  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

JUNK = ["", " ", "-1", "0", "1", "3", "nan", "-inf", "1e400", "1.5", "1e-9", "9" * 12, "9" * 400,
        "\u202e", "a b", "../nowhere", "/", ".", "--", "-", "[]", "bytes", "gpt2", "flex", "past",
        "k", "pythia-1b", "sciq,demo", "cuda", "{}", "%s", "\n", "*"]


def flags_of(main):
    """The flags of a script, from the parser that its main builds."""
    found = []

    def stop(self, *args, **kwargs):
        found.extend(self._actions)
        raise KeyError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyError):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        main()
    for subparsers in [a for a in found if isinstance(a, argparse._SubParsersAction)]:
        found.extend(subparsers.choices["sft"]._actions)
    return {a.option_strings[0]: a.nargs == 0 or isinstance(a, argparse.BooleanOptionalAction)
            for a in found if a.option_strings
            and a.dest not in ("help", "wandb", "tensorboard", "compile")}


@pytest.fixture(scope="module")
def place(tokens, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("place")
    run(tokens, folder / "model", "--max_steps", 1)
    (folder / "text.txt").write_text("a line of text\n" * 200)
    (folder / "text.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 8)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder / "hf")
    byte_tokenizer().save_pretrained(folder / "hf")
    return folder


SCRIPTS = {
    "train.py": (train.main, lambda p, t: ["--dataset", str(t), "--out", str(p / "out"), *TINY,
                                           "--max_steps", "1", "--max_minutes", "0.002"]),
    "sample.py": (sample.main, lambda p, t: ["--checkpoint", str(p / "model/ckpt.pt"),
                                             "--prompt", "a", "--max_new_tokens", "2"]),
    "view": (view.main, lambda p, t: ["--checkpoint", str(p / "model/ckpt.pt"), "--prompt", "a",
                                      "--out", str(p / "out/view.html")]),
    "prepare_data.py": (prepare_data.main, lambda p, t: [
        "--dataset", "text", "--input", str(p / "text.txt"), "--out", str(p / "set"),
        "--workers", "1"]),
    "eval_sciq.py": (eval_sciq.main, lambda p, t: ["--checkpoint", str(p / "model/ckpt.pt"),
                                                   "--tasks", "demo", "--limit", "1"]),
    "finetune.py": (finetune.main, lambda p, t: [
        "sft", "--model", str(p / "hf"), "--data", str(p / "text.jsonl"), "--out", str(p / "out"),
        "--max_steps", "1", "--batch", "2", "--log_interval", "1", "--device", "cpu"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_arguments(name, place, tokens, monkeypatch):  # noqa: F811
    main, base = SCRIPTS[name]
    monkeypatch.chdir(place)  # relative names of the junk land here
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    known = flags_of(main)
    flag = strategies.sampled_from(sorted(known))
    pair = strategies.tuples(flag, strategies.sampled_from(JUNK) | strategies.text(max_size=5))
    statuses = []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True,
              phases=[hypothesis.Phase.generate],
              suppress_health_check=list(hypothesis.HealthCheck))
    @given(strategies.lists(pair, min_size=1, max_size=3))
    def attempt(pairs):
        argv = base(place, tokens)
        for option, value in pairs:
            argv += [option] if known[option] else [f"{option}={value}"]
        status, _, errors = call(main, *argv)
        assert status in (0, 2), (argv, errors)
        assert status == 0 or errors.count("\n") == 1 and "Traceback" not in errors, (argv, errors)
        left = [f for _, _, files in os.walk(place) for f in files if "partial" in f]
        assert not left, argv
        statuses.append(status)
        for folder in ("out", "set"):
            shutil.rmtree(place / folder, ignore_errors=True)

    attempt()
    assert len(statuses) >= 40 and 2 in statuses
