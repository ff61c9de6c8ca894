"""A few steps of training after pruning: masks stay, clients fit kept weights to their text, the server takes the mean."""
