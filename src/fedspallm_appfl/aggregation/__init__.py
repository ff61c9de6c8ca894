"""Aggregation of the clients' matrices, mask expansion and layer sampling: the paper's three ideas."""
