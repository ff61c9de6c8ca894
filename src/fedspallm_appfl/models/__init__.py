"""A causal LM that is read and run block by block."""
