"""The code that runs at a client's endpoint.

A task receives settings, the results agreed on so far, and instructions. It finds model and private text through the
site file (`site_file`). It makes the messages of one exchange and places each at once: in the data store, or in the
result if there is no store.

Between two tasks a worker keeps the dense model's skeleton. During a sweep it also keeps its clients, with the hidden
states before the next block. Another worker, or the same one after a failure, recreates them: only the time differs.
Keys of secure sums cannot be made again. They lie in a folder that only this user can read, until a round ends.
"""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.aggregation.layer_sampling import to_text
from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.devices import choose_devices
from fedspallm_appfl.errors import ConfigError, FederationError, FedSpaLLMError, ModelError
from fedspallm_appfl.globus.site.identities import public_keys, require_roster
from fedspallm_appfl.globus.site.record import Record, require_approval
from fedspallm_appfl.globus.site.site_file import BLANK, RECOVERY, TOKEN_COUNTS, Site, load_site
from fedspallm_appfl.globus.store.data_store import DataStore, open_store
from fedspallm_appfl.globus.store.places import fetched, placed
from fedspallm_appfl.models.storage.checkpoint import model_hash
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.recovery.steps import batches_of_step, fewest_windows
from fedspallm_appfl.rounds.client import OWN_FOLDER, LocalClient
from fedspallm_appfl.settings import custom_code, plugins
from fedspallm_appfl.settings.reading import build
from fedspallm_appfl.settings.schema import ClientSettings, HashedModel

SECRETS = "fedspallm-secrets-"
KEPT = 7 * 24 * 3600  # seconds after the last task that wrote there
RESULT_LIMIT = 10_000_000  # bytes of a task's result, from the documentation of the service


def run_exchange(request: dict[str, Any]) -> dict[str, Any]:
    """Make a client's messages of one exchange.

    Args:
        request: `client`, its `config` from `agents.client_agent_config` without the paths of the site; `store`
            from `DataStore.lend`, the `run` and for each message the `names` of its object; `down` (payloads to
            load, in order) and `instructions`.

    Returns:
        `{"messages": [{"payload", "metadata"}]}`, after the last round `{"losses": ...}`, or `{"error": ...}` with the
        stack, without the private text's path.
    """
    site, client, store, exchange, record = Site(), None, None, 0, None
    messages: list[dict[str, Any]] = []
    try:
        site = load_site(request["client"])
        record = Record(site, request, "prune")
        _forget_old_files()
        settings = told(request)
        record.settings(settings)
        require_consent(settings, site)
        require_approval(site, settings)
        store = site_store(request, site)
        if "measure" in request["instructions"]:
            losses = _losses(request, settings, site, store)
            record.leaves(json.dumps(losses).encode())
            return {"losses": losses}
        exchange = int(request["instructions"]["exchange"])
        amid = _amid_sweep(request) or _Amid(request["run"], _agent(settings, site, _secrets(request)))
        client = amid.client
        for message in _messages(amid, request, store, record):
            messages.append(message)
        result = _within_limit({"messages": messages}, request["client"])
        if client.goes_on(exchange):
            _sweeping[request["client"]] = amid
        return result
    except Exception as error:  # noqa: BLE001 - for any error, the server must know which client failed where
        if record is not None:
            record.failed(in_words(error, site))
        return {"error": _described(error, site) | {"blocks": _blocks_of_message(client, exchange, len(messages))}}
    finally:
        if client is not None and request["client"] not in _sweeping:
            client.close()
        if record is not None:
            record.write()
        if store is not None:
            store.close()


@dataclass
class _Amid:
    """A client between two tasks.

    Attributes:
        run: its run.
        agent: its agent.
        loaded: digests of the places of payloads that it has loaded.
    """

    run: str
    agent: Any
    loaded: set[str] = field(default_factory=set)

    @property
    def client(self) -> LocalClient:
        """Its side of a round; opens model and text when it is first asked for."""
        client: LocalClient = self.agent.trainer.client
        return client


_sweeping: dict[str, _Amid] = {}  # client -> its paused sweep


def _amid_sweep(request: dict[str, Any]) -> _Amid | None:
    """The client if it stands where the task goes on; what stands anywhere else is let go of."""
    now = request["instructions"]
    amid = _sweeping.pop(request["client"], None)
    for client in [client for client, other in _sweeping.items() if other.run != request["run"]]:
        _sweeping.pop(client).client.close()
    if amid is None:
        return None
    trainer = amid.agent.trainer
    if (amid.run, trainer.round, trainer.exchange) == (request["run"], now["round"], now["exchange"]):
        return amid
    amid.client.close()
    return None


def told(request: dict[str, Any]) -> ClientSettings:
    """What the server tells the client; paths in it are the server's, and mean nothing here.

    Raises:
        ConfigError: a value is of a wrong type.
    """
    settings: ClientSettings = build(ClientSettings, request["config"]["train_configs"])
    return settings


def sendings(settings: ClientSettings) -> set[str]:
    """What a task would send, as the site file names it.

    Raises:
        ConfigError: the algorithm or the pruner is neither built in nor of a plugin of this site.
    """
    algorithm, gram = algorithms.find(settings.algorithm), settings.gram
    after = {RECOVERY} if settings.recovery.rounds else set()
    if settings.recovery.model:
        return after
    if algorithm.gathers:
        harmless = gram.first_input == "public" and gram.propagate == "dense"
        return after | ({"grams"} if harmless else {"grams", TOKEN_COUNTS})
    alone = pruners.keeps_weights(settings)
    return after | {"masks" if one.up == "weights" and alone else one.up for one in algorithm.round}


def require_consent(settings: ClientSettings, site: Site) -> None:
    """Refuse a task that wants what this site does not send; the site's own plugins are loaded.

    Raises:
        ConfigError: it does, or names a pruner or an algorithm that is not known here, or other clients of secure sums.
    """
    try:
        plugins.load(site.plugins)
    except ConfigError as error:  # its words may tell what is private
        raise ConfigError(
            f"client {settings.client_id}: a plugin that the site file names cannot be imported; at the site, "
            "python FILE says why"
        ) from error
    site.require_consent(settings.client_id, sendings(settings))
    require_roster(settings, site)
    if pruners.find(settings.pruner).needs is not None:
        site.require_windows(settings.client_id, settings.data.windows * settings.data.length)
    if algorithms.find(settings.algorithm).gathers and not settings.recovery.model:
        site.require_tokens(settings.client_id, settings.gram.min_tokens)
    if settings.recovery.rounds:
        recovery, data = settings.recovery, settings.data
        batches = recovery.steps * batches_of_step(recovery, data.batch)
        steps = fewest_windows(data.windows, data.batch, batches) * data.length
        site.require_training(settings.client_id, steps, data.windows * data.length)


def site_store(request: dict[str, Any], site: Site) -> DataStore | None:
    """The data store of a task, with this site's settings."""
    return open_store({**request["store"], **site.store}, request["run"])


def _losses(request: dict[str, Any], settings: ClientSettings, site: Site, store: DataStore | None) -> dict[str, Any]:
    """Measure the finished model on the client's own text.

    Raises:
        ConfigError: the site does not allow it.
    """
    if not site.evaluation:
        raise ConfigError(f"client {settings.client_id}: this site does not measure models on its text")
    agent = _agent(settings, site)
    client = agent.trainer.client
    try:
        _load(agent, request["down"], store, set())
        for place in request["final"]:
            client.final.take(fetched(place, store, "the server"))
        return client.measure()
    finally:
        client.close()


def _load(agent: Any, places: list[dict[str, Any]], store: DataStore | None, loaded: set[str]) -> None:
    """Load what went down, except what was loaded."""
    for place in places:
        digest = hashlib.sha256(json.dumps(place).encode()).hexdigest()
        if digest not in loaded:
            agent.load_parameters(fetched(place, store, "the server"))
            loaded.add(digest)


def _agent(settings: ClientSettings, site: Site, secrets: Path | None = None) -> Any:
    _load_appfl()
    from fedspallm_appfl.adaptors.agents import client_agent

    own = _with_own(settings, site)
    own.secrets = str(secrets) if secrets and own.secure_sums else None
    return client_agent(own)


def _secrets(request: dict[str, Any]) -> Path:
    """Where a client of a run keeps its keys between two tasks, as another worker may get the next one."""
    name = hashlib.sha256(json.dumps([request["run"], request["client"]]).encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"{SECRETS}{name[:32]}"


def _forget_old_files() -> None:
    """Remove what is left of rounds that never ended: runs were cut off or left the client out, or a task was killed."""
    temporary = Path(tempfile.gettempdir())
    for folder in [*temporary.glob(f"{SECRETS}*"), *temporary.glob(f"{OWN_FOLDER}*")]:
        with suppress(OSError):  # another user's, or another task removes it as well
            if folder.lstat().st_uid == os.getuid() and time.time() - folder.lstat().st_mtime > KEPT:
                shutil.rmtree(folder)


def _with_own(settings: ClientSettings, site: Site) -> ClientSettings:
    """What the client is told, with the paths and decisions of this site in the place of the server's."""
    client = settings.client_id
    site.require_text(client, pruners.find(settings.pruner), settings.recovery.rounds > 0)
    settings.data.text, settings.data.pool = site.text, []  # the server names no path of a text
    settings.data.field = site.field or settings.data.field
    settings.agreed = settings.checkpoints = None  # nor one that is written to
    settings.trainer = ClientSettings.trainer  # nor code: APPFL would import any trainer that it is told
    settings.public_keys, settings.identity = public_keys(site), site.identity
    settings.gram = replace(settings.gram, min_tokens=settings.gram.min_tokens or site.min_tokens)
    settings.model.trust_remote_code = False  # the site file says what may run here
    settings.model.path = str(same_model(settings.model, site, client))
    settings.devices = choose_devices(settings, 0)
    return settings


@lru_cache(maxsize=1)
def _load_appfl() -> None:
    registration.register()
    registration.freeze()


def same_model(model: HashedModel, site: Site, client: str) -> Path:
    """The folder of the model at this site.

    Raises:
        ModelError: there is none, or it differs from the server's.
    """
    folder = site.model_folder(model.path)
    here = model_hash(folder)
    if here != model.hash:
        config, weights = (a == b for a, b in zip(here.split("/"), model.hash.split("/"), strict=True))
        what = "weights" if config and not weights else "config.json"
        raise ModelError(
            f"client {client}: the model in {folder} is not the server's, {what} differ ({here}, expected "
            f"{model.hash}); name a copy of the server's model in the site file: model: FOLDER"
        )
    if site.trust_remote_code:
        custom_code.allow(folder)
    return folder


def _messages(
    amid: _Amid, request: dict[str, Any], store: DataStore | None, record: Record
) -> Iterator[dict[str, Any]]:
    agent = amid.agent
    _load(agent, request["down"], store, amid.loaded)
    agent.load_parameters(({}, request["instructions"]))
    number, total = 0, 1
    while number < total:
        agent.train()
        payload, metadata = agent.get_parameters()
        total = metadata["_total_chunks"]
        place = placed(payload, store, request["names"][number], record.leaves)
        yield {"payload": place, "metadata": metadata}
        number += 1


def _within_limit(result: dict[str, Any], client: str) -> dict[str, Any]:
    size = len(json.dumps(result))
    if size > RESULT_LIMIT:
        raise FederationError(
            f"client {client}: the result has {size} bytes, Globus Compute allows {RESULT_LIMIT}; set "
            "client_configs.comm_configs.store to a store that all sites can reach (docs/globus.md)"
        )
    return result


def in_words(error: Exception, site: Site) -> str:
    """The message of an error, in words that may be sent: without paths, and without what was taken from the text."""
    words = str(error) if isinstance(error, FedSpaLLMError) else f"{type(error).__name__}: {error}"
    return site.without_paths(_blanked(words, error))


def _blanked(words: str, error: BaseException | None) -> str:
    """Words of an error without those that it, or what caused it, took from the private text."""
    while error is not None:
        if private := getattr(error, "private", ""):
            words = words.replace(private, BLANK)
        error = error.__cause__
    return words


def _described(error: Exception, site: Site) -> dict[str, str]:
    """An error in words that may be sent; its cause (`from error`) may hold private text and stays here."""
    stack = "".join(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    return {
        "message": in_words(error, site),
        "traceback": site.without_paths(_blanked(stack, error)),
        "host": socket.gethostname(),
    }


def _blocks_of_message(client: LocalClient | None, exchange: int, number: int) -> str:
    """The blocks of a message; empty before the first."""
    messages = client.messages(exchange) if client else []
    return to_text(sorted({block for block, _ in messages[number]})) if number < len(messages) else ""
