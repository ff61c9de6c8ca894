"""APPFL trainer: `train()` prunes what the next message needs, `get_parameters()` hands it over.

One call of `train` makes one message of an exchange (see `messages`), so APPFL's plain loop of train, get_parameters,
update_global_model, load_parameters streams a model block by block. Instructions (round, assigned blocks) come in the
metadata beside the payload; a script that drops the metadata works too, as the assignment is a pure function of what
stands in `train_configs`.
"""

import socket
from typing import Any

from appfl.algorithm.trainer import BaseTrainer
from omegaconf import DictConfig, OmegaConf

from fedspallm_appfl.aggregation.layer_sampling import draw, from_text
from fedspallm_appfl.devices import choose_devices
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.rounds.client import LocalClient, Message
from fedspallm_appfl.settings.reading import build
from fedspallm_appfl.settings.schema import ClientSettings
from fedspallm_appfl.wire.update import without_tensors


class FedSpaLLMTrainer(BaseTrainer):
    """Prune a client's copy of the model on its private text.

    Attributes:
        client: the client's side of a round; opened at the first use.
        on_event: hears of steps of training, every now and then.
        lacking: after the last round, the pieces that it lacks of the model that it measures; None if it measures none.
    """

    def __init__(self, train_configs: DictConfig, client_id: str | None = None, **kwargs: Any) -> None:
        """Keep the settings; nothing is loaded yet.

        Args:
            train_configs: the keys of `ClientSettings`; those that are left out have its defaults, others are APPFL's.
            client_id: APPFL gives it to classes in its namespace, not to those from a `trainer_path`; then it is taken
                from `train_configs.client_id`, or from `train_configs.wandb_logging_id`, which APPFL always sets.
            **kwargs: what else APPFL passes; model, loss and data sets are not used.

        Raises:
            ConfigError: the client has no id.
        """
        super().__init__(train_configs=train_configs, client_id=client_id, **kwargs)
        raw: Any = OmegaConf.to_container(train_configs, resolve=True)
        name = client_id or raw.get("client_id") or raw.get("wandb_logging_id")
        if not name:
            raise ConfigError("FedSpaLLMTrainer: the client has no id; set client_id in the client's configuration")
        self.settings: ClientSettings = build(ClientSettings, {**raw, "client_id": str(name)})
        self.settings.devices = choose_devices(self.settings, 0)
        self.client_id: str = str(name)
        self.round: int = 0
        self._client: LocalClient | None = None
        self.exchange: int = 0
        self._instructions: tuple[int, int, list[int], list[int], dict[str, Any]] | None = None
        self._message: Message | None = None
        self._pieces_left = 0
        self._missed: list[dict[str, Any]] = []
        self.lacking: int | None = None
        self.on_event: OnEvent = ignore

    @property
    def client(self) -> LocalClient:
        """The client's side of a round."""
        if self._client is None:
            self._client = LocalClient(self.settings, lambda event: self.on_event(event))
        return self._client

    def train(self, **instructions: Any) -> None:
        """Make the next message of the round; the first call of an exchange starts it."""
        if instructions.get("assign"):
            self.follow(instructions)
        if not self.client.in_exchange:
            self._require_all_pieces()
            self.client.miss(self._missed)
            self._missed = []
            self.round, self.exchange, blocks, finished, told = self._instructions or (
                self.round,
                self.exchange,
                self._own_blocks(),
                [],
                {},
            )
            self.client.start_exchange(self.round, self.exchange, blocks, finished, told)
            self._instructions = None
        self._message = self.client.next_message()
        if not self.client.in_exchange:
            self._count_on()

    def _count_on(self) -> None:
        """What comes next, should the server's instructions not reach here."""
        self.exchange += 1
        if self.exchange == self.client.exchanges_in(self.round):
            self.round, self.exchange = self.round + 1, 0

    def get_parameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The message that `train` made, and its metadata in plain types."""
        if self._message is None:
            raise RuntimeError(f"client {self.client_id}: get_parameters was called before train")
        message, self._message = self._message, None
        metadata = {
            "_chunk_idx": message.number,
            "_total_chunks": message.total,
            "samples": self.client.samples,
            "seconds": round(message.seconds, 4),
            "notes": message.notes,
            "host": socket.gethostname(),
            **({"secure": message.secure} if message.secure else {}),
        }
        return message.update, metadata

    def load_parameters(self, params: Any) -> None:
        """Take what the server sent: a payload or a further piece of it, alone or with metadata that holds instructions."""
        update, metadata = params if isinstance(params, tuple) else (params, {})
        self.client.take(update)
        if update:
            self._pieces_left = update["pieces"] - 1 if update["piece"] == 0 else self._pieces_left - 1
        self.follow(metadata)

    @property
    def is_open(self) -> bool:
        """Whether the client has its model and its text."""
        return self._client is not None

    def miss(self, update: dict[str, Any]) -> None:
        """Note what the server sent while the client could not be opened."""
        if update:
            self._missed.append(without_tensors(update))

    def follow(self, metadata: dict[str, Any]) -> None:
        """Take the server's instructions."""
        self.lacking = (metadata.get("measure") or {}).get(self.client_id)
        if self.client_id in (metadata.get("assign") or {}):
            blocks = from_text(metadata["assign"][self.client_id])
            if self.is_open:
                self.client.leave_exchange()
            finished = from_text(metadata.get("finished", ""))
            told = (metadata.get("secure") or {}).get(self.client_id, {})
            self._instructions = int(metadata["round"]), int(metadata["exchange"]), blocks, finished, told

    def _require_all_pieces(self) -> None:
        if self._pieces_left > 0:
            raise RuntimeError(
                f"client {self.client_id}: {self._pieces_left} pieces of the server's update are missing; fetch each "
                "with get_global_model(init_model=False, piece=i) for i = 1, 2, ... and give it to load_parameters"
            )

    def _own_blocks(self) -> list[int]:
        """What is assigned, should the server's instructions not reach here."""
        exchange = self.client.exchanges[self.exchange]
        if exchange.begins or exchange.recovers:
            return self.client.agreed.blocks()
        return self._own_draw(self.round)

    def _own_draw(self, index: int) -> list[int]:
        settings, blocks = self.settings, list(self.client.model.layout.pruned)
        if not settings.roster:
            raise ConfigError(
                f"client {self.client_id}: the server sent no assignment, and train_configs.roster (client id -> share) "
                "is not there to draw it from; pass the metadata on to load_parameters, or give the roster"
            )
        drawn = draw(settings.layer_sampling, settings.seed, index, settings.rounds, settings.roster, blocks)
        return drawn[self.client_id]
