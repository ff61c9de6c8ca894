"""A causal LM that holds only the parts in use in memory: the outer parts always, decoder blocks one at a time.

The model is built without weights (parameters on the meta device, real buffers). Then embeddings, final norm and head are
read from the checkpoint. `block(i)` reads the weights of one block, replaces them by pruned matrices if there
are any, and drops them afterwards. A block can thus be pruned in place without a copy of the dense one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from fedspallm_appfl.errors import ModelError, shortened
from fedspallm_appfl.models.choice import choose
from fedspallm_appfl.models.experts import is_fused
from fedspallm_appfl.models.layout import Layout, Linear, find_layout
from fedspallm_appfl.models.probe import Probed, probe
from fedspallm_appfl.models.storage.checkpoint import DTYPES, CheckpointFiles, allow_code_of, config_hash, resolve_model
from fedspallm_appfl.models.storage.stored import Piece, Place, Stored, place, read
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.settings.schema import Model, Prune
from fedspallm_appfl.wire.packed import Packed

REPLACED = "_fedspallm_replaced_attention"  # attribute of a configuration

WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")  # of torch.compile, DataParallel and FSDP


class Chosen(Protocol):
    """Settings that say which model it is and what of it is pruned."""

    @property
    def model(self) -> Model:
        """The dense model."""

    @property
    def prune(self) -> Prune:
        """Which matrices are pruned."""


class Skeleton:
    """A causal LM without weights, for its layout.

    Attributes:
        folder: the model folder.
        model: the model, parameters on the meta device.
        found: its blocks and their prunable linears.
        layout: the same with the linears that are pruned.
        files: the checkpoint.
        stored_dtype: dtype of the prunable weights in the checkpoint.
        dtype: dtype of arithmetic.
    """

    def __init__(self, path: str, blocks: str | None = None, dtype: str = "auto", prune: Prune | None = None) -> None:
        """Build the skeleton of a model.

        Args:
            path: folder or hub name.
            blocks: dotted name of the list of decoder blocks; None to search for it.
            dtype: `auto` (as stored) or a name in `DTYPES`, for the parts that are built in a dtype.
            prune: which linears are pruned; None for all.

        Raises:
            ModelError: the folder is not a model, its architecture is unknown, or its blocks cannot be found.
            ConfigError: a pattern of `prune` means no linear.
        """
        self.folder = resolve_model(path)
        self.files = CheckpointFiles(self.folder)
        self.model = without_weights(self.folder, dtype)
        self.found = known_layout(self.folder, find_layout(self.model, blocks))
        self.layout = choose(self.found, prune or Prune(), self.model)
        self._stored = Stored(self.model, self.files)
        self._pieces = self._match()
        self.stored_dtype = self._one_dtype()
        self.dtype = self.stored_dtype if dtype == "auto" else DTYPES[dtype]

    @classmethod
    def of(cls, settings: Chosen) -> "Skeleton":
        """The skeleton of the model of an experiment, or of what one of its sides is told."""
        model = settings.model
        allow_code_of(model)
        return cls(model.path, model.blocks, model.dtype, settings.prune)

    def _one_dtype(self) -> torch.dtype:
        """The dtype of all prunable weights in the checkpoint.

        Raises:
            ModelError: they do not share one supported floating-point dtype, e.g. because they are quantized.
        """
        names = [self.place(block, one).key for block, linears in enumerate(self.layout.blocks) for one in linears]
        first = {self.files.shape_and_dtype(name)[1]: name for name in reversed(names)}
        if len(first) > 1 or next(iter(first)) not in DTYPES.values():
            found = ", ".join(f"{dtype} ({name})" for dtype, name in first.items())
            raise ModelError(
                f"{self.folder}: the weights to prune must have one dtype, {', '.join(DTYPES)}, got {found}; a quantized "
                "model cannot be pruned, and mixed dtypes must be converted to one dtype first"
            )
        return next(iter(first))

    def place(self, block: int, linear: Linear) -> Place:
        """Where a linear's weight lies in the checkpoint."""
        return place(linear, self._pieces[self.layout.parameter(block, linear)])

    @property
    def block_weights(self) -> int:
        """All weights in the decoder blocks, prunable or not."""
        return sum(parameter.numel() for parameter in self.model.get_submodule(self.layout.path).parameters())

    @property
    def vocabulary(self) -> int:
        """Number of token ids with an embedding."""
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[return-value]

    @property
    def longest_window(self) -> int | None:
        """Tokens that the model takes at most; None if it has no limit."""
        return longest_window(self.model)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """A parameter of the model, in memory of its own; `dtype` None is that of the checkpoint."""
        return read(self._pieces[name], self.files, self.model.get_parameter(name).shape, device, dtype)

    def find_key(self, name: str) -> str | None:
        """Name in the checkpoint of a parameter or buffer that it holds as it is."""
        return self._stored.key(name)

    def _match(self) -> dict[str, tuple[Piece, ...]]:
        """Parameter name -> what fills it."""
        matched, missing, tied = {}, [], set(_tied_names(self.model))
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if pieces := self._stored.pieces(name, tuple(parameter.shape)):
                matched[name] = pieces
            elif name not in tied:
                missing.append(name)
        if missing:
            raise ModelError(_what_is_missing(self.folder, self.model, missing, self.files.keys()))
        return matched

    def not_finite(self, through: int) -> str | None:
        """Name in the checkpoint of the first weight, up to a block, that holds NaN or infinity; None if none does."""
        blocks = f"{self.layout.path}."
        for name, pieces in self._pieces.items():
            block = int(name.removeprefix(blocks).split(".")[0]) if name.startswith(blocks) else 0
            for piece in pieces if block <= through else ():
                weight = self.files.read(piece.key)
                if weight.is_floating_point() and not bool(weight.isfinite().all()):
                    return piece.key
        return None

    def dense_matrix(self, block: int, name: str) -> Tensor:
        """The dense weight of the linear of that name."""
        return self.dense_weight(block, self.layout.linear(block, name))

    def dense_weight(self, block: int, linear: Linear) -> Tensor:
        """The dense weight of a linear as (O, I), in the dtype of the checkpoint."""
        where = self.place(block, linear)
        return where.view(self.files.read(where.key))


class LazyModel:
    """A causal LM that runs block by block.

    Attributes:
        skeleton: layout and checkpoint.
        model: the model; its outer parts have weights, its blocks do not.
        dtype: dtype of arithmetic and activations.
        device: where it runs.
        devices: this one, and further ones to which batches of a block are dealt.
    """

    def __init__(
        self,
        path: str,
        blocks: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        prune: Prune | None = None,
        further: Sequence[str] = (),
    ) -> None:
        """Build the model and read its outer parts.

        Args:
            path: folder or hub name.
            blocks: dotted name of the list of decoder blocks; None to search for it.
            dtype: `auto` (as stored) or a name in `DTYPES`.
            device: where it runs.
            prune: which linears are pruned; None for all.
            further: devices to which batches of a block are dealt besides.

        Raises:
            ModelError: as `Skeleton` does.
        """
        self.skeleton = Skeleton(path, blocks, dtype, prune)
        self.model = self.skeleton.model
        self.layout: Layout = self.skeleton.layout
        self.dtype = self.skeleton.dtype
        self.device, *_ = self.devices = tuple(map(torch.device, (device, *further)))
        self.model.eval()
        self._fill(self.model, lambda name: not name.startswith(f"{self.layout.path}."), prefix="")
        self.model.tie_weights()
        self._fill_buffers()

    @classmethod
    def of(cls, settings: Chosen, device: str) -> "LazyModel":
        """The model of an experiment, or of what one of its sides is told."""
        model = settings.model
        return cls(model.path, model.blocks, model.dtype, device, settings.prune)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return self.skeleton.vocabulary

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks; outside `block` their parameters are on the meta device."""
        return self.model.get_submodule(self.layout.path)  # type: ignore[return-value]

    @contextmanager
    def block(self, index: int, pruned: Mapping[str, Packed] | None = None) -> Iterator[nn.Module]:
        """One block with its weights, dense except the matrices in `pruned`; they are dropped afterwards."""
        block = self.blocks[index]
        empty = dict(block.named_parameters())
        try:
            self._fill(block, lambda name: True, prefix=f"{self.layout.path}.{index}.")
            for linear in self.layout.blocks[index]:
                if pruned and linear.name in pruned:
                    self._put_packed(block, linear, pruned[linear.name])
            self.skeleton.files.release()
            yield block
        finally:
            for name, parameter in empty.items():
                owner, _, leaf = name.rpartition(".")
                block.get_submodule(owner)._parameters[leaf] = parameter

    def put(self, block: nn.Module, linear: Linear, weight: Tensor) -> Tensor:
        """Set a linear's weight, given as (O, I), after rounding it to the checkpoint's dtype.

        Returns:
            The rounded weight; if possible the block shares its memory, so it is not stored twice.
        """
        rounded = weight.to(self.skeleton.stored_dtype)
        parameter = block.get_parameter(linear.parameter)
        if parameter.dtype == rounded.dtype and not linear.transposed and linear.part is None:
            parameter.data = rounded.contiguous()
        else:
            linear.view(parameter.data).copy_(rounded)
        return rounded

    def _put_packed(self, block: nn.Module, linear: Linear, packed: Packed) -> None:
        weight = linear.view(block.get_parameter(linear.parameter).data)
        assert packed.values is not None, "a block runs with weights"
        if weight.dtype == packed.values.dtype and weight.is_contiguous():
            packed.unpack_weight(self.device, out=weight)
        else:
            self.put(block, linear, packed.unpack_weight(self.device))

    def _fill(self, module: nn.Module, wanted: Callable[[str], bool], prefix: str) -> None:
        """Read the given parameters and persistent buffers of a module from the checkpoint."""
        for name, old in list(module.named_parameters()):
            if wanted(name):
                new = self.skeleton.read(prefix + name, self.device, self.dtype if old.is_floating_point() else None)
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = nn.Parameter(new, requires_grad=False)

    def _fill_buffers(self) -> None:
        """Move buffers to the device; those in the checkpoint get its values."""
        for name, buffer in list(self.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            key = self.skeleton.find_key(name)
            stored = buffer if key is None else self.skeleton.files.read(key).to(buffer.dtype)
            self.model.get_submodule(owner)._buffers[leaf] = stored.to(self.device, copy=True)


class HollowModel:
    """A causal LM whose weights are all zero and take no memory: enough to see which tensors go where.

    Attributes:
        model: the model; its parameters are views of single zeros.
        layout: its blocks and their prunable linears.
        device: the CPU.
        devices: the CPU alone.
    """

    def __init__(self, folder: Path, layout: Layout, dtype: str = "float32") -> None:
        """Build the model.

        Args:
            folder: the model folder; it need not hold weights.
            layout: as `find_layout` finds it.
            dtype: of its arithmetic, a name in `DTYPES`.

        Raises:
            ModelError: `config.json` is not one of a model that this transformers knows.
        """
        self.model, self.layout, self.device = without_weights(folder, dtype), layout, torch.device("cpu")
        self.devices = (self.device,)
        self.model.eval()
        if any(map(is_fused, self.model.modules())):
            self.model.set_experts_implementation("eager")  # others refuse weights without memory
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(zeros, requires_grad=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.model.get_submodule(self.layout.path)  # type: ignore[return-value]

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[return-value]


def known_layout(folder: Path, found: Layout) -> Layout:
    """A layout with the linears whose inputs can be known, and with what blocks return.

    Args:
        folder: the model folder; it needs no weights.
        found: as `find_layout` finds it.

    Raises:
        ModelError: the model cannot be run block by block.
    """
    return _probed(folder, found, config_hash(folder)).known(found)


@lru_cache(maxsize=8)
def _probed(folder: Path, found: Layout, config: str) -> Probed:
    hollow = HollowModel(folder, found)
    return probe(hollow, hollow.vocabulary)


def without_weights(folder: Path, dtype: str) -> PreTrainedModel:
    """A causal LM built from `config.json`, with parameters on the meta device.

    Args:
        folder: the model folder; it needs no weights.
        dtype: `auto` (as `config.json` says) or a name in `DTYPES`.

    Raises:
        ModelError: the installed transformers does not support the model, it is quantized, or it needs code of its own that
            is not allowed to run.
    """
    trusted = custom_code.allowed(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        config.use_cache = False
        kind = config.dtype if dtype == "auto" else DTYPES[dtype]
        _replace_attention(config)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trusted)
    except Exception as error:  # config.json may hold anything, and every model class fails differently
        said = shortened(error, 1000)  # with its advice, which is long
        why = custom_code.refusal(folder) or f"{folder} cannot be built as a causal LM by this transformers: {said}"
        raise ModelError(why) from error
    _require_plain(folder, config)
    return model


def longest_window(model: PreTrainedModel) -> int | None:
    """Tokens that a model takes at most; None if it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def replaced_attention(model: PreTrainedModel) -> str | None:
    """The attention that `config.json` names where it cannot run here and sdpa runs in its place."""
    return getattr(model.config, REPLACED, None)


def _replace_attention(config: PretrainedConfig) -> None:
    """Take sdpa for flash attention where that is not installed or there is no GPU; both compute the same."""
    named = config._attn_implementation or ""
    if "flash" in named and not (torch.cuda.is_available() and is_flash_attn_2_available()):
        config._attn_implementation = "sdpa"
        setattr(config, REPLACED, named)


def _require_plain(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a model that its configuration calls quantized.

    Raises:
        ModelError: it does, whatever the weights are: the pruned folder could not be loaded.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return
    settings = quantized if isinstance(quantized, dict) else quantized.to_dict()
    raise ModelError(
        f"{folder}: config.json has a quantization_config ({settings.get('quant_method', 'unknown method')}), and a "
        "quantized model cannot be pruned; take the model from before quantization. If its weights are plain numbers "
        "already, remove quantization_config from config.json"
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create new parameters on the meta device, without allocation or initialization; buffers stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            # A mark of transformers; without it most time goes into random numbers for tensors without storage.
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[name] = empty

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _what_is_missing(folder: Path, model: PreTrainedModel, missing: list[str], keys: Iterable[str]) -> str:
    lacks = f"{folder} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}"
    if wrapper := _wrapper(missing, keys):
        return (
            f"{lacks}; names in the checkpoint carry the prefix `{wrapper}` of a wrapper such as torch.compile or "
            f"DataParallel, and without it all of them match: save the tensors again under key.replace({wrapper!r}, '')"
        )
    return (
        f"{lacks}; the checkpoint does not match config.json: fetch or save the model again. transformers would fill what "
        "is missing with random numbers"
    )


def _wrapper(missing: list[str], keys: Iterable[str]) -> str | None:
    """What to take out of the names in a checkpoint so that nothing is missing; None if that does not help."""
    stored = list(keys)
    first = max(missing, key=len)
    before = {key.removesuffix(first) for key in stored if key.endswith(f".{first}")}
    for wrapper in (*WRAPPERS, *sorted(before)):
        if set(missing) <= {key.replace(wrapper, "") for key in stored if wrapper in key}:
            return wrapper
    return None


def _tied_names(model: nn.Module) -> list[str]:
    """Parameters that are the same as an earlier registered one, e.g. a head tied to the embeddings."""
    names: dict[int, str] = {}
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names.setdefault(id(parameter), name) != name
    ]
