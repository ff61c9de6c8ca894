"""APPFL aggregator: hands uploads to the global model and gives out the round's assignments."""

import json
import tempfile
from pathlib import Path
from typing import Any

from appfl.algorithm.aggregator import BaseAggregator
from omegaconf import DictConfig, OmegaConf

from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.global_model import Aggregation, GlobalModel, Piece
from fedspallm_appfl.layer_sampling import draw, to_text
from fedspallm_appfl.lazy_model import Skeleton
from fedspallm_appfl.payload import block_nbytes
from fedspallm_appfl.sparsity import parse_target


class FedSpaLLMAggregator(BaseAggregator):
    """l0-norm aggregation and mask expansion behind APPFL's interface.

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
            aggregator_configs: as `agents.server_agent_config` makes them.
            logger: APPFL's logger, not used.
            **kwargs: `aggregator_config`, the name that APPFL gives to the argument in another place.
        """
        configs = aggregator_configs if aggregator_configs is not None else kwargs["aggregator_config"]
        self.settings: dict[str, Any] = OmegaConf.to_container(configs, resolve=True)  # type: ignore[assignment]
        self.on_event: OnEvent = ignore
        self.skeleton = Skeleton(self.settings["model"]["path"], self.settings["model"]["blocks"])
        self._own_folder = None if self.settings.get("state_dir") else tempfile.TemporaryDirectory(prefix="fedspallm-")
        folder = self._own_folder.name if self._own_folder else self.settings["state_dir"]
        aggregation = Aggregation(
            target=parse_target(self.settings["sparsity"]),
            weights=self.settings["weights"],
            fold=self.settings["fold"],
            expansion=self.settings["expansion"],
            comparisons=tuple(self.settings["comparisons"]),
            mask_only=frozenset(self.settings.get("mask_only", ())),
            compression=self.settings.get("compression") == "zstd",
        )
        self.global_model = GlobalModel(
            self.skeleton.layout,
            self.skeleton.stored_dtype,
            aggregation,
            Path(folder),
            choose_device(self.settings["device"], 0),
            lambda event: self.on_event(event),
            self.skeleton.dense_matrix,
        )
        self.round = 0
        self._ended: set[str] = set()
        self._given_up: set[str] = set()
        self._pieces: list[Piece] = []
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= self.settings["rounds"]

    def get_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a client gets outside the exchange of messages.

        Before its first message its assignment, without weights, since it holds the dense model; with `piece=i` the i-th
        piece of the last round's update.
        """
        if "piece" in kwargs:
            return self.global_model.load_piece(self._pieces[kwargs["piece"]]), {}
        asked = kwargs.get("_client_ids") or [kwargs.get("client_id")]
        known = [client for client in map(str, asked) if client in self.settings["roster"]]
        return {}, self.instructions(known or list(self.settings["roster"]))

    def instructions(self, clients: list[str]) -> dict[str, Any]:
        """What some clients have to do next, in plain types; nothing once all rounds are done.

        `{"round": 1, "assign": {"a": "0-3,7"}}`: the round, and the blocks of each client.
        """
        if self.finished:
            return {}
        assigned = self.global_model.round.assigned
        assign = {client: to_text(assigned[client]) for client in clients}
        return {"round": self.round, "assign": assign}

    def receive(self, client: str, update: Any, metadata: dict[str, Any]) -> bool:
        """Fold one message.

        Args:
            client: who sent it.
            update: the payload.
            metadata: what `FedSpaLLMTrainer.get_parameters` gave beside it.

        Returns:
            Whether it was the client's last of the round.

        Raises:
            UpdateError: the message is not what was assigned.
        """
        received = self.global_model.receive(client, update, int(metadata["samples"]))
        self.skeleton.files.release()  # dense weights that masks without values were filled from
        self.on_event(
            {
                "event": "upload",
                "round": self.round,
                "client": client,
                "host": str(metadata.get("host", "")),
                "message": int(metadata["_chunk_idx"]),
                "messages": int(metadata["_total_chunks"]),
                "blocks": to_text(sorted(map(int, update["blocks"]))) if update else "",
                "bytes": received,
                "block_bytes": block_nbytes(update),
                "seconds": float(metadata["seconds"]),
                "notes": json.loads(metadata["notes"]) if metadata.get("notes") else {},
            }
        )
        last = int(metadata["_chunk_idx"]) == int(metadata["_total_chunks"]) - 1
        if last:
            self.global_model.check_complete(client)
            self._ended.add(client)
        return last

    def give_up(self, client: str) -> None:
        """Expect nothing more from a client in this round."""
        self.global_model.give_up(client)
        self._ended.discard(client)
        self._given_up.add(client)

    def all_ended(self) -> bool:
        """Whether every client that was not given up has sent its last message of the round."""
        return self._ended | self._given_up == set(self.settings["roster"])

    def end_round(self) -> dict[str, Any]:
        """Close the round and begin the next; returns the first piece of the update, `{}` after the last round."""
        changed = to_text(sorted(self.global_model.round.changed))
        self.round += 1
        self._ended, self._given_up = set(), set()
        self._pieces = [] if self.finished else self.global_model.changes(self.settings["max_message_bytes"])
        first = self.global_model.load_piece(self._pieces[0]) if self._pieces else {}
        sent = sum(piece.nbytes for piece in self._pieces)
        self.on_event({"event": "round", "round": self.round - 1, "blocks": changed, "bytes_down": sent})
        if not self.finished:
            self._begin()
        return first

    def aggregate(self, local_models: dict[str, Any], **kwargs: dict[str, Any]) -> dict[str, tuple[dict, dict]]:
        """APPFL's own barrier: one message of every client at once. `FedSpaLLMScheduler` does without it."""
        for client, update in sorted(local_models.items()):
            self.receive(str(client), update, {key: of[client] for key, of in kwargs.items() if client in of})
        changes = self.end_round() if self.all_ended() else {}
        return {client: (changes, self.instructions([str(client)])) for client in local_models}

    def _begin(self) -> None:
        s = self.settings
        blocks = len(self.skeleton.layout.blocks)
        assigned = draw(s["layer_sampling"], s["seed"], self.round, s["rounds"], s["roster"], blocks)
        self.global_model.begin_round(self.round, assigned)
