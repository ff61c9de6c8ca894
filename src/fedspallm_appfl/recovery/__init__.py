"""Training after pruning: masks stay, clients fit kept weights to their text, and the server goes along the mean."""
