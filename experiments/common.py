"""
What the experiments share: the import path, the inner steps, tables and saved results.
"""

import os
import platform
import subprocess
import sys
from typing import get_args

import figures
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # the scripts here run from any folder

from model import GPTConfig  # noqa: E402
from nanonexus.cli import UserError  # noqa: E402
from nanonexus.files import output_folder, write_json  # noqa: E402

INNERS = get_args(GPTConfig.__annotations__["nexus_inner"])  # model.py's inner steps


def commit():
    """The checked-out commit, with a + if files were changed since; None outside of git."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout
    try:
        return (git("rev-parse", "--short=12", "HEAD").strip()
                + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None
    except OSError:
        return None


COMMIT = commit()  # of the code that is loaded: files may change while an experiment runs


def table(rows):
    """Rows of cells, the first the heading, as aligned text."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
                     for row in rows)


def parse(parser, argv=None):
    """The arguments. With --quick and no --out a folder of its own, so that a quick run neither
    meets nor overwrites a full one."""
    args = parser.parse_args(argv)
    if args.quick and args.out == parser.get_default("out"):
        args.out += "-quick"
    return args


def pyplot(out):
    """matplotlib's pyplot, drawing to files, here in the folder out. Call this before the work:
    both may be impossible."""
    output_folder(out)
    try:
        import matplotlib
        import scipy  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[plots]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update(figures.STYLE)
    import matplotlib.pyplot as plt
    return plt


def save(args, name, results, figure=None):
    """Write results with their settings and versions to OUT/name.json, a figure to name.svg."""
    path = os.path.join(args.out, name)
    write_json(path + ".json", dict(settings=vars(args), results=results, versions=dict(
        commit=COMMIT, python=platform.python_version(), torch=str(torch.__version__),
        machine=platform.processor() or platform.machine(), cores=os.cpu_count())))
    if figure:
        figure.tight_layout()
        figures.write(figure, path + ".svg")
    print(f"wrote {path}.json" + f" and {name}.svg" * bool(figure))
