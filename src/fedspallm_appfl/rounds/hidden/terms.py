"""What all clients of secure sums must have alike, or the server could take the others' parts out of a sum.

A server that lies could tell the others settings from which their parts follow without their text (`pruner: magnitude`), or
with which they hardly count (a window each), and what is left of the sum is one client's upload. So the keys that clients
advertise carry a hash of the settings, and none takes keys made for others. What the server sends down is part of the keys
of masks (`view`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.settings.schema import ClientSettings, TrainConfigs, plain

OWN = {  # of one client, or of the place where it runs
    *("client_id", "data", "device", "devices", "threads", "trainer", "comm", "identity", "agreed", "secrets"),
    *("checkpoints", "checkpoint_every", "resource_share", "layer_sampling"),
}
OWN_OF_MODEL = {"path", "trust_remote_code"}


def alike(settings: TrainConfigs) -> dict[str, Any]:
    """Settings that all clients share, in plain types; of a `ClientSettings` also the tokens of each."""
    told: dict[str, Any] = {name: value for name, value in plain(settings).items() if name not in OWN}
    if "model" in told:
        told["model"] = {name: value for name, value in told["model"].items() if name not in OWN_OF_MODEL}
    return told


def terms_of(settings: ClientSettings) -> str:
    """SHA-256 of them, in hexadecimal digits.

    Raises:
        SecureSumError: the server has told the others another number of this client's tokens; or they are more than half of
            all, so that a sum hides little of it.
    """
    mine, told = settings.data.windows * settings.data.length, settings.tokens
    sees_text = pruners.find(settings.pruner).needs is not None or settings.recovery.rounds > 0
    if sees_text and told.get(settings.client_id) != mine:
        raise SecureSumError(
            f"client {settings.client_id} has {mine} tokens, and the server tells of {told.get(settings.client_id)}; all "
            "clients have to know the tokens of each"
        )
    if sees_text and (problem := outweighs(told)):
        raise SecureSumError(problem)
    return hashlib.sha256(json.dumps(alike(settings), sort_keys=True).encode()).hexdigest()


def outweighs(tokens: Mapping[str, int]) -> str:
    """What is wrong with the numbers of tokens: no client may have more than all others together. Empty if nothing."""
    if not tokens:
        return ""
    name, most = max(tokens.items(), key=lambda one: one[1])
    if 2 * most <= sum(tokens.values()):
        return ""
    return (
        f"client {name} has {most} of {sum(tokens.values())} tokens, and a sum hides nobody who has more than half of "
        "them; give it fewer windows, or the others more"
    )
