"""RIA as a pruner of your own: relative importance and activations.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024. Name
this file under `plugins` in a configuration, then `ria` is a pruner like any other (docs/python.md):

    fedspallm run configs/demo.yaml 'plugins=[examples/plugins/ria.py]' client_configs.train_configs.pruner=ria
"""

from torch import Tensor

import fedspallm_appfl as fs

EXPONENT = 0.5  # of the norms of the inputs


@fs.pruner("ria", needs=fs.InputNorms, keeps_weights=True)
def ria(weight: Tensor, target: fs.Target, inputs: fs.InputNorms) -> Tensor:
    """Keep the weights that are large within their row and their column, and that see large inputs.

    Args:
        weight: (O, I) float32.
        target: how many to prune.
        inputs: sums of squares of the input features.

    Returns:
        (O, I) bool, True = kept.
    """
    size = weight.abs()
    importance = size / size.sum(0).clamp(min=1e-12) + size / size.sum(1, keepdim=True).clamp(min=1e-12)
    scores = importance * inputs.diagonal().sqrt() ** EXPONENT
    return ~fs.select(scores, target, per_row=False)
