"""What folds share, for the model and the settings of a run."""

from functools import cache
from pathlib import Path

from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.storage.checkpoint import allow_code_of
from fedspallm_appfl.models.typical import typical_squares
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.settings.schema import ServerSettings


def context_of(settings: ServerSettings, skeleton: Skeleton, folder: Path) -> Context:
    """What folds share.

    Args:
        settings: how to combine uploads.
        skeleton: the model without weights.
        folder: the server's state.
    """
    device = choose_device(settings.device, 0)

    @cache
    def typical() -> dict[tuple[int, str], float]:
        """How large inputs are on random tokens; the first to ask runs the dense model, block by block."""
        allow_code_of(settings.model)
        return typical_squares(LazyModel.of(settings, device))

    return Context(
        skeleton.layout,
        skeleton.stored_dtype,
        settings,
        folder,
        device,
        skeleton.dense_matrix,
        shared_inputs(skeleton.folder, skeleton.layout) if registry.find(settings.algorithm).gathers else (),
        lambda block, name: typical().get((block, name)),
    )
