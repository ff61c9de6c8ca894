"""How a model lies on disk: its files, where each weight is in them, and the pruned copy."""
