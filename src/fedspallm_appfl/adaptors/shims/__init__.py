"""Files for the keys trainer_path, aggregator_path and scheduler_path of APPFL's own scripts."""
