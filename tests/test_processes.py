"""torchrun's environment is checked, and signals are a run's own only as long as it trains."""

import math
import os
import signal
import threading

import pytest

from nanonexus.cli import UserError
from nanonexus.processes import Stop, join_processes

posix = pytest.mark.skipif(os.name != "posix", reason="Windows cannot send itself these signals")


@pytest.mark.parametrize("given", [
    dict(WORLD_SIZE=""), dict(RANK="1"), dict(RANK="-1"), dict(LOCAL_RANK="-1"),
    dict(WORLD_SIZE="2"), dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x")])
def test_an_environment_that_is_not_torchruns_is_one_line(monkeypatch, given):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes("cpu")[:2] == (1, 0)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="with torchrun; for one, unset WORLD_SIZE") as caught:
        join_processes("cpu")
    assert "\n" not in str(caught.value)


def handlers():
    return [signal.getsignal(getattr(signal, name))
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def test_the_handlers_are_those_of_before_again_and_a_thread_has_none():
    before, stop, seen = handlers(), Stop(math.inf), []
    with pytest.raises(KeyError), stop:
        assert handlers() == [stop.on_signal] * len(before)
        raise KeyError
    assert handlers() == before and not stop.asked()
    assert Stop(-math.inf).asked()  # the deadline alone

    def work():
        with Stop(math.inf) as stop:
            seen.append((handlers(), stop.asked()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@posix
def test_only_a_second_interrupt_stops_at_once():
    """A terminal that is closed, or Slurm, may send the same signal to a process twice."""
    for first in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with Stop(math.inf) as stop:
            assert not stop.asked()
            os.kill(os.getpid(), first)
            assert stop.asked() and stop.signal == first
            if first != signal.SIGINT:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == first
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


@posix
def test_without_a_deadline_the_first_signal_ends_the_block_and_nohup_is_respected():
    for number, error in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(error) as caught, Stop():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # sent twice
        assert number == signal.SIGINT or caught.value.code == 128 + number
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed
    with Stop(math.inf) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
