"""Experiment trackers: observers of the events of a run, which get their numbers under the names of metrics.jsonl."""
