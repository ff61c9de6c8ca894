"""Find the decoder blocks and the prunable linears of any causal LM, by structure.

Decoder blocks are the only outermost `nn.ModuleList` whose members have one class and contain linears, or the only one in
the text model where there are towers for images or sound too; if no list has one class, several will do. Prunable are the
linears inside a block (`nn.Linear`, and GPT-2's `Conv1D`, whose weight is stored transposed), unless their weight is tied
to one outside the blocks, and the matrices of the experts of a mixture, which lie in tensors of three dimensions
(`experts`). Embeddings, norms, head, biases, and the routers and gates of mixtures are never pruned.

Legend: O out features, I in features, L decoder blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import ModelError, quoted
from fedspallm_appfl.models import experts
from fedspallm_appfl.models.experts import Part


@dataclass(frozen=True)
class Linear:
    """One prunable linear of a block.

    Attributes:
        name: dotted name inside the block, e.g. `self_attn.q_proj`, or `mlp.experts.3.up_proj`.
        shape: (O, I), independent of how the weight is stored.
        transposed: the weight is stored as (I, O).
        part: where it lies in the tensor of all experts; None for a module of its own.
        expert: whether only the tokens that a router sends there reach it.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    part: Part | None = None
    expert: bool = False

    @property
    def parameter(self) -> str:
        """Dotted name inside the block of the parameter that holds its weight."""
        return f"{self.name}.weight" if self.part is None else self.part.parameter

    def view(self, parameter: Tensor) -> Tensor:
        """Its weight, (O, I), as a view of its parameter."""
        if self.part is not None:
            return self.part.view(parameter, self.transposed)
        return parameter.T if self.transposed else parameter

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

    def linear(self, block: int, name: str) -> Linear:
        """The linear of a block that has this name."""
        return self._by_name[block][name]

    @cached_property
    def _by_name(self) -> tuple[dict[str, Linear], ...]:
        return tuple({linear.name: linear for linear in block} for block in self.blocks)

    def parameter(self, block: int, linear: Linear) -> str:
        """Full name of the parameter that holds a linear's weight."""
        return f"{self.path}.{block}.{linear.parameter}"

    @cached_property
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
            f"blocks {bare} of {type(model).__name__}.{found} hold no nn.Linear or Conv1D to prune; "
            "if these are not the decoder blocks, set `model.blocks` to the right list"
        )
    return layout


def _linears(block: nn.Module, outside: set[int]) -> Iterator[Linear]:
    gates = experts.gates(block)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in outside and name not in gates:
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            shape = (columns, rows) if transposed else (rows, columns)
            yield Linear(name, shape, transposed, expert=experts.is_inside(name))
        elif experts.is_fused(module):
            for part_name, part in experts.parts(name, module):
                yield Linear(part_name, part.shape, module.is_transposed, part, expert=True)


def _search(model: nn.Module) -> str:
    candidates = _outermost(model, _alike) or _outermost(model, _hold_linears)
    if len(candidates) > 1:
        candidates = _of_text_model(model, candidates) or candidates
    if len(candidates) == 1:
        return candidates[0]
    what = f"found {len(candidates)}: {', '.join(candidates)}" if candidates else "found none"
    raise ModelError(
        f"looked in {type(model).__name__} for one outermost nn.ModuleList whose members have one class and contain "
        f"linears, {what}; set `model.blocks` to the dotted name of the decoder blocks, e.g. model.layers"
    )


def _outermost(model: nn.Module, wanted: Callable[[nn.ModuleList], bool]) -> list[str]:
    """Dotted names of the lists of some kind that are inside no other one of it."""
    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not nested and wanted(module):
            found.append(name)
    return found


def _of_text_model(model: nn.Module, names: list[str]) -> list[str]:
    """Those inside the text model, where a model has other towers too: transformers says which module it is."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = {f"{path}." for path, module in model.named_modules() if module is decoder and path}
    return [name for name in names if name.startswith(tuple(inside))]


def _alike(modules: nn.ModuleList) -> bool:
    """Whether members have one class; in some hybrid models attention blocks have another one than the others."""
    return _hold_linears(modules) and len({type(module) for module in modules}) == 1


def _hold_linears(modules: nn.ModuleList) -> bool:
    """Whether every member contains linears, and none is one."""
    holds = all(any(isinstance(m, nn.Linear | Conv1D) for m in module.modules()) for module in modules)
    return bool(len(modules)) and holds and not any(isinstance(module, nn.Linear | Conv1D) for module in modules)


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path not in lists or not len(lists[path]):
        raise ModelError(
            f"`model.blocks` is {quoted(path)}, which is not a non-empty nn.ModuleList of {type(model).__name__}; "
            f"its lists are {', '.join(lists) or 'none'}"
        )
    return lists[path]
