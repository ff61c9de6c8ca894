from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer  # noqa: D100, F401
