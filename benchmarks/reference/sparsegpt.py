"""SparseGPT as its authors' code does it: a Hessian for every linear, a dense inverse, one column after another.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023. What takes
time is as it is there: the running mean rescales the Hessian with every window; three factorizations lead to the factor of
the inverse; weights lie row by row, so that a column is not contiguous; the threshold of a block comes from a full sort,
and `<=` prunes one entry more than asked; losses are summed although only their sum is ever looked at.

Legend: O out features, I in features, T tokens.
"""

import torch
from torch import Tensor

COLUMN_BLOCK = 128


class SparseGPT:
    """One linear on its way to being pruned.

    Attributes:
        weight: (O, I), pruned in place.
        hessian: (I, I) float32, the running mean of `2 x x^T`.
        windows: calibration windows so far.
        loss: what pruning cost, known after `prune`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.hessian = torch.zeros(weight.shape[1], weight.shape[1])
        self.windows = 0
        self.loss = 0.0

    def add(self, inputs: Tensor) -> None:
        """Fold the inputs of some windows, (windows, T, I)."""
        count = len(inputs)
        columns = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.windows / (self.windows + count)
        self.windows += count
        scaled = (2 / self.windows) ** 0.5 * columns.float()
        self.hessian += scaled.matmul(scaled.t())

    def prune(self, share: float = 0.0, pattern: tuple[int, int] | None = None, damping: float = 0.01) -> None:
        """Prune to a share of zeros, or to `(zeros, group)` in every group of a row; uses the Hessian up."""
        work = self.weight.float().clone()
        dead = self.hessian.diagonal() == 0
        work[:, dead] = 0
        upper = self._factor(dead, damping)
        losses = torch.zeros(len(work))
        for start in range(0, work.shape[1], COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, work.shape[1])
            block, inside = work[:, start:end].clone(), upper[start:end, start:end]
            pruned = _below_threshold(block, inside, share) if pattern is None else torch.zeros_like(block).bool()
            result, errors, block_losses = _columns(block, inside, pruned, pattern)
            work[:, start:end] = result
            losses += block_losses.sum(1) / 2
            work[:, end:] -= errors.matmul(upper[start:end, end:])
        self.loss = float(losses.sum())
        self.weight.copy_(work)

    def _factor(self, dead: Tensor, damping: float) -> Tensor:
        """(I, I), upper Cholesky factor of the inverse of the damped Hessian."""
        hessian = self.hessian
        del self.hessian
        diagonal = hessian.diagonal()
        diagonal[dead] = 1
        diagonal += damping * diagonal.mean()
        hessian = torch.linalg.cholesky(hessian)
        hessian = torch.cholesky_inverse(hessian)
        return torch.linalg.cholesky(hessian, upper=True)


def _below_threshold(block: Tensor, upper: Tensor, share: float) -> Tensor:
    """(O, columns) bool, entries to prune."""
    scores = block**2 / upper.diagonal().reshape(1, -1) ** 2
    threshold = scores.flatten().sort().values[int(scores.numel() * share)]
    return scores <= threshold


def _columns(
    block: Tensor, upper: Tensor, pruned: Tensor, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a block column by column; returns pruned weights, errors and losses, all (O, columns)."""
    result, errors, losses = torch.zeros_like(block), torch.zeros_like(block), torch.zeros_like(block)
    for j in range(block.shape[1]):
        if pattern is not None and j % pattern[1] == 0:
            zeros, group = pattern
            scores = block[:, j : j + group] ** 2 / upper.diagonal()[j : j + group].reshape(1, -1) ** 2
            pruned.scatter_(1, j + scores.topk(zeros, dim=1, largest=False).indices, True)
        column, pivot = block[:, j], upper[j, j]
        kept = column.clone()
        kept[pruned[:, j]] = 0
        result[:, j] = kept
        losses[:, j] = (column - kept) ** 2 / pivot**2
        error = (column - kept) / pivot
        block[:, j:] -= error.unsqueeze(1).matmul(upper[j, j:].unsqueeze(0))
        errors[:, j] = error
    return result, errors, losses
