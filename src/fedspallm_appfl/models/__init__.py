"""Read and run a causal LM block by block."""
