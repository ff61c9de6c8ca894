"""A run at work, as its events tell: how far it is, what its clients do, and a picture of that."""
