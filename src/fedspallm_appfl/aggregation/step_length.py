"""How far the server goes along the mean of what clients have learnt.

Changes of clients with different text agree in part. Their mean is shorter than they are, and the model lags behind what
each client has found. So the mean D of the changes D_i is made as long as a client's change is:

    step = median_i |D_i| / |D|.

It is 1 where all agree, and the square root of the number of clients where no two have anything in common, which is the
most it may be. The median, so that one client with large changes makes no step longer. Ours; FedExP (Jhunjhunwala et al.,
ICLR 2023) takes half the square of such a ratio, and 1 where that is less.
"""

import math
import statistics
from collections.abc import Sequence

UNIT = 64  # steps are multiples of its inverse, so that the rounding of the sums does not show


def step_length(squares: Sequence[float], mean: float) -> float:
    """The step for one matrix.

    Args:
        squares: `|D_i|^2` of each client, in any order.
        mean: `|D|^2`.

    Returns:
        A number from 1 to the square root of the number of clients.
    """
    if not mean > 0:
        return 1.0
    asked = round(UNIT * statistics.median(map(math.sqrt, squares)) / math.sqrt(mean)) / UNIT
    return min(max(asked, 1.0), math.sqrt(len(squares)))
