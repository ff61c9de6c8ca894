"""FedSpaLLM: prune a large language model where the data lives."""

__version__ = "0.1.0"
