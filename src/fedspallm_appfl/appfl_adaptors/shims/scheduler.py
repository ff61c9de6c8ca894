from fedspallm_appfl.appfl_adaptors.scheduler import FedSpaLLMScheduler  # noqa: D100, F401
