"""How far the server goes along the mean of what clients have learnt.

Changes of clients with different text agree in part. Their mean is shorter than they are, and the model lags behind what
each client has found. So the mean is made as long as a client's change is, as root mean square over clients:

    step = sqrt( (sum_i w_i |D_i|^2 / sum_i w_i) / |D|^2 ),    D = sum_i w_i D_i / sum_i w_i.

It is 1 where all agree, and the square root of the number of clients where no two have anything in common, which is the
most it may be. Ours; FedExP (Jhunjhunwala et al., ICLR 2023) takes half of the square, and 1 where that is less.
"""

import math
from collections.abc import Sequence

UNIT = 64  # steps are multiples of its inverse, so that the rounding of the sums does not show


def step_length(squares: Sequence[float], weights: Sequence[int], mean: float) -> float:
    """The step for one matrix.

    Args:
        squares: `|D_i|^2` of each client, in any order.
        weights: w_i, positive.
        mean: `|D|^2`.

    Returns:
        A number from 1 to the square root of the number of clients.
    """
    if not mean > 0:
        return 1.0
    theirs = math.fsum(weight * square for weight, square in zip(weights, squares, strict=True)) / sum(weights)
    asked = round(UNIT * math.sqrt(theirs / mean)) / UNIT
    return min(max(asked, 1.0), math.sqrt(len(squares)))
