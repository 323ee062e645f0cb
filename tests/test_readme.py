"""The README's commands name scripts and flags that exist."""

import glob
import os
import re
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = [os.path.join(ROOT, name) for name in ("README.md", "RESULTS.md")]


def commands():
    """{script: its flags in the documents and in the scripts' own docstrings}"""
    found = {}
    scripts = [p for p in glob.glob(f"{ROOT}/*.py") + glob.glob(f"{ROOT}/experiments/*.py")]
    for path in DOCUMENTS + scripts:
        with open(path, encoding="utf-8") as f:
            text = f.read() if path.endswith(".md") else f.read().split('"""')[1]
        for line in text.splitlines():
            for script, rest in re.findall(r"(?:python |\d )((?:experiments/)?\w+\.py)([^`|#]*)",
                                           line):
                flags = re.findall(r"(--\w+)", rest.split(" -- ")[0])
                found.setdefault(script, set()).update(flags)
    return found


def test_every_script_is_mentioned():
    assert {"train.py", "sample.py", "prepare_data.py", "eval_sciq.py", "experiments/compare.py",
            "experiments/cost.py", "experiments/harness.py"} <= commands().keys()


@pytest.mark.parametrize("script", sorted(commands()))
def test_flags_exist(script):
    said = ""
    for command in (["sft"], ["eval"]) if script == "retrofit.py" else ([],):
        out = subprocess.run([sys.executable, os.path.join(ROOT, script), *command, "--help"],
                             capture_output=True, text=True, cwd=ROOT)
        assert out.returncode == 0, out.stderr
        said += out.stdout
    missing = {flag for flag in commands()[script] if flag not in said}
    assert not missing
