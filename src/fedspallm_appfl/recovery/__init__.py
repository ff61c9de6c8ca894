"""A few steps of training after pruning: masks stay, clients fit the kept weights to their text, changes are averaged."""
