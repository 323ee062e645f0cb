import signal

import pytest
import torch

torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def signals():
    """train.main installs handlers; give Ctrl-C back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
