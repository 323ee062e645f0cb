"""The documents' commands name scripts and flags that exist, and their code is model.py's."""

import glob
import os
import re
import runpy
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = [os.path.join(ROOT, name) for name in ("README.md", "RESULTS.md")] + glob.glob(
    f"{ROOT}/docs/**/*.md", recursive=True)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def commands():
    """{script: its flags in the documents and in the scripts' own docstrings}"""
    found = {}
    scripts = [p for p in glob.glob(f"{ROOT}/*.py") + glob.glob(f"{ROOT}/experiments/*.py")]
    for path in DOCUMENTS + scripts:
        text = read(path) if path.endswith(".md") else read(path).split('"""')[1]
        text = text.replace("\\\n", " ")  # a command over two lines
        for line in text.splitlines():
            for script, rest in re.findall(r"(?:python |\d )((?:experiments/)?\w+\.py)([^`|#]*)",
                                           line):
                flags = re.findall(r"(--\w+)", rest.split(" -- ")[0])
                found.setdefault(script, set()).update(flags)
    return found


def test_every_script_is_mentioned():
    assert {"train.py", "sample.py", "prepare_data.py", "eval_sciq.py", "finetune.py",
            "experiments/compare.py", "experiments/cost.py",
            "experiments/harness.py"} <= commands().keys()


@pytest.mark.parametrize("script", sorted(commands()))
def test_flags_exist(script, monkeypatch, capsys):
    path = os.path.join(ROOT, script)
    for command in (["sft"], ["eval"]) if script == "finetune.py" else ([],):
        monkeypatch.setattr(sys, "argv", [path, *command, "--help"])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert not end.code
    said = capsys.readouterr().out
    missing = {flag for flag in commands()[script] if flag not in said}
    assert not missing


def test_the_ten_lines_are_the_models():
    code = [block for block in re.findall(r"```python\n(.*?)```", read(DOCUMENTS[0]), re.S)
            if "def refine" in block]
    assert len(code) == 1 and code[0] in read(os.path.join(ROOT, "model.py"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", read(path)):
        if not target.startswith("http"):
            assert os.path.exists(os.path.join(os.path.dirname(path), target)), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_every_row_of_a_table_has_its_headings_cells(path):
    tables = re.findall(r"(?:^\|.*\n)+", read(path), re.M)
    for cells in ([re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()]
                  for table in tables):
        assert len(set(cells)) == 1, cells
