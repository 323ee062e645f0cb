"""What the scripts share. Imports go one way: scripts -> nanonexus -> model.py."""

import importlib.util
import os
import sys

try:
    from model import ModelError  # noqa: F401
except Exception as error:  # another model.py comes first: in the current folder, for example
    ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = importlib.util.find_spec("model")
    if found and found.origin == os.path.join(ROOT, "model.py"):
        raise
    message = (f"`import model` finds {found.origin if found else 'nothing'}, not nanoNexus's "
               f"model.py: run this in {ROOT}, or rename the other one")
    if sys.argv[0] != "-m":
        raise ImportError(message) from error
    print(f"error: {message}", file=sys.stderr)  # python -m nanonexus.view, for example
    sys.exit(2)
