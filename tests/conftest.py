"""Tiny models and texts that the tests make themselves; nothing is downloaded."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors run fastest on one thread, and a number of threads belongs to a bit-identical result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
