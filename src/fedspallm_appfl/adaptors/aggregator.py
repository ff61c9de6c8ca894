"""APPFL aggregator: hands uploads to the global model and gives out the round's assignments."""

import tempfile
from pathlib import Path
from typing import Any

from appfl.algorithm.aggregator import BaseAggregator
from omegaconf import DictConfig, OmegaConf

from fedspallm_appfl.aggregation.layer_sampling import draw, to_text
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.export import MatrixSparsity, save_model
from fedspallm_appfl.rounds.beginning import begin
from fedspallm_appfl.rounds.folds.of_model import context_of
from fedspallm_appfl.rounds.pieces import Piece
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.settings.reading import build
from fedspallm_appfl.settings.schema import ServerSettings
from fedspallm_appfl.wire.metadata import read_metadata
from fedspallm_appfl.wire.update import checked_losses, update_nbytes


class FedSpaLLMAggregator(BaseAggregator):
    """The server's side of FedSpaLLM and the other algorithms behind APPFL's interface.

    Attributes:
        skeleton: the model without weights.
        global_model: sums, votes and packed results.
        round: the round that is on, from 0; equal to the number of rounds once all are done.
        on_event: called with a dict for each upload, block and round.
    """

    def __init__(
        self, model: Any = None, aggregator_configs: DictConfig | None = None, logger: Any = None, **kwargs: Any
    ) -> None:
        """Build the skeleton of the model and start round 0.

        Args:
            model: not used; APPFL passes its own model or None.
            aggregator_configs: the keys of `ServerSettings`; those that are left out have its defaults.
            logger: APPFL's logger, not used.
            **kwargs: `aggregator_config`, the name that APPFL gives to the argument in another place.
        """
        configs = aggregator_configs if aggregator_configs is not None else kwargs["aggregator_config"]
        self.settings: ServerSettings = build(ServerSettings, OmegaConf.to_container(configs, resolve=True))
        self.on_event: OnEvent = ignore
        state_dir = self.settings.state_dir
        self.skeleton = Skeleton.of(self.settings)
        self._own_folder = None if state_dir else tempfile.TemporaryDirectory(prefix="fedspallm-")
        folder = Path(self._own_folder.name if self._own_folder else state_dir or "")
        context = context_of(self.settings, self.skeleton, folder)
        self.global_model = GlobalModel(context, lambda event: self.on_event(event))
        self.round = max(self.global_model.round.index, 0)
        self._ended: set[str] = set()
        self._pieces: list[Piece] = []
        self._final: dict[str, list[Piece]] = {}  # client, or empty for all of them -> what they lack at the end
        self._final_bytes: dict[tuple[str, int], int] = {}  # (store, piece) -> bytes, as they travel
        self._held: list[Piece] = []  # what clients were sent before the run was cut off
        if self.global_model.resumed is None:
            if self.settings.recovery.model:
                begin(self.settings, self.skeleton, context.folder)
            self._begin()
        else:
            self._held = self.global_model.held(self.settings.max_message_bytes)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= self.settings.rounds

    def get_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a client gets outside the exchange of messages.

        Before its first message its assignment, without weights, since it holds the dense model; with `piece=i` the i-th
        piece of what goes down. In a run that goes on after it was cut off the assignment says how many pieces of what
        clients held there are, and `held=i` is the i-th. After the last round, with `final=i` the i-th piece of what the
        client lacks of the model that it measures, and with `losses`, client -> what it has measured, nothing.
        """
        for client, losses in kwargs.get("losses", {}).items():
            self.take_losses(str(client), losses)
        if "losses" in kwargs:
            return {}, {}
        if "held" in kwargs:
            return self.global_model.pieces.load(self._held[kwargs["held"]]), {}
        if "final" in kwargs:
            return self.final_piece(str(kwargs["client_id"]), kwargs["final"]), {}
        if "piece" in kwargs:
            return self.global_model.pieces.load(self._pieces[kwargs["piece"]]), {}
        asked = kwargs.get("_client_ids") or [kwargs.get("client_id")]
        known = [client for client in map(str, asked) if client in self.settings.roster]
        return {}, self.instructions(known or list(self.settings.roster)) | self._goes_on()

    def instructions(self, clients: list[str]) -> dict[str, Any]:
        """What some clients have to do next, in plain types.

        `{"round": 1, "exchange": 0, "assign": {"a": "0-3,7"}}`: the round, its exchange, and the blocks of each client;
        `finished` are those of them that need not be sent, as they were before the run was cut off.
        Once all rounds are done, `{"measure": {"a": 3}}`: how many pieces it lacks of what it measures, or nothing.
        """
        if self.finished:
            measure = {client: len(self._final_of(client)) for client in clients if self.settings.own_windows}
            return {"measure": measure} if measure else {}
        now = self.global_model.round
        assign = {client: to_text(now.assigned[client]) for client in clients}
        done = {"finished": to_text(sorted(self.global_model.resumed))} if self.global_model.resumed else {}
        secure = {client: told for client in clients if (told := self.global_model.told(client))}
        said = {"secure": secure} if secure else {}
        return {"round": now.index, "exchange": now.exchange, "assign": assign} | done | said

    def _goes_on(self) -> dict[str, Any]:
        left = {"given_up": sorted(self.given_up())} if self.given_up() else {}
        return left | ({"held": len(self._held)} if self._held else {})

    def receive(self, client: str, update: Any, metadata: dict[str, Any]) -> bool:
        """Fold one message.

        Args:
            client: who sent it.
            update: the payload.
            metadata: what `FedSpaLLMTrainer.get_parameters` gave beside it.

        Returns:
            Whether it was the client's last of the exchange.

        Raises:
            UpdateError: the message is not what was assigned.
        """
        of = read_metadata(metadata, f"client {client}")
        receipt = self.global_model.receive(client, update, of.samples, of.secure)
        self.skeleton.files.release()  # dense weights that masks without values were filled from
        self.on_event(
            {
                "event": "upload",
                "round": self.round,
                "exchange": self.global_model.round.exchange,
                "exchanges": len(self.global_model.exchanges),
                "counted": self._counted(),
                "client": client,
                "host": of.host,
                "message": of.number,
                "messages": of.total,
                "blocks": to_text(sorted(receipt.blocks)),
                "bytes": receipt.nbytes,
                "block_bytes": receipt.block_bytes,
                "seconds": of.seconds,
                "notes": of.notes,
            }
        )
        if of.is_last:
            self.global_model.check_complete(client)
            self._ended.add(client)
        return of.is_last

    def _counted(self) -> list[int] | None:
        """Which exchange is on, and of how many, without those of keys of secure sums; None in one of these."""
        own = [number for number, one in enumerate(self.global_model.exchanges) if not one.speaks]
        now = self.global_model.round.exchange
        return [own.index(now), len(own)] if now in own else None

    def give_up(self, client: str) -> None:
        """Expect nothing more from a client in this round."""
        self.global_model.give_up(client)
        self._ended.discard(client)

    def given_up(self) -> set[str]:
        """Clients that the round goes on without."""
        return self.global_model.round.given_up

    def all_ended(self) -> bool:
        """Whether every client that was not given up has sent its last message of the exchange."""
        return len(self._ended) + len(self.given_up()) == len(self.settings.roster)  # nobody is in both

    def end_exchange(self) -> dict[str, Any]:
        """Close the exchange and begin the next one, maybe of the next round.

        Returns:
            The first piece of what goes down; `{}` if nobody needs it, as after the last exchange of all.
        """
        model, self._ended = self.global_model, set()
        last_round = self.round + 1 == self.settings.rounds
        last = last_round and model.round.exchange + 1 == len(model.exchanges)
        model.end_exchange()
        self._pieces = [] if last else model.changes(self.settings.max_message_bytes)
        first = model.pieces.load(self._pieces[0]) if self._pieces else {}
        model.round.bytes_down += sum(piece.nbytes for piece in self._pieces)
        if not model.next_exchange():
            self._end_round()
        return first

    def _end_round(self) -> None:
        changed = to_text(sorted(self.global_model.round.changed))
        down = self.global_model.round.bytes_down
        self.on_event({"event": "round", "round": self.round, "blocks": changed, "bytes_down": down})
        self.round += 1
        if self.finished:
            self.global_model.end()
        else:
            self._begin()

    def _final_of(self, client: str) -> list[Piece]:
        apart = registry.find(self.settings.algorithm).apart
        key = client if apart else ""
        if key not in self._final:
            self._final[key] = self.global_model.final(client, self.settings.max_message_bytes)
        return self._final[key]

    def final_piece(self, client: str, number: int) -> dict[str, Any]:
        """A piece of what a client lacks of the model that it measures, ready for the wire."""
        piece = self._final_of(client)[number]
        update = self.global_model.pieces.load(piece)
        self._final_bytes[piece.store, number] = update_nbytes(update)
        return update

    def final_name(self, client: str, number: int) -> str:
        """The name of that piece, equal for clients that lack the same."""
        return f"final.{self._final_of(client)[number].store.replace('/', '.')}.{number}"

    def take_losses(self, client: str, losses: Any) -> None:
        """Note what a client has measured on its own text.

        Raises:
            UpdateError: it is not a number of tokens and two sums of losses.
        """
        self.on_event(
            {"event": "measured", "client": client, "bytes_down": self._sent_to(client)}
            | checked_losses(client, losses)
        )

    def _sent_to(self, client: str) -> int:
        return sum(self._final_bytes.get((piece.store, piece.number), 0) for piece in self._final_of(client))

    def aggregate(self, local_models: dict[str, Any], **kwargs: dict[str, Any]) -> dict[str, tuple[dict, dict]]:
        """APPFL's own barrier: one message of every client at once. `FedSpaLLMScheduler` does without it."""
        for client, update in sorted(local_models.items()):
            self.receive(str(client), update, {key: of[client] for key, of in kwargs.items() if client in of})
        changes = self.end_exchange() if self.all_ended() else {}
        return {client: (changes, self.instructions([str(client)])) for client in local_models}

    def save_model(self, folder: str | Path) -> list[MatrixSparsity]:
        """Write the global model as a Hugging Face folder, and read it back.

        Blocks that no client has pruned stay dense.

        Args:
            folder: where to write; made if need be. Files of the same names are replaced.

        Returns:
            The sparsity of each prunable matrix, as it is on disk.

        Raises:
            ConfigError: the algorithm makes no global model.
            ModelError: there is no room, or what was written is not what was meant.
        """
        if registry.find(self.settings.algorithm).apart:
            raise ConfigError(
                f"save_model: algorithm {self.settings.algorithm} makes a model for each client and no global one; "
                "use fedspallm run, which writes them all, or another algorithm"
            )
        return save_model(self.skeleton, self.global_model.done, Path(folder))

    def _begin(self) -> None:
        s = self.settings
        blocks = list(self.skeleton.layout.pruned)
        assigned = draw(s.layer_sampling, s.seed, self.round, s.rounds, s.roster, blocks)
        self.global_model.begin_round(self.round, assigned)
