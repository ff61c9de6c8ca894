"""Compare algorithms, targets and seeds on the same clients (docs/study.md)."""
