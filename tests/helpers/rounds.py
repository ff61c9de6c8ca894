"""Both sides of a round, made of a few values."""

from fedspallm_appfl.rounds import gathering, pruning
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.settings.schema import ClientSettings, Gram, OwnData, Pruning, ServerSettings


def client_settings(settings=None, *, batch=1, client="local", activations="memory", gram=None, seed=0, **more):
    """What a client is told."""
    data = OwnData(batch=batch, activations=activations)
    given = vars(settings or Pruning()) | more
    return ClientSettings(**given, client_id=client, data=data, gram=gram or Gram(first_input="private"), seed=seed)


def source(model, windows, settings=None, *, groups=(), pruned=None, masks=None, **more):
    """A client's model and text."""
    return Source(model, windows, client_settings(settings, **more), groups, pruned or {}, masks or {})


def prune_blocks(model, windows, assigned, settings, *, masks=None, **more):
    """The sweep that prunes."""
    return pruning.prune_blocks(source(model, windows, settings, **more), assigned, masks)


def whole(gathered):
    """All inputs of a block at once."""
    return ((block, dict(found)) for block, found in gathered)


def dense_grams(model, windows, assigned, groups, *, public_first=None, **more):
    """Gram matrices of the dense model; of random tokens for the first input if there is a seed of them."""
    gram = Gram("fp32", first_input="private" if public_first is None else "public")
    of = source(model, windows, groups=groups, gram=gram, seed=public_first or 0, **more)
    return whole(gathering.gathered(of, assigned))


def swept_grams(
    model, windows, assigned, groups, agreed, *, start=None, dense_target=False, public_first=None, stride=0, **more
):
    """Gram matrices of the model that is being pruned."""
    first = "private" if public_first is None else "public"
    gram = Gram("fp32", "pruned", "dense" if dense_target else "own", first, stride=stride)
    of = source(model, windows, groups=groups, gram=gram, seed=public_first or 0, pruned=agreed, **more)
    return whole(gathering.gathered(Source(of.model, of.windows, of.settings, of.groups, agreed), assigned, start))


def server_settings(settings, algorithm="fedspallm", *, compression=False, **more):
    """What the server is told."""
    more = {"screening": "off"} | more  # random numbers are not those of honest clients
    return ServerSettings(**vars(settings), algorithm=algorithm, compression="zstd" if compression else "none", **more)


def global_model(layout, dtype, settings, folder, dense, device="cpu", on_event=lambda event: None, groups=()):
    """The server's side."""
    return GlobalModel(Context(layout, dtype, settings, folder, device, dense, groups), on_event)
