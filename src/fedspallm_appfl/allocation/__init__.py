"""How much of each matrix is pruned, at the same total, as a public text at the server shows."""
