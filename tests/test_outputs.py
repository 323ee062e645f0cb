"""What every script does before its work: a mistake is one line, and its output is tried."""

import importlib
import io
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from questions import ROWS, refused, save, write_rows
from test_train import tokens  # noqa: F401

import eval_sciq
from model import GPT, GPTConfig
from nanonexus.cli import UserError
from nanonexus.tokenizer import train_bpe

HF = ("finetune", "nanonexus.export", "retrofit")
PLOTS = ("compare", "induction", "rank", "recall", "retrofit", "spectrum", "stability")


def script(name, argv):
    """main of the script of this name; the test is skipped if its packages are missing."""
    for package in ["transformers"] * (name in HF) + [
            "matplotlib", "scipy"] * (name in PLOTS or "--plot" in argv):
        pytest.importorskip(package)
    return importlib.import_module(name).main


@pytest.mark.parametrize("command", [  # otherwise what is missing would be said first, or work done
    "eval_sciq --checkpoint none.pt --tasks demo --json",
    "eval_sciq --checkpoint none.pt --versus none.pt --tasks demo --plot",
    "finetune eval --model none --json", "finetune sft --model none --data none.jsonl --out",
    "prepare_data --tokenizer none --out", "train --dataset none --out",
    "nanonexus.view --checkpoint none.pt --prompt a --out", "compare --dataset none --out",
    "cost --out", "gpu --tokens none --out",
    "induction --out", "parity --out", "rank --out", "recall --out", "recall --out x --results",
    "retrofit --out", "retrofit --out x --text file --results", "spectrum --out",
    "stability --out"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, tmp_path,
                                                                     monkeypatch):
    name, *argv = command.split()
    main = script(name, argv)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", [name, *argv, os.path.join("file", "x")])
    with pytest.raises((UserError, OSError), match="file.*(Not a directory|File exists)|"
                       "(Not a directory|File exists).*file"):
        main()
    assert (tmp_path / "file").read_text() == "mine"


# --- mistakes -------------------------------------------------------------------------------------

RIGHT = {  # flags to which those of a mistake are added
    "train": "--dataset set --out run --device cpu --n_layer 1 --n_head 2 --n_embd 32 --block_size "
             "32 --batch_tokens 256 --micro_batch 4",
    "sample": "--checkpoint ckpt.pt --device cpu", "nanonexus.view": "--checkpoint ckpt.pt",
    "eval_sciq": "--checkpoint ckpt.pt --device cpu --tasks demo",
    "gpu": "--tokens set --device cpu --preset tiny --out out --work work --tasks demo",
    "spectrum": "--contexts 8 --widths 4"}


@pytest.fixture(scope="module")
def place(tokens, tmp_path_factory):  # noqa: F811
    """A folder with checkpoints, datasets, rows, and files of another kind than a flag wants."""
    folder = tmp_path_factory.mktemp("place")
    config = GPTConfig(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=32)
    for name, change in dict(ckpt={}, long=dict(block_size=512), short=dict(block_size=8),
                             heads=dict(n_head=4)).items():
        save(GPT(replace(config, **change)), folder / f"{name}.pt")
    save(GPT(config), folder / "words.pt", tokenizer="bpe:300",  # "a" is 97, too
         tokenizer_json=train_bpe(["a b c " * 9], 300))
    for name in ("set", "flipped"):
        shutil.copytree(tokens, folder / name)
    with open(folder / "flipped/train.bin", "r+b") as f:
        f.write(b"~")
    for name in ("file.pt", "a.txt", "a.jsonl", "a.tar.xz"):
        (folder / name).write_text("nonsense")
    (folder / "recall.jsonl").write_text('{"task": "one-hop"}\n')
    (folder / "arc_easy_test.jsonl").write_text("\n")
    write_rows(folder, dict(piqa=[ROWS["piqa"][0], dict(goal="a", sol1="b", label=1)]))
    return folder


@pytest.mark.parametrize("command, message", [
    ("train --batch_tokens 300", "multiple of block_size x processes x micro_batch = 128: use 256"),
    ("train --dataset ./pydoc", "no dataset .*pydoc: use pydocs, or"),
    ("train --dataset ./a.txt", "--input ./a.txt --out tokens/a, then use --dataset tokens/a"),
    ("train --dataset flipped --verify", "does not have the sha256"),
    ("train --lr nan", "--lr"), ("train --log_intervall 3", "log_intervall"),
    ("train --warmup_steps 8 --decay_steps 4", "8 ends after --decay_steps 4: lower it"),
    ("train --control shift", "key-shift"), ("train --nexus_inner own", "nexus_inner"),
    ("train --control near --nexus_order 1", "near needs nexus_order 2"),
    ("train --control near --nexus_inner self", "near takes the place of --nexus_inner"),
    ("train --doc_mask --control mean", "reaches across documents"),
    ("train --vocab_size 100", "less than the dataset's 320"), ("train --n_head 3", "n_head"),
    ("train --attention flex", "use --attention"), ("train --resume", "no checkpoint at"),
    ("train --block_size 50000 --batch_tokens 200000", "fewer than one sequence"),
    ("sample", "the prompt is empty"), ("sample --prompt a --top_p 2", "top_p"),
    (f"sample --prompt {'x' * 70}", "has 70 tokens, the model's context is 64"),
    ("sample --prompt a --device cpu:1", "no device 'cpu:1' here"),
    ("sample --num_samples 0", "--num_samples: must be a number from 1"),
    ("sample --prompt a --checkpoint none.pt", "no checkpoint at"),
    (f"nanonexus.view --prompt {'x' * 65}", "context is 64"),
    (f"nanonexus.view --prompt {'x' * 257} --checkpoint long.pt", "257 tokens, .* at most 256"),
    ("nanonexus.view --prompt a --layers 3", "has 2 layers, there is no 3"),
    ("nanonexus.view --prompt a --baseline words.pt", "words.pt has a different tokenizer"),
    ("nanonexus.view --prompt a --baseline heads.pt", "has n_head 4, the checkpoint 2"),
    ("nanonexus.view --prompt a --baseline heads.pt --out heads.pt", "is read as heads.pt"),
    ("nanonexus.view --prompt xxxxxxxxx --baseline short.pt", "9 tokens, .* of short.pt is 8"),
    ("eval_sciq --tasks zz", "choose from all, sciq"),
    ("eval_sciq --tasks sciq --data none", "sciq_test.jsonl: task sciq needs it, with the columns"),
    ("eval_sciq --data . --tasks piqa", "piqa_validation.jsonl, line 2: no column 'sol2'"),
    ("eval_sciq --data . --tasks arc_easy", "has no rows"),
    ("eval_sciq --checkpoint no.pt", "no checkpoint at"),
    ("eval_sciq --checkpoint file.pt", "damaged"), ("eval_sciq --versus no.pt", "no checkpoint at"),
    ("eval_sciq --batch_size 0", "must be a number from 1"),
    ("eval_sciq --plot a.png", "no effect without --versus"),
    ("eval_sciq --versus long.pt --plot v.xyz", "--plot v.xyz: no such kind of picture.* png,"),
    ("eval_sciq --checkpoint file.pt --json file.pt", "file.pt is read as file.pt:"),
    ("eval_sciq --versus file.pt --plot ./file.pt", "file.pt is read as file.pt:"),
    ("nanonexus.export --checkpoint ckpt.pt --out set", "set exists and is not empty"),
    ("finetune", "required: sft.eval"), ("finetune sfd", "sfd"),
    ("finetune sft --model no/model --data a.jsonl --out out", "a.jsonl, line 1: not JSON"),
    ("finetune sft --model no/model --data no.jsonl --out out", "no.jsonl cannot be read: No such"),
    ("finetune sft --model no/model --data a.txt --out out", "a.txt is plain text"),
    ("finetune sft --model no/model --data recall.jsonl --out out", "no file or folder no/model"),
    ("finetune eval --model . --versus no/model", "no file or folder no/model"),
    ("finetune eval --model . --layers 0 --streams q --inner cross --gate 0",
     "no effect without --order: --streams, --inner, --layers, --gate"),
    ("compare --variants nexus2", "no variant 'nexus2'"),
    ("compare --scale text", "needs --dataset"),
    ("compare --show --results recall.jsonl", "is damaged"),
    ("compare --show --results none", "no finished run in none"),
    ("cost --orders 2", "must begin with 1, the"), ("cost --presets huge", "not 'huge'"),
    ("cost --variants longer", "not 'longer'"),
    ("cost --nanogpt nowhere.py", "no file nowhere.py"),
    ("gpu --tokens none", "no dataset in none"), ("gpu --tokens a.tar.xz", "cannot be unpacked"),
    ("gpu --tasks nope", "choose from sciq"), ("gpu --parts nope", "choose from parity"),
    ("gpu --data . --tasks sciq", "no file .*sciq_test.jsonl"),
    ("gpu --variants longer", "choose from baseline"), ("gpu -- --nope", "unrecognized.* --nope"),
    ("gpu -- --nexus_order=3", "sets --nexus_order itself"),
    ("induction --runs nowhere", "no folder nowhere"),
    ("induction --variants baseline,keyshift", "no variant 'keyshift'"),
    ("induction --variants baseline", "the baseline and at least one more"),
    ("recall --variants nexus-2", "not 'nexus-2'"), ("recall --tasks three-hops", "not 'three-hop"),
    ("recall --pairs 17", "from 1 to 16"), ("recall --show", "results.jsonl has no finished run"),
    ("rank --d 64", "must be below --T, 64"), ("rank --seeds 1", "from 2 to 1000"),
    ("stability --orders 2", "must begin with 1"), ("stability --lrs nan", "number above 0"),
    ("spectrum --runs nowhere", "no folder nowhere: python experiments/compare.py --out nowhere"),
    ("spectrum --variants baseline,pats", "'pats'"), ("spectrum --widths 16,15", "even"),
    ("stability --width 12", "multiple of 8"), ("cost --device foo", "'foo'"),
    (f"cost --device {'mps' if torch.cuda.is_available() else 'cuda'}", "no device .* here"),
    ("spectrum --runs .", "[.]/baseline-seed0/ckpt.pt is missing"),
    ("spectrum --tol 1", "to 0.999, got 1"), ("spectrum --contexts 4", "from 8 to 16384, got 4")])
def test_a_mistake_is_one_line_before_the_work(command, message, place, monkeypatch):
    def files():  # but train.py's lock and empty log
        return {path for path in place.rglob("*") if path.is_file() and path.name != ".lock"
                and (path.name != "log.jsonl" or path.stat().st_size)}

    name, *argv = command.split()
    main, before = script(name, argv), files()
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(eval_sciq, "evaluate", None)
    said = refused(main, *RIGHT.get(name, "").split(), *argv)
    assert re.search(message, said) and files() == before, said
