"""How far the server goes along the mean of what clients have learnt.

Changes of clients with different text agree in part. Their mean D is shorter than the changes D_i are on average, and the
model lags behind what each client has found. So the mean is made as long as a client's change is, and never shorter:

    step = median_i |D_i| / |D|, at least 1 and at most the square root of the number of clients.

It is 1 where all changes are equal. The largest step is that of equally long changes no two of which have anything in
common. By the median, one
client with large changes does not set the length; it may still make D short, up to the largest step. Ours; FedExP
(Jhunjhunwala et al., ICLR 2023) takes half the square of such a ratio, and 1 where that is less.
"""

import math
import statistics
from collections.abc import Sequence

UNIT = 64  # steps are multiples of its inverse, so that what rounds the squares hardly ever shows


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
