"""Verbs that read the directories of finished runs."""
