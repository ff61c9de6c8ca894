"""Prune one matrix with statistics of its inputs (docs/method.md section 1)."""
