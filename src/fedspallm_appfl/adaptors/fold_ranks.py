"""MPI ranks that fold for the server (`server_configs.fold_ranks`).

Every matrix belongs to one of them. A client sends each rank its matrices, and the server only what it says of itself. The
rank checks them, adds them up and tells the server what came. When the server knows that nobody owes a matrix any more, it
lets the rank close it and gets what was made. A matrix is added up in one place, as without these ranks; the bits do not
change.

Fold ranks read what the server has made, and write sums that stay, in the run directory: all of them have to see it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from appfl.comm.mpi.serializer import byte_to_request
from mpi4py import MPI

from fedspallm_appfl.adaptors.mpi_communicators import SERVER, receive, receiver, tag_of, wait
from fedspallm_appfl.adaptors.parts import Note
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.rounds.folds.context import Stores
from fedspallm_appfl.rounds.folds.intake import Intake, Receipt, Standing
from fedspallm_appfl.rounds.folds.of_model import context_of
from fedspallm_appfl.rounds.folds.registry import folds
from fedspallm_appfl.rounds.hidden.places import exchanges_of
from fedspallm_appfl.settings.schema import ServerSettings
from fedspallm_appfl.wire.as_bytes import Inbox
from fedspallm_appfl.wire.messages import Unit
from fedspallm_appfl.wire.metadata import read_metadata


class FarIntake:
    """Stands at the server for what fold ranks take in."""

    def __init__(self, comm: Any, owner: Mapping[Unit, int], ranks: int) -> None:
        """Tell nothing yet.

        Args:
            comm: MPI's world.
            owner: the fold rank of each matrix.
            ranks: how many there are, some of them maybe without a matrix.
        """
        self._comm, self._owner = comm, owner
        self._ranks = list(range(1, 1 + ranks))

    def stand(self, standing: Standing) -> None:
        """Tell all of them where the run stands."""
        self._tell(self._ranks, ("stand", standing))

    def close(self, block: int, unit: str) -> tuple[Stores, dict[str, int]]:
        """Let its rank close a unit, and wait for what it makes."""
        rank = self._owner[block, unit]
        self._tell([rank], ("close", block, unit))
        made: tuple[Stores, dict[str, int]] = self._comm.recv(source=rank, tag=tag_of(self._comm, "made"))
        return made

    def end(self) -> None:
        """Let all of them go home."""
        self._tell(self._ranks, ("end",))

    def _tell(self, ranks: list[int], command: tuple[Any, ...]) -> None:
        for rank in ranks:
            self._comm.send(command, dest=rank, tag=tag_of(self._comm, "command"))


class FoldRank:
    """One rank that folds."""

    def __init__(self, comm: Any, settings: ServerSettings) -> None:
        """Open the model.

        Args:
            comm: MPI's world.
            settings: what the aggregator is told, with the folder of its state.
        """
        self._comm, self._inbox = comm, Inbox()
        self._skeleton = Skeleton.of(settings)
        context = context_of(settings, self._skeleton, Path(settings.state_dir or ""))
        exchanges = exchanges_of(settings, context.groups)
        self._events: list[dict[str, Any]] = []
        self._intake = Intake(context, exchanges, folds(context, exchanges), self._events.append)
        self._sent: list[Any] = []  # notes on their way: the server may wait for something else from here
        self._at_work = True

    def serve(self) -> None:
        """Take in what clients send, and do what the server says, until it lets this rank go."""
        status = MPI.Status()
        while self._at_work:
            wait(self._comm, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            if status.Get_source() == SERVER:
                self._obey()
            else:
                self._take(status)
        for sent in self._sent:
            sent.wait()

    def _obey(self) -> None:
        """Do the next thing that the server says."""
        command, *words = self._comm.recv(source=SERVER, tag=tag_of(self._comm, "command"))
        if command == "stand":
            self._intake.stand(*words)
        elif command == "close":
            self._comm.send(self._intake.close(*words), dest=SERVER, tag=tag_of(self._comm, "made"))
        else:
            self._at_work = False

    def _take(self, status: MPI.Status) -> None:
        """Take in parts of the messages of a rank's clients."""
        rank = status.Get_source()
        request = byte_to_request(receive(self._comm, status))
        told = yaml.safe_load(request.meta_data)
        updates = self._inbox.receive(request.payload, receiver(self._comm, rank))
        while self._is_behind(told["_now"]):  # MPI keeps no order between what the server says and what clients send
            self._obey()
        receipts = {client: self._receipt(client, update, told[client]) for client, update in updates.items()}
        note = Note(rank, receipts, list(self._events))
        self._events.clear()
        self._sent = [sent for sent in self._sent if not sent.test()[0]]
        self._sent.append(self._comm.isend(note, dest=SERVER, tag=tag_of(self._comm, "note")))

    def _receipt(self, client: str, update: Any, metadata: Any) -> Receipt:
        """What was added up, or why it was refused."""
        try:
            return self._intake.take(client, update, read_metadata(metadata, f"client {client}").samples)
        except UpdateError as error:
            return Receipt(refused=str(error))
        finally:
            self._skeleton.files.release()  # dense weights that masks without values were filled from

    def _is_behind(self, now: list[int]) -> bool:
        """Whether the server has told clients of an exchange that this rank has not heard of yet."""
        standing = self._intake.standing
        return now > [standing.round_index, standing.exchange]
