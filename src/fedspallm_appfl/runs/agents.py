"""APPFL's agents, imported when they are first needed."""

from typing import Any


def load() -> Any:
    """The module that makes the agents of clients and server; the first call imports APPFL, which takes a while."""
    from fedspallm_appfl.adaptors import registration

    registration.register()
    from fedspallm_appfl.adaptors import agents

    registration.freeze()
    return agents
