"""Zeros of a model that stay zero while it is trained in another framework.

An optimizer fills zeros: a gradient, momentum or a decayed sum moves every entry, and merging LoRA adds a dense matrix. So
gradients are zeroed where a weight was zero, as soon as they are made, and the weights themselves after each step. The
latter is what counts; the former keeps norms of gradients right.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.layout import find_layout
from fedspallm_appfl.tensors import bitmask


@dataclass(eq=False)
class ParameterZeros:
    """Which entries of one parameter were zero.

    Attributes:
        name: of the parameter in the model.
        owner: the module that holds it; adapters may be put around that module, and the parameter may be replaced.
        shape: of the parameter.
        bits: (ceil(n / 8),) uint8, 1 = zero, on the device of the parameter.
    """

    name: str
    owner: "weakref.ref[nn.Module]"
    shape: torch.Size
    bits: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now.

        Raises:
            ModelError: the module is gone, or holds no such parameter of that shape any more.
        """
        owner, last = self.owner(), self.name.rpartition(".")[2]
        found = None if owner is None else owner._parameters.get(last)
        if found is None or found.shape != self.shape:
            now = "" if found is None else f" of that shape, but {list(found.shape)},"
            raise ModelError(
                f"{self.name} {list(self.shape)} is no parameter{now} any more, so that its zeros cannot be kept; FSDP, "
                "DeepSpeed and quantization replace parameters: train without them, or release() these zeros"
            )
        return found

    def mask(self, device: torch.device) -> Tensor:
        """True where it was zero; bool of its shape on that device."""
        self.bits = self.bits.to(device)
        return bitmask.from_bits(self.bits, tuple(self.shape))

    @torch.no_grad()
    def apply(self) -> None:
        """Zero them again."""
        parameter = self.parameter
        parameter.masked_fill_(self.mask(parameter.device), 0)

    @torch.no_grad()
    def mask_gradient(self, parameter: Tensor) -> None:
        """Zero the gradient where the weight was zero."""
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self.mask(parameter.grad.device), 0)


@dataclass(frozen=True)
class ZeroCount:
    """What became of the zeros of a model.

    Attributes:
        entries: of all prunable matrices.
        remembered: entries that were zero when `keep_sparsity` was called.
        lost: of these, how many are not zero now.
        zeros: entries that are zero now.
    """

    entries: int
    remembered: int
    lost: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is zero now."""
        return self.zeros / self.entries


class KeptZeros:
    """The zeros of a model's prunable matrices, kept until `release`, the end of a `with`, or the end of the model."""

    def __init__(self, model: nn.Module, blocks: str | None = None) -> None:
        """As `keep_sparsity`."""
        self._model = weakref.ref(model)
        self._parameters = list(_prunable(model, blocks))
        self._zeros = [one for one in self._parameters if bitmask.count(one.bits)]
        if not self._zeros:
            raise ModelError(
                f"{type(model).__name__}: none of its {len(self._parameters)} prunable weights holds a zero, so that there "
                "is nothing to keep; load the pruned model, and call keep_sparsity before it is trained"
            )
        self._handles: list[RemovableHandle] = [register_optimizer_step_post_hook(self._after_step)]
        for one in self._zeros:
            if one.parameter.requires_grad:
                self._handles.append(one.parameter.register_post_accumulate_grad_hook(one.mask_gradient))
        weakref.finalize(model, self.release)

    def apply(self) -> None:
        """Zero again what was zero: after a merge of LoRA, or an optimizer that is not one of torch.

        Raises:
            ModelError: a matrix is not in the model any more.
        """
        self.require_inside(self._model())
        for one in self._zeros:
            one.apply()

    def count(self) -> ZeroCount:
        """Count zeros, those that were remembered and all.

        Raises:
            ModelError: a matrix is not in the model any more.
        """
        self.require_inside(self._model())
        lost = sum(int(one.parameter[one.mask(one.parameter.device)].count_nonzero()) for one in self._zeros)
        entries = sum(one.parameter.numel() for one in self._parameters)
        zeros = entries - sum(int(one.parameter.count_nonzero()) for one in self._parameters)
        return ZeroCount(entries, sum(bitmask.count(one.bits) for one in self._zeros), lost, zeros)

    def callback(self) -> TrainerCallback:
        """For `transformers.Trainer`: refuses another model, and zeroes after each step, whatever the optimizer is."""
        return _EachStep(self)

    def release(self) -> None:
        """Let training fill the zeros from now on."""
        for handle in self._handles:
            handle.remove()

    def require_inside(self, model: nn.Module | None) -> None:
        """Refuse a model that does not hold these matrices.

        Raises:
            ModelError: names the first one that is missing.
        """
        inside = set() if model is None else {id(module) for module in model.modules()}
        for one in self._zeros:
            if id(one.owner()) not in inside:
                raise ModelError(
                    f"the module of {one.name} is not in this model, so that its zeros cannot be kept; call keep_sparsity "
                    "on the loaded model itself, after it is converted and before adapters are added"
                )

    def __enter__(self) -> "KeptZeros":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Zero what an optimizer has moved; those of other models are none of its business."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for one in self._zeros:
            if id(one.parameter) in stepped:
                one.apply()


class _EachStep(TrainerCallback):
    def __init__(self, zeros: KeptZeros) -> None:
        self._zeros = zeros

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self._zeros.require_inside(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._zeros.apply()


def keep_sparsity(model: nn.Module, blocks: str | None = None) -> KeptZeros:
    """Remember which prunable weights of a model are zero, and keep them zero through any optimizer of torch.

    Zeros are kept from now on, also if the result is not used. A bit for each weight is stored, on the device of the
    weight. Call `apply` after adapters (LoRA) are merged.

    Args:
        model: a causal LM with its weights, any float dtype; without adapters.
        blocks: dotted name of the list of decoder blocks; None to search for it.

    Returns:
        What counts, makes a `TrainerCallback`, and zeroes again.

    Raises:
        ModelError: there are no zeros, adapters are there already, or weights are quantized, on the meta device, or not
            stored as parameters.
    """
    return KeptZeros(model, blocks)


def _prunable(model: nn.Module, blocks: str | None) -> Iterator[ParameterZeros]:
    """The parameters that hold prunable matrices.

    Raises:
        ModelError: one of them cannot be read, or is of an adapter.
    """
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{type(model).__name__} has adapters already, whose own zeros are none of pruning; call keep_sparsity on the "
            "loaded model before adapters are added"
        )
    layout = find_layout(model, blocks)
    names = dict.fromkeys(
        f"{layout.path}.{block}.{linear.parameter}" for block, linears in enumerate(layout.blocks) for linear in linears
    )
    for name in names:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = owner._parameters.get(last)
        if parameter is None or not parameter.is_floating_point() or parameter.device.type == "meta":
            found = "no parameter" if parameter is None else f"{parameter.dtype} on {parameter.device}"
            raise ModelError(
                f"{name}: zeros are kept in parameters of floats that are in memory, got {found}; load the model in "
                "bfloat16, float16 or float32, not quantized"
            )
        zero = parameter.detach() == 0
        if bool(zero.all()):
            raise ModelError(
                f"{name} is zero as a whole, as matrices of adapters are before they are trained; call keep_sparsity on "
                "the loaded model before adapters are added"
            )
        yield ParameterZeros(name, weakref.ref(owner), parameter.shape, bitmask.to_bits(zero))
