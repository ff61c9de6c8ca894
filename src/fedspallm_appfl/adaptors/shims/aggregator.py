from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator  # noqa: D100, F401
