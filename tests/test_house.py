"""The structure: imports go one way, without circles, and files stay small."""

import ast
import glob
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAZY = {"accelerate", "datasets", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "peft",
        "pyarrow", "safetensors", "scipy", "tensorboard", "tiktoken", "tokenizers", "tqdm",
        "transformers", "wandb"}


PATHS = [path for folder in (".", "nanonexus", "experiments")
         for path in glob.glob(os.path.join(ROOT, folder, "*.py"))]


def module(path):
    """The name under which a file is imported."""
    name = os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".")
    return name.removesuffix(".__init__")


def tree(path):
    with open(path, encoding="utf-8") as f:
        return ast.parse(f.read())


def imports(path):
    """(module names imported at the top level, those imported inside functions) of a file."""
    top, inner = set(), set()

    def walk(node, within):
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [child.module]
                if child.module == "nanonexus":  # from nanonexus import data
                    names = [f"nanonexus.{alias.name}" for alias in child.names]
            (inner if within else top).update(names)
            walk(child, within or isinstance(child, ast.FunctionDef))

    walk(tree(path), False)
    return top, inner


IMPORTS = {module(path): imports(path) for path in PATHS}  # of model, nanonexus, scripts, studies


def first(names):
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


def arrows():
    """{module: modules of ours that it imports}; experiments know each other by bare names."""
    result = {}
    for name, found in IMPORTS.items():
        beside = "experiments." if name.startswith("experiments.") else ""
        ours = {n if n in IMPORTS else beside + n for n in set().union(*found)}
        result[name] = ours & IMPORTS.keys()
    return result


def test_arrows_point_from_scripts_to_nanonexus_to_the_model_without_circles():
    found, done = arrows(), set()
    assert len(found) > 25 and "model" in found["nanonexus.checkpoint"]  # the walk sees something
    for name, targets in found.items():
        if name == "model" or name.startswith("nanonexus"):
            assert all(n == "model" or n.startswith("nanonexus") for n in targets), (name, targets)
    assert not found["model"]

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in found[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in found:
        visit(name, [])


def test_the_model_needs_torch_alone_and_training_numpy_besides():
    assert first(set().union(*IMPORTS["model"])) == {"torch"}
    found, wanted, seen = arrows(), ["train"], set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            wanted += found[name]
    packages = set().union(*(first(IMPORTS[name][0]) for name in seen))
    assert {"torch", "numpy"} == packages - {"model", "nanonexus"}


def test_only_optional_packages_are_imported_inside_functions():
    for name, (_, inner) in IMPORTS.items():
        inner = {n.split(".")[0] for n in inner}
        assert inner <= LAZY | {"torch", "fcntl", "pydoc_data"}, (name, inner)


def test_nothing_loaded_is_trusted_and_text_is_utf8_on_every_system():
    """No compile of text, no trust_remote_code (pyproject.toml's rules of ruff find eval, exec,
    pickle and a shell); and no open() that reads and writes text as the system's locale says."""
    for path in PATHS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", None)
                assert called not in ("compile", "__import__"), path
                if called == "open" and not any(k.arg == "encoding" for k in node.keywords):
                    assert any("b" in ast.unparse(mode) for mode in node.args[1:]) or \
                        "devnull" in ast.unparse(node), (path, node.lineno)
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
                assert node.arg != "weights_only" or node.value.value is True, path


def test_no_file_is_long():
    for path in [*PATHS, *glob.glob(os.path.join(ROOT, "tests", "*.py"))]:
        with open(path, encoding="utf-8") as f:
            assert len(f.readlines()) <= (350 if module(path) == "model" else 400), path


def test_a_model_py_of_the_users_own_is_named(tmp_path):
    """It comes first in the current folder; nanoGPT's has a GPT too."""
    (tmp_path / "model.py").write_text("class GPT: pass\n")
    for argv in (["-m", "nanonexus.view"], ["-c", "import nanonexus.export"]):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | dict(PYTHONPATH=ROOT))
        last = done.stderr.splitlines()[-1]
        assert f"finds {tmp_path / 'model.py'}, not nanoNexus's model.py: run this in" in last
        if argv[0] == "-m":
            assert done.returncode == 2 and done.stderr.count("\n") == 1
