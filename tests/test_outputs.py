"""What a command will write is tried before its work, in every script that has such a flag."""

import importlib
import os
import sys

import pytest

from nanonexus.cli import UserError

NEEDS = {"finetune": "transformers", "retrofit": "transformers"}


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
    pytest.importorskip(NEEDS.get(name, "torch"))
    if argv[-1] == "--plot" or name in ("compare", "cost", "induction", "rank", "recall",
                                        "retrofit", "spectrum", "stability"):
        pytest.importorskip("matplotlib")
        pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", [name, *argv, os.path.join("file", "x")])
    with pytest.raises((UserError, OSError), match="file.*(Not a directory|File exists)|"
                       "(Not a directory|File exists).*file"):
        importlib.import_module(name).main()
    assert (tmp_path / "file").read_text() == "mine"
