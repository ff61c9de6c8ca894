"""Many clients' matrices into one, and which layers they prune: the paper's three ideas."""
