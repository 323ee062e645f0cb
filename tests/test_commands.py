"""The documents' commands: those of under a minute run as printed, the others stand in
docs/commands.md with the time they took."""

import glob
import os
import re
import subprocess
import sys

import pytest

import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = [  # in this order, in a folder that looks like a clone with some runs in out/
    'python sample.py --prompt "The class statement" --num_samples 3',
    "python eval_sciq.py --checkpoint out/ckpt.pt --tasks demo",
    'python -m nanonexus.view --checkpoint out/ckpt.pt --prompt "The class statement" '
    "--out view.html",
    'python -m nanonexus.export --checkpoint out/ckpt.pt --out exported --license "CC BY 4.0"',
    "python experiments/recall.py --tasks one-hop,gapped,gapped-12,gapped-12-parallel "
    "--results docs/results/recall.jsonl --show",
    "python experiments/compare.py --scale text --results docs/results/text.jsonl --show "
    "--variants baseline,key-shift,past,shift-past-k,cross,self,past-k",
    "python experiments/retrofit.py --results docs/results/retrofit.jsonl --show",
]


def documented():
    """Every command line of the documents: of fenced sh blocks, and indented ones."""
    found = set()
    for path in [f"{ROOT}/README.md", f"{ROOT}/CONTRIBUTING.md",
                 *glob.glob(f"{ROOT}/docs/**/*.md", recursive=True)]:
        if path.endswith("commands.md"):
            continue
        with open(path, encoding="utf-8") as f:
            text = f.read().replace("\\\n", " ")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"(?m)^    (\S.*)$", text)
        for line in "\n".join(blocks).splitlines():
            line = re.sub(r"\s+#.*", "", line).strip()
            if re.match(r"(?:[A-Z]+=\S+ )*(?:python|torchrun|srun|bash|experiments/\S+sh)\b", line):
                found.add(re.sub(r"\s+", " ", line))
    return found


def listed():
    """The commands in docs/commands.md."""
    with open(f"{ROOT}/docs/commands.md", encoding="utf-8") as f:
        return set(re.findall(r"(?m)^\| `(.+?)` \|", f.read()))


def test_each_command_runs_here_or_is_listed():
    assert len(documented()) > 30
    assert documented() == listed() | set(RUN) and not listed() & set(RUN)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what a clone holds, and out/ckpt.pt of a run of two steps."""
    folder = tmp_path_factory.mktemp("clone")
    for name in os.listdir(ROOT):
        if name not in ("out", "tokens", ".git", "exported", "view.html"):
            os.symlink(os.path.join(ROOT, name), folder / name)
    before = os.getcwd()
    os.chdir(folder)
    try:
        train.main("--max_steps 2 --eval_windows 8 --device cpu --no-sample".split())
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("command", RUN)
def test_it_runs_as_printed(clone, command):
    if "export" in command:
        pytest.importorskip("safetensors", reason="extra hf: safetensors")
    shell = command.replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(shell, shell=True, cwd=clone, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
