"""How large the inputs of linears are on random tokens: what a server knows of statistics that it cannot see the text of.

Legend: I in features.
"""

from functools import partial

import torch

from fedspallm_appfl.models.blockwise import embed
from fedspallm_appfl.models.inputs import SharedInputs, collected
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import InputNorms

WINDOWS, LENGTH = 4, 64


@torch.no_grad()
def typical_squares(model: LazyModel) -> dict[tuple[int, str], float]:
    """(block, linear) -> mean square of its inputs in the dense model; nothing of experts that no token reached."""
    tokens = torch.randint(model.vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    state = embed(model, tokens, WINDOWS)
    found: dict[tuple[int, str], float] = {}
    for index in range(len(model.blocks)):
        linears = model.layout.blocks[index]
        new = partial(SharedInputs, linears, InputNorms)
        with model.block(index) as block:
            inputs = collected(block, index, state, new, state.take_output, stop=False)
            experts = inputs.of_experts(block) if any(linear.part for linear in linears) else ()
            for names, norms in [*inputs.groups(), *experts]:
                square = float(norms.squares.mean()) / max(1, norms.tokens)
                found |= {(index, name): square for name in names if norms.tokens}
    return found
