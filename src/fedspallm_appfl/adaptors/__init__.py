"""FedSpaLLM as APPFL trainer, aggregator and scheduler: the only files that import appfl.

Import `fedspallm_appfl.adaptors.registration` and call `register()` before building agents, and plain class names
work in YAML. Where only APPFL's own scripts run, name the one-line files in `shims/` in `trainer_path`,
`aggregator_path` and `scheduler_path`.
"""
