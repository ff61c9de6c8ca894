"""What travels in a round, and what the server makes of it (docs/algorithms.md)."""
