"""Verbs for what comes before a run."""
