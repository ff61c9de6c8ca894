"""Tiny models and texts that the tests make themselves; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors run fastest on one thread, and a number of threads belongs to a bit-identical result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
