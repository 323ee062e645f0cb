"""The documents' commands run as printed, or are listed here with a reason; they name scripts and
flags that exist, the documents' links lead somewhere, and README's function is our attention."""

import glob
import os
import re
import runpy
import shlex
import sys

import pytest
import torch

import train
from model import GPT, AttnContext, GPTConfig, apply_rotary_emb, attend, rotary_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = [os.path.join(ROOT, name) for name in ("README.md", "RESULTS.md")] + glob.glob(
    f"{ROOT}/docs/**/*.md", recursive=True)
SLOW = {  # how a command begins that does not run here, and why: minutes are those of two CPU cores
    "python -m venv": "makes an environment of its own",
    "OUT=out/70m experiments/reproduce_70m.sh": "needs the hub and a GPU; test_reproduce.py",
    "python eval_sciq.py --checkpoint HuggingFaceTB": "needs the hub",
    "python eval_sciq.py --checkpoint MODEL": "needs the tasks' files; 15 and 6 minutes",
    "python eval_sciq.py --checkpoint out/ckpt.pt --versus": "needs the hub, or 20 minutes",
    "python eval_sciq.py --tasks sciq,arc_easy,piqa": "needs a GPU and the tasks' files",
    "python finetune.py": "needs the hub and a GPU; tiny in test_finetune.py",
    "python prepare_data.py --dataset text": "needs a text; 4 s in bytes to a minute for a BPE",
    "python train.py": "two minutes; the others need a dataset, or a GPU",
    "srun": "needs GPUs; two processes on a CPU in test_distributed.py",
    "torchrun": "needs GPUs; two processes on a CPU in test_distributed.py",
    "python experiments/compare.py": "1 to 4 minutes a run; on a text 5 to 45, its dataset first",
    "python experiments/cost.py": "1.5 minutes for the variants, more for the contexts",
    "python experiments/gpu.py": "needs a GPU, a text and the tasks' files; test_gpu.py",
    "python experiments/induction.py": "30 s to 5 minutes, after compare.py",
    "python experiments/rank.py": "46 minutes",
    "python experiments/recall.py": "3 minutes to an hour",
    "python experiments/retrofit.py": "minutes to an hour a line; needs a model, a text, the tasks",
    "python experiments/spectrum.py": "a minute, after compare.py",
    "python experiments/stability.py": "45 minutes",
}


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def documented():
    """Every command line of the documents: of fenced sh blocks, and indented ones."""
    found = set()
    for path in [*DOCUMENTS, os.path.join(ROOT, "CONTRIBUTING.md")]:
        text = read(path).replace("\\\n", " ")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"(?m)^    (\S.*)$", text)
        for line in "\n".join(blocks).splitlines():
            line = re.sub(r"\s+#.*", "", line).strip()
            if re.match(r"(?:[A-Z]+=\S+ )*(?:python|torchrun|srun|bash|experiments/\S+sh)\b", line):
                found.add(re.sub(r"\s+", " ", line))
    return found


def fast():
    """The documented commands that run here: all that SLOW does not list, and every --show."""
    return sorted(c for c in documented() if "--show" in c or not c.startswith(tuple(SLOW)))


def test_what_is_listed_as_slow_is_documented():
    assert len(fast()) > 10
    for start in SLOW:
        assert any(c.startswith(start) for c in documented() - {*fast()}), start


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what a clone holds, and a run of two steps in out/ and in out/past/."""
    folder = tmp_path_factory.mktemp("clone")
    for name in os.listdir(ROOT):
        if name not in ("out", "tokens", ".git", "exported", "view.html"):
            os.symlink(os.path.join(ROOT, name), folder / name)
    train.main(["--max_steps", "2", "--eval_windows", "8", "--device", "cpu", "--no-sample",
                "--out", str(folder / "out")])
    (folder / "out/past").mkdir()
    os.symlink(folder / "out/ckpt.pt", folder / "out/past/ckpt.pt")
    return folder


@pytest.mark.parametrize("command", fast())
def test_it_runs_as_printed(clone, command, monkeypatch, capsys):
    for package in ["scipy", "matplotlib"] * ("experiments" in command) + \
            ["safetensors"] * ("export" in command):
        pytest.importorskip(package, reason=f"the command needs {package}")
    python, *argv = shlex.split(command)
    assert python == "python", "add it to SLOW, with a reason"
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", argv[argv[0] == "-m":])
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__")
    else:
        runpy.run_path(argv[0], run_name="__main__")
    assert capsys.readouterr().out.strip()


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
            "experiments/compare.py", "experiments/cost.py"} <= commands().keys()


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


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_function_for_nanogpt_is_our_attention(order):
    (code,) = re.findall(r"```python\n(def nexus.*?)```", read(DOCUMENTS[0]), re.S)
    exec(code, scope := dict(F=torch.nn.functional))
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=16, block_size=24, n_layer=1, n_head=2, n_embd=16,
                       nexus_order=order, attention="manual")
    attention = GPT(config).double().blocks[0].attn
    x, rope = torch.randn(3, 24, 16, dtype=torch.float64), rotary_table(config).double()
    ctx = AttnContext(0, "manual", rope, torch.ones(24, 24, dtype=bool).tril(), None, None, None)
    q, k, v = attention.project(x)
    found = scope["nexus"](q, k, v, order, lambda h: apply_rotary_emb(h, *rope))
    refined = attention.refine(x, q, k, v, ctx)
    torch.testing.assert_close(found, attend(*refined, v, ctx), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [*DOCUMENTS, os.path.join(ROOT, "docs", "slides.html")],
                         ids=lambda path: os.path.relpath(path, ROOT))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", read(path)):
        target = "".join(target)
        if not target.startswith("http"):
            assert os.path.exists(os.path.join(os.path.dirname(path), target)), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_every_row_of_a_table_has_its_headings_cells(path):
    tables = re.findall(r"(?:^\|.*\n)+", read(path), re.M)
    for cells in ([re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()]
                  for table in tables):
        assert len(set(cells)) == 1, cells


@pytest.mark.parametrize("path", ["README.md", "RESULTS.md", "docs/teaching.md",
                                  "docs/slides.html"])
def test_a_number_is_quoted_as_a_page_of_results_has_it(path):
    def numbers(*paths):
        return {number for path in paths for number in re.findall(
            r"(?<![\w./])(?:0\.\d\d+|[1-9]\.\d{3,})", open(path, encoding="utf-8").read())}

    pages = glob.glob(os.path.join(ROOT, "docs", "results", "*.md"))
    assert numbers(os.path.join(ROOT, path)) <= numbers(*pages)
