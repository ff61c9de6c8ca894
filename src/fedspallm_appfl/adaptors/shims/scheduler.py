from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler  # noqa: D100, F401
