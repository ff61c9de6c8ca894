"""Verbs about any model folder."""
