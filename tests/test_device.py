"""Devices: what a system lacks is left out."""

import ctypes

import pytest
import torch

from nanonexus.device import pick_device


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_cpu_needs_no_glibc(monkeypatch, error):
    """ctypes.CDLL(None) is a TypeError on Windows; macOS and musl have no mallopt."""
    def library(name):
        assert name is None
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert pick_device("cpu") == torch.device("cpu")
