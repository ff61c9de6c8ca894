"""Tiny models and texts that the tests make themselves; nothing is downloaded."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what is made before a test, and for processes that a test starts

import pytest
import torch

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.settings import plugins
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
def nothing_stays_registered():
    """What a test's plugin adds is gone after it, so that the next one knows the built-in algorithms and pruners only."""
    yield
    if plugins.ADDED:
        algorithms.REGISTRY.remove_added()
        pruners.REGISTRY.remove_added()
        plugins.ADDED.clear()
        for file in [name for name in sys.modules if name.endswith(".py")]:
            del sys.modules[file]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors run fastest on one thread, and a number of threads belongs to a bit-identical result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
