"""Run server and clients in one process, or hand the clients to worker processes (`workers`).

In one process clients take turns message by message. A block is then open on the server only while the clients send it.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.devices import choose_devices, threads
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.rounds.client import forget
from fedspallm_appfl.rounds.participants import client_settings, participants
from fedspallm_appfl.runs import workers
from fedspallm_appfl.runs.absence import described, hand, made, spare, spares, tell
from fedspallm_appfl.runs.placement import describe
from fedspallm_appfl.runs.processes import ALONE, Workers
from fedspallm_appfl.runs.run_dir import AGREED, CLIENTS
from fedspallm_appfl.settings.schema import Config


def run(config: Config, state_dir: Path, on_event: OnEvent, among: Workers = ALONE) -> Any:
    """Run all rounds.

    Args:
        config: the experiment.
        state_dir: folder for the server's packed blocks and sums.
        on_event: called with a dict for each event.
        among: processes that share the clients, if there are several of both.

    Returns:
        The aggregator, with the global model in it.
    """
    if min(among.count, len(participants(config))) > 1:
        return workers.run(config, state_dir, on_event, among)
    try:
        with threads():  # clients set their own
            return _run(config, state_dir, on_event)
    finally:
        forget()


def _run(config: Config, state_dir: Path, on_event: OnEvent) -> Any:
    agents_of = registration.agents()
    server = agents_of.server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    spare(server, config)
    limit = config.client_configs.comm_configs.max_message_bytes
    placed = [(client, choose_devices(client.train_configs, 0)) for client in participants(config)]
    for place in describe(0, placed, torch.get_num_threads()):
        on_event({"event": "place", **vars(place)})
    agreed, kept = state_dir / AGREED, state_dir / CLIENTS
    shutil.rmtree(agreed, ignore_errors=True)  # of an earlier start, maybe not whole
    told = [client_settings(config, client, devices, limit, agreed, kept) for client, devices in placed]
    agents = {settings.client_id: agents_of.client_agent(settings) for settings in told}
    absent: dict[str, dict[str, str]] = dict.fromkeys(server.aggregator.given_up(), {})
    for name, agent in agents.items():
        agent.trainer.on_event = on_event
        first = server.get_parameters(serial_run=True, client_id=name)
        agent.trainer.follow(first[1])
        for number in range(first[1].get("held", 0)):
            hand(agent, server.get_parameters(init_model=False, held=number)[0], absent, spares(config))
    on_event({"event": "ready"})
    while not server.training_finished():
        for name, (update, instructions) in _exchange(server, agents, absent, spares(config)).items():
            tell(agents[name], update, instructions)
            for piece in range(1, update.get("pieces", 1)):
                tell(agents[name], *server.get_parameters(init_model=False, piece=piece))
            if instructions.get("exchange") == 0:
                absent.pop(name, None)
    _measure(server, agents, absent)
    return server.aggregator


def _measure(server: Any, agents: dict[str, Any], absent: Mapping[str, Any]) -> None:
    """Let each client measure the finished model on its own text."""
    for name, agent in agents.items():
        if agent.trainer.lacking is None or name in absent:
            continue
        client = agent.trainer.client
        for number in range(agent.trainer.lacking):
            client.final.take(server.get_parameters(init_model=False, final=number, client_id=name)[0])
        server.get_parameters(init_model=False, losses={name: client.measure()})


def _exchange(
    server: Any, agents: dict[str, Any], absent: dict[str, dict[str, str]], sparing: bool
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Send all messages of one exchange; returns the server's answer to each client's last one."""

    def leave_out(name: str) -> Future:
        waiting: Future = server.scheduler.leave_out(name, absent[name], waits=True)
        return waiting

    answers = {name: leave_out(name) for name in agents if name in absent}
    ended = False
    while not ended:
        ended = True
        for name in [name for name in agents if name not in absent]:
            message = made(agents[name], absent, sparing)
            if message is None:
                answers[name] = leave_out(name)
                continue
            update, metadata = message
            ended = ended and metadata["_chunk_idx"] + 1 == metadata["_total_chunks"]
            try:
                answers[name] = server.global_update(name, update, blocking=False, **metadata)
            except UpdateError as error:
                if not sparing:
                    raise
                absent[name] = described(error)
                answers[name] = leave_out(name)
    return {name: future.result() for name, future in answers.items()}
