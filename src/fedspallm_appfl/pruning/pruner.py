"""What a pruner is: the facts that others ask of it, and how it is made ready for the linears that share an input.

A pruner says what it needs to know of a linear's inputs, prepares that once for all linears that share an input, and prunes
each of them, or makes up for a mask that others chose. Nobody compares its name: what follows from the choice of a pruner
is a fact here. The built-in ones are in `magnitude`, `wanda`, `sparsegpt` and `admm`, each with its facts; `registry` finds
them by name.

Legend: O out features, I in features.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import least_squares
from fedspallm_appfl.pruning.least_squares import Correlation
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms, Statistic, mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import exact
from fedspallm_appfl.tensors.target import NM, Target

Pruned = tuple[Tensor, Tensor]  # weight (O, I) float32, zero where pruned; mask (O, I) bool, True = kept
Known = TypeVar("Known")  # of an input
Rule = Callable[..., Tensor | Pruned]  # a pruner as one function, see `of_function`


@dataclass(frozen=True)
class Prepared:
    """A pruner ready for all linears that share one input.

    Attributes:
        prune: weight (O, I) float -> (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
        compensate: weight (O, I) float, mask (O, I) bool -> pruned weight (O, I) float32: the same with the mask given.
        notes: what the report should say, e.g. the damping if it had to be raised.
        sparse: weight, (O, I) bool -> as `prune`, of a weight with entries that are zero already: these are pruned first,
            and all of them, even if they are more than the target says. None: `prune`, and compensation for the others.
    """

    prune: Callable[[Tensor], Pruned]
    compensate: Callable[[Tensor, Tensor], Tensor]
    notes: dict[str, float] = field(default_factory=dict)
    sparse: Callable[[Tensor, Tensor], Pruned] | None = None

    def prune_all(self, weight: Tensor, target: Target, zero: Tensor | None) -> Pruned:
        """Prune a weight some of whose entries may be zero already: these stay zero, and are pruned first.

        Args:
            weight: (O, I) float.
            target: of the settings that this was prepared with.
            zero: as `sparsity.already_zero` says.

        Returns:
            (pruned weight (O, I) float32; mask (O, I) bool of exactly the target size: where more entries are zero
            already, it keeps some of them as zeros).
        """
        if zero is None:
            return self.prune(weight)
        made, mask = (self.sparse or self._sparse)(weight, zero)
        return made, exact(mask, zero, target)

    def fit_all(self, weight: Tensor, mask: Tensor, zero: Tensor | None) -> Tensor:
        """`compensate`, with entries that are zero already kept at zero."""
        return self.compensate(weight, mask if zero is None else mask & ~zero)

    def _sparse(self, weight: Tensor, zero: Tensor) -> Pruned:
        """With a pruner that knows nothing of zeros."""
        made, mask = self.prune(weight)
        support = mask & ~zero
        filled = bool((made[zero] != 0).any())
        return (self.compensate(weight, support) if filled else made), support


@dataclass(frozen=True)
class Pruner:
    """One way to prune a matrix, with what follows from choosing it.

    Attributes:
        name: as it stands in a configuration.
        needs: what it needs to know of the inputs: `InputNorms`, `InputGram`, or None for nothing at all.
        prepare: (settings, statistic) -> `Prepared`; uses the statistic up, as its memory is worked in.
        keeps_weights: kept weights stay as they were, so that a mask says all that it did.
        fits: least squares on the kept weights are a part of it, and `refit` has nothing to add.
        compensates: given a mask that others chose, it makes up for what is pruned; else kept weights stay dense there.
        factors: it factors the Gram matrix without damping it until that succeeds, so a rounded sum has to be lifted first.
        working_bytes: (O, I) -> bytes that pruning a matrix takes beside its dense weight and what was prepared.
        prepared_bytes: I -> bytes that are made of the statistic beside it, for all linears that take the input.
    """

    name: str
    needs: type[InputNorms] | type[InputGram] | None
    prepare: Callable[[Pruning, Any], Prepared]
    keeps_weights: bool = False
    fits: bool = False
    compensates: bool = True
    factors: bool = False
    working_bytes: Callable[[int, int], int] = lambda rows, features: 14 * rows * features
    prepared_bytes: Callable[[int], int] = lambda features: 0

    def refits(self, asked: bool) -> bool:
        """Whether least squares follow, if they were asked for: not where they are a part of it, or no inputs are known."""
        return asked and self.why_no_refit() is None

    def statistic(self, refit: bool) -> type[InputNorms] | type[InputGram] | None:
        """What it needs to know of the inputs, if least squares are to follow."""
        return InputGram if self.refits(refit) else self.needs

    def statistic_bytes(self, features: int, refit: bool) -> int:
        """Bytes of what it needs to know of an input of so many features."""
        kind = self.statistic(refit)
        return 0 if kind is None else kind.nbytes(features)

    def ready_bytes(self, features: int, refit: bool) -> int:
        """Bytes that are made of the statistic beside it; a Gram matrix that is used up is copied to refit with."""
        copied = self.refits(refit) and self.needs is InputGram
        return self.prepared_bytes(features) + (InputGram.nbytes(features) if copied else 0)

    def solving_bytes(self, rows: int, features: int, refit: bool) -> int:
        """Bytes that pruning a matrix (O, I) takes beside its dense weight and what is ready."""
        each = 9  # bytes an entry: solution, mask, where it started from
        fitting = least_squares.fitting_bytes(rows, features, each) if self.refits(refit) else 0
        return max(self.working_bytes(rows, features), fitting)

    def why_no_refit(self) -> str | None:
        """Why least squares cannot follow, or None."""
        if self.needs is None:
            return f"{self.name} knows no inputs"
        return f"{self.name} always fits what it keeps" if self.fits else None

    def ready(self, settings: Pruning, statistic: Statistic | None) -> Prepared:
        """Do once what linears with the same input share; `refit` puts least squares after it.

        Args:
            settings: how to prune.
            statistic: of the inputs, of the kind that `statistic` says or one that knows more; used up.

        Raises:
            PruningError: a factorization keeps failing, or the Gram matrix holds NaN.
            TypeError: the statistic knows too little.
        """
        wanted = self.statistic(settings.refit)
        if wanted is InputGram and not isinstance(statistic, InputGram):
            raise TypeError(f"{self.name} needs the Gram matrix of the inputs")
        known = statistic
        if self.needs is InputNorms and isinstance(statistic, InputGram):
            known = InputNorms.of(statistic.diagonal().clone(), statistic.tokens)
        if not self.refits(settings.refit):
            return self.prepare(settings, known)
        assert isinstance(statistic, InputGram)
        gram = statistic.matrix() if known is statistic else mirror(statistic.upper)  # before the statistic is used up
        return _refitted(self.prepare(settings, known), settings, gram)


def _refitted(prepared: Prepared, settings: Pruning, gram: Tensor) -> Prepared:
    """A pruner with least squares after it. `gram` (I, I) is symmetric, and used up."""
    correlation = Correlation(gram, settings.damping)

    def prune(weight: Tensor) -> Pruned:
        start, mask = prepared.prune(weight)
        return least_squares.refit(weight, mask, start, correlation), mask

    def compensate(weight: Tensor, mask: Tensor) -> Tensor:
        return least_squares.refit(weight, mask, prepared.compensate(weight, mask), correlation)

    def sparse(weight: Tensor, zero: Tensor) -> Pruned:
        start, mask = (prepared.sparse or prepared._sparse)(weight, zero)
        return least_squares.refit(weight, mask, start, correlation), mask

    return Prepared(prune, compensate, prepared.notes or raised_damping(settings, correlation), sparse)


def by_target(
    settings: Pruning, block: int, names: Sequence[str], statistic: Known
) -> Iterator[tuple[Pruning, list[str], Known]]:
    """Linears that share an input, by their targets: (settings, names, what is known of the input, to be used up).

    What is known is copied where there are several targets, but for the last.
    """
    targets: dict[Target, list[str]] = {}
    for name in names:
        targets.setdefault(settings.sparsity.of(block, name), []).append(name)
    for number, alike in enumerate(targets.values(), 1):
        known = statistic if number == len(targets) else copy.deepcopy(statistic)
        yield settings.at(block, alike[0]), alike, known


def raised_damping(settings: Pruning, correlation: Correlation) -> dict[str, float]:
    """What the report should say of a correlation matrix: the damping, where it had to be raised."""
    return {"damping": correlation.damping} if correlation.damping > settings.damping else {}


def of_function(
    name: str,
    function: Rule,
    needs: type[InputNorms] | type[InputGram] | None = None,
    keeps_weights: bool = False,
    **facts: Any,
) -> Pruner:
    """A pruner of one function of a matrix.

    Args:
        name: as it stands in a configuration.
        function: (weight (O, I) float32, target, statistic) -> the mask (O, I) bool with True = kept, or (pruned weight,
            mask). The statistic is of the kind that `needs` says and must not be changed; a pruner that needs nothing gets
            none.
        needs: `InputNorms`, `InputGram` or None.
        keeps_weights: it leaves kept weights as they are.
        **facts: the others of `Pruner`.
    """

    def prepare(settings: Pruning, statistic: Statistic | None) -> Prepared:
        known = () if statistic is None else (statistic,)

        def prune(weight: Tensor) -> Pruned:
            made = function(weight.clone(), settings.own_target, *known)  # a copy, as functions write into arguments
            return made if isinstance(made, tuple) else (weight, made)

        return Prepared(prune, torch.mul if keeps_weights else _solver(settings, statistic))

    known = needs is InputGram
    facts = {"factors": known, "compensates": known and not keeps_weights, **facts}
    return Pruner(name, needs, prepare, keeps_weights, **facts)


def guarded(pruner: Pruner) -> Pruner:
    """The same pruner, with everything checked that somebody's own code makes.

    Its errors become `PruningError`s that name it, and so do a wrong shape, dtype or number of zeros, kept weights that
    are not as promised, and a statistic that was changed although other linears share it.
    """
    who = f"pruner {pruner.name}"

    def prepare(settings: Pruning, statistic: Any) -> Prepared:
        with named(who):
            made = pruner.prepare(settings, statistic)
        if not isinstance(made, Prepared):
            raise PruningError(f"{who}: prepare returns a Prepared, got {type(made).__name__}")
        parts = [] if statistic is None else [one for one in vars(statistic).values() if isinstance(one, Tensor)]
        versions = [one._version for one in parts]

        def result(work: Callable[..., Any], *given: Tensor) -> Any:
            with named(who):
                found = work(*given)
            if [one._version for one in parts] != versions:
                raise PruningError(f"{who}: it changed the statistic, which other linears share; work on a copy")
            return found

        def prune(weight: Tensor) -> Pruned:
            return checked(pruner.name, result(made.prune, weight), weight, settings.own_target, pruner.keeps_weights)

        def sparse(weight: Tensor, zero: Tensor) -> Pruned:
            assert made.sparse is not None, "else it is not used"
            found = result(made.sparse, weight, zero)
            with named(who):
                pruned, mask = found
                mask = exact(mask & ~zero, zero, settings.own_target)
            return checked(pruner.name, (pruned, mask), weight, settings.own_target, pruner.keeps_weights)

        def compensate(weight: Tensor, mask: Tensor) -> Tensor:
            return _fitted(pruner.name, result(made.compensate, weight, mask), mask)

        return replace(made, prune=prune, compensate=compensate, sparse=sparse if made.sparse else None)

    return replace(pruner, prepare=prepare)


@contextmanager
def named(who: str) -> Iterator[None]:
    """Name somebody's own code in its errors."""
    try:
        yield
    except PruningError:
        raise
    except Exception as error:  # whatever it raises
        raise PruningError(f"{who}: {type(error).__name__}: {error}") from error


def _solver(settings: Pruning, statistic: Statistic | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes up for a mask that others chose: least squares where the Gram matrix is known, else nothing."""
    if not isinstance(statistic, InputGram):
        return torch.mul

    def fit(weight: Tensor, mask: Tensor) -> Tensor:
        correlation = Correlation(statistic.matrix(), settings.damping)
        return least_squares.refit(weight, mask, weight * mask, correlation)

    return fit


def checked(name: str, made: Any, weight: Tensor, target: Target, keeps_weights: bool) -> Pruned:
    """What somebody's own pruner made of a matrix, if it is what it has to be.

    Args:
        name: of the pruner.
        made: (pruned weight, mask).
        weight: (O, I) float32, the dense weight.
        target: how many entries to prune.
        keeps_weights: whether kept weights have to be as they were.

    Returns:
        (weight (O, I) float32, zero where pruned; mask (O, I) bool).

    Raises:
        PruningError: shape, dtype or number of zeros is wrong, or kept weights are not what was promised.
    """
    if not isinstance(made, tuple) or len(made) != 2:
        raise PruningError(f"pruner {name}: it returns a mask, or a weight and a mask; got {_described(made)}")
    pruned, mask = made
    check_mask(f"pruner {name}", mask, tuple(weight.shape), target)
    pruned = _fitted(name, pruned, mask)
    if keeps_weights and not torch.equal(pruned, weight.float() * mask):
        raise PruningError(f"pruner {name}: it changed kept weights; return the mask alone, or set keeps_weights=False")
    return pruned, mask


def _fitted(name: str, made: Any, mask: Tensor) -> Tensor:
    """The weight that somebody's own pruner made for a mask, zero where that prunes."""
    if not isinstance(made, Tensor) or made.shape != mask.shape:
        raise PruningError(f"pruner {name}: the weight has shape {list(mask.shape)}, got {_described(made)}")
    pruned = made.float() * mask
    if not bool(pruned.isfinite().all()):
        raise PruningError(f"pruner {name}: kept weights hold NaN or infinity")
    return pruned


def check_mask(who: str, mask: Any, shape: tuple[int, ...], target: Target, also: int | None = None) -> None:
    """Refuse a mask of a wrong shape, dtype or number of zeros; `also` is another number that is right.

    Raises:
        PruningError: says who made it, what it has to be and what it is.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise PruningError(f"{who}: the mask is bool of shape {list(shape)}, True = kept; got {_described(mask)}")
    zeros, expected = mask.numel() - int(mask.count_nonzero()), target.zeros(mask.numel())
    if zeros not in (expected, also):
        raise PruningError(f"{who}: sparsity {target} prunes {expected} of {mask.numel()} entries, the mask {zeros}")
    if isinstance(target, NM) and bool((mask.reshape(-1, target.group).sum(1) != target.kept).any()):
        raise PruningError(f"{who}: the mask does not keep {target} in every group of a row")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return type(value).__name__
