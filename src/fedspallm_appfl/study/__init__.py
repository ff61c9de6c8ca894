"""Algorithms, targets and seeds compared on the same clients (docs/study.md)."""
