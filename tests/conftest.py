import os
import signal

import figures
import pytest
import torch
from questions import checkpoints, neox  # noqa: F401

torch.set_num_threads(1)  # the models here are tiny: more threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the scripts that tests run, too
if hasattr(signal, "SIGHUP"):  # nohup has them ignored, and tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def plots(monkeypatch):
    """Skips a test of what needs the extra plots; each panel with lines must say what it shows."""
    for name in ("matplotlib", "scipy"):
        pytest.importorskip(name, reason=f"extra plots: {name}")

    def titled(figure, path, write=figures.write):
        for panel in figure.axes:
            if panel.axison and panel.lines:
                assert panel.get_title() and (panel.get_xlabel() or figure._supxlabel), path
        write(figure, path)

    monkeypatch.setattr(figures, "write", titled)


@pytest.fixture(autouse=True)
def as_before():
    """--deterministic is a mode of the whole process."""
    yield
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
