"""Tiny models and texts that the tests make themselves; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what is made before a test, and for processes that a test starts

import pytest
import torch

from helpers import processes

LIMITS = {"globus": 900, "mpi": 600, "slow": 600}  # seconds, with fixtures; several times what it takes


def pytest_collection_modifyitems(items):
    """Give tests with a marker more time, unless they say themselves what they may take."""
    for item in items:
        limits = [seconds for marker, seconds in LIMITS.items() if item.get_closest_marker(marker)]
        if limits and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(max(limits)))


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    processes.end_all()


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors run fastest on one thread, and a number of threads belongs to a bit-identical result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
