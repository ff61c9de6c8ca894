"""Find the decoder blocks and the prunable linears of any causal LM, by structure: the only architecture-aware file.

Decoder blocks are the only outermost `nn.ModuleList` whose members have one class and contain linears. Prunable are the
linears inside a block (`nn.Linear`, and GPT-2's `Conv1D`, whose weight is stored transposed), unless their weight is tied
to one outside the blocks. Embeddings, norms, head and biases are never pruned.

Legend: O out features, I in features, L decoder blocks.
"""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """One prunable linear of a block.

    Attributes:
        name: dotted name inside the block, e.g. `self_attn.q_proj`.
        shape: (O, I), independent of how the weight is stored.
        transposed: the weight is stored as (I, O).
    """

    name: str
    shape: tuple[int, int]
    transposed: bool

    @property
    def entries(self) -> int:
        """O * I."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a model are and what can be pruned in them.

    Attributes:
        path: dotted name of the list of blocks, e.g. `model.layers`.
        blocks: for each of the L blocks its prunable linears, in the order of definition; none where all stay dense.
        returns: for each block how many values it returns, 0 for hidden states alone; empty if that is not known.
    """

    path: str
    blocks: tuple[tuple[Linear, ...], ...]
    returns: tuple[int, ...] = ()

    def shapes(self, block: int) -> dict[str, tuple[int, int]]:
        """Shape (O, I) of every prunable linear of one block."""
        return {linear.name: linear.shape for linear in self.blocks[block]}

    def parameter(self, block: int, linear: str) -> str:
        """Full name of a linear's weight in the model."""
        return f"{self.path}.{block}.{linear}.weight"

    @property
    def pruned(self) -> dict[int, dict[str, tuple[int, int]]]:
        """Shape (O, I) of every linear, of each block that has some to prune."""
        return {block: self.shapes(block) for block, linears in enumerate(self.blocks) if linears}


def find_layout(model: nn.Module, path: str | None = None) -> Layout:
    """Find the decoder blocks of a model.

    Args:
        model: a causal LM; its parameters may be on the meta device.
        path: dotted name of the list of blocks, if the search does not find the right one.

    Returns:
        The layout.

    Raises:
        ModelError: no list of blocks, or more than one, or nothing in them to prune; names the config key to set.
    """
    found = path if path is not None else _search(model)
    blocks = _module_list(model, found)
    outside = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{found}.")
    }
    layout = Layout(found, tuple(tuple(_linears(block, outside)) for block in blocks))
    if not all(layout.blocks):
        bare = [index for index, linears in enumerate(layout.blocks) if not linears]
        raise ModelError(
            f"blocks {bare} of {type(model).__name__}.{found} hold no nn.Linear or Conv1D to prune (experts stored as one "
            "tensor are not supported); if these are not the decoder blocks, set `model.blocks` to the right list"
        )
    return layout


def _linears(block: nn.Module, outside: set[int]) -> list[Linear]:
    linears = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in outside:
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            linears.append(Linear(name, (columns, rows) if transposed else (rows, columns), transposed))
    return linears


def _search(model: nn.Module) -> str:
    candidates: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in candidates)
        if isinstance(module, nn.ModuleList) and not nested and _alike(module):
            candidates.append(name)
    if len(candidates) == 1:
        return candidates[0]
    what = f"found {len(candidates)}: {', '.join(candidates)}" if candidates else "found none"
    raise ModelError(
        f"looked in {type(model).__name__} for one outermost nn.ModuleList whose members have one class and contain "
        f"linears, {what}; set `model.blocks` to the dotted name of the decoder blocks, e.g. model.layers"
    )


def _alike(modules: nn.ModuleList) -> bool:
    kinds = {type(module) for module in modules}
    holds_linears = all(any(isinstance(m, nn.Linear | Conv1D) for m in module.modules()) for module in modules)
    return len(kinds) == 1 and holds_linears and not any(isinstance(module, nn.Linear | Conv1D) for module in modules)


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path not in lists or not len(lists[path]):
        raise ModelError(
            f"`model.blocks` is {path!r}, which is not a non-empty nn.ModuleList of {type(model).__name__}; "
            f"its lists are {', '.join(lists) or 'none'}"
        )
    return lists[path]
