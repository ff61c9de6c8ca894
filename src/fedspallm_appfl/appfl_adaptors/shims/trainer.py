from fedspallm_appfl.appfl_adaptors.trainer import FedSpaLLMTrainer  # noqa: D100, F401
