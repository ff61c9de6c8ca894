"""Read and run a causal LM block by block."""

from fedspallm_appfl.settings.imports import guard_torchvision

guard_torchvision()  # before anything here imports transformers
