"""What a run will do, in words."""

from collections.abc import Iterator

from fedspallm_appfl.aggregation.layer_sampling import expected_uncovered, to_text
from fedspallm_appfl.models.layout import left_dense
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.rounds.participants import algorithm_of, comparisons, roster, uncovered
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.texts.files import text_files


def forecast(config: Config) -> list[str]:
    """What a run will prune."""
    skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
    blocks = skeleton.layout.blocks
    entries = sum(linear.entries for block in blocks for linear in block)
    names = ", ".join(linear.name for linear in blocks[0])
    lines = [
        headline(config),
        *_notices(config),
        f"prunes {sum(map(len, blocks))} matrices with {entries:,} weights in {len(blocks)} blocks: {names}",
    ]
    dense = left_dense(skeleton.model, skeleton.layout)
    if dense:
        lines.append(f"leaves dense inside the blocks: {', '.join(dense)}")
    return [*lines, *left_out(config, len(blocks))]


def left_out(config: Config, blocks: int) -> Iterator[str]:
    """Which blocks stay dense because no client is assigned them."""
    missed = uncovered(config, blocks)
    if missed:
        yield (
            f"leaves dense the blocks that no client draws in {rounds_text(config)}: {to_text(missed)}; "
            "raise resource_share or num_global_epochs to reach them"
        )
    if config.client_configs.train_configs.layer_sampling == "uniform":
        expected = expected_uncovered(roster(config), blocks)
        yield f"uniform sampling leaves {expected:.2f} blocks a round to nobody, in expectation"


def _notices(config: Config) -> Iterator[str]:
    """What the algorithm means for the rest of the configuration, and what is not read."""
    texts = {f"client {client.client_id}": client.data.text for client in config.clients if client.data.text}
    texts |= {f"evaluation.texts.{name}": text for name, text in config.evaluation.texts.items()}
    for where, text in texts.items():
        if left := text_files(text).left_out_words():
            yield f"{where}: not text, left out: {left}"
    if config.evaluation.compare and not comparisons(config):
        yield (
            f"evaluation.compare is left out: {', '.join(config.evaluation.compare)} cannot be made of the uploads of "
            f"{config.algorithm}"
        )
    if algorithm_of(config).gathers:
        gram = config.gram
        yield f"clients send Gram matrices in {gram.precision}, of inputs of the {gram.propagate} model"
        if gram.first_input == "private":
            yield "gram.first_input is private: the server can tell how often each token occurs in a client's text"


def headline(config: Config) -> str:
    """Who prunes how, in a line."""
    clients = f"{len(config.clients)} client{'s' * (len(config.clients) != 1)}"
    sparsity = config.client_configs.train_configs.sparsity
    return f"{clients}, {rounds_text(config)}, {how(config)}, sparsity {sparsity}"


def how(config: Config) -> str:
    """Algorithm and pruners."""
    return f"{algorithm_of(config).title} with {config.pruners()}"


def rounds_text(config: Config) -> str:
    """The number of rounds."""
    rounds = config.server_configs.num_global_epochs
    return f"{rounds} round{'s' * (rounds > 1)}"
