"""Gram: clients send sums of x x^T of their inputs, the server adds them up and prunes each matrix once.

What a pruner does with a sum is in `pruning.from_sums`. With inputs of the dense model one exchange is enough, and the sums
serve every target and pruner. In a sweep an exchange is about one input of one block, and with the dense output as target
the clients also send the drift from the dense model's inputs. Ours.
"""

from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange

ALGORITHM = Algorithm("gram", [Exchange("grams")], label="Gram")
