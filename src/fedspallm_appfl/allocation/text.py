"""The public text: the windows that targets are made of, and others to judge them on."""

from importlib.resources import as_file, files

from torch import Tensor

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.settings.schema import Allocation, Config
from fedspallm_appfl.texts.checks import check_vocabulary
from fedspallm_appfl.texts.drawing import draw
from fedspallm_appfl.texts.tokenizer import tokenizer_for
from fedspallm_appfl.texts.windows import Cut

SHIPPED = "public.txt"  # in this folder; `make_public_text` has made it
LENGTH = 256  # tokens in a window, or what the model takes if that is less
DRAWN = "allocation"  # what windows are drawn by, as those of a client are by its id


def window_length(settings: Allocation, longest: int | None) -> int:
    """Tokens in a window, for a model that takes `longest` of them, or any number."""
    return settings.length or min(LENGTH, longest or LENGTH)


def public_windows(config: Config, skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Windows to make targets of, and as many others to judge them on; if the text has fewer, half each.

    Returns:
        Two of (n, T) int64 token ids.

    Raises:
        DataError: the text cannot be read, has fewer than two windows, or does not go with the model.
    """
    settings = config.allocation
    length = window_length(settings, skeleton.longest_window)
    with as_file(files(__package__) / SHIPPED) as shipped:
        paths = settings.text or str(shipped)
        tokenizer, cut = (
            tokenizer_for(skeleton.folder, paths),
            Cut(length, config.client_configs.data.bos, settings.field),
        )
        try:
            drawn = draw(paths, cut, tokenizer, 2, config.seed, DRAWN, 2 * settings.windows - 2)
        except DataError as error:
            raise DataError(f"allocation.text: {str(error).removeprefix(f'client {DRAWN}: ')}") from error
    check_vocabulary(drawn, skeleton.vocabulary, "allocation.text")
    return drawn[::2], drawn[1::2]
