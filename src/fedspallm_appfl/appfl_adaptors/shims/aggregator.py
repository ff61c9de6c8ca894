from fedspallm_appfl.appfl_adaptors.aggregator import FedSpaLLMAggregator  # noqa: D100, F401
