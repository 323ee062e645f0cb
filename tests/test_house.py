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


def sources():
    """{module: path} of model.py, nanonexus, the scripts and the experiments."""
    found = {}
    for folder in (".", "nanonexus", "experiments"):
        for path in glob.glob(os.path.join(ROOT, folder, "*.py")):
            name = os.path.splitext(os.path.basename(path))[0]
            prefix = "" if folder == "." else folder + "."
            found[(prefix + name).removesuffix(".__init__")] = path
    return found


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

    with open(path, encoding="utf-8") as f:
        walk(ast.parse(f.read()), False)
    return top, inner


def arrows():
    """{module: modules of ours that it imports}; experiments know each other by bare names."""
    modules, result = sources(), {}
    for name, path in modules.items():
        top, inner = imports(path)
        beside = "experiments." if name.startswith("experiments.") else ""
        ours = {n if n in modules else beside + n for n in top | inner}
        result[name] = {n for n in ours if n in modules}
    return result


def test_arrows_point_from_scripts_to_nanonexus_to_the_model():
    found = arrows()
    assert len(found) > 25 and "model" in found["nanonexus.checkpoint"]  # the walk sees something
    for name, targets in found.items():
        for target in targets:
            if name == "model" or name.startswith("nanonexus"):
                assert target == "model" or target.startswith("nanonexus"), (name, target)
            assert name != "model", target


def test_no_circle():
    found, done = arrows(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in found[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in found:
        visit(name, [])
    assert done == found.keys()


def test_model_needs_torch_alone():
    top, inner = imports(os.path.join(ROOT, "model.py"))
    assert {name.split(".")[0] for name in top | inner} <= {"torch", *sys.stdlib_module_names}


def test_only_optional_packages_are_imported_inside_functions():
    for name, path in sources().items():
        inner = {n.split(".")[0] for n in imports(path)[1]}
        assert inner - {"torch"} <= LAZY | {"fcntl", "pydoc_data"}, (name, inner)


def test_training_needs_torch_and_numpy_alone():
    wanted, seen = ["train"], set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            wanted += arrows()[name]
    packages = {n.split(".")[0] for name in seen for n in imports(sources()[name])[0]}
    assert packages - set(sys.stdlib_module_names) <= {"torch", "numpy", "model", "nanonexus"}


def test_nothing_runs_text_as_code():
    """No eval, exec or compile of text, no pickle, no trust_remote_code."""
    for path in sources().values():
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "shell"), path
                assert node.arg != "weights_only" or node.value.value is True, path
        top, inner = imports(path)
        assert not {"pickle", "marshal", "shelve", "dill"} & (top | inner), path


def test_text_is_utf8_on_every_system():
    """Without an encoding, open() reads and writes text as the system's locale says."""
    found = 0
    for path in sources().values():
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "open":
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "r"
                found += 1
                assert "b" in mode or any(k.arg == "encoding" for k in node.keywords) or \
                    "devnull" in ast.unparse(node), (path, node.lineno)
    assert found > 20


def test_no_two_modules_have_one_name_and_no_file_is_long():
    modules = sources()
    assert len(set(modules)) == len(modules)
    paths = list(modules.values()) + glob.glob(os.path.join(ROOT, "tests", "*.py"))
    for path in paths:
        with open(path, encoding="utf-8") as f:
            lines = len(f.readlines())
        assert lines <= (350 if modules.get("model") == path else 400), path


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
