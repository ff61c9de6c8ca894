"""What all sides of a round's secure sums agree on: who takes part, and the number of each unit's sum."""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedspallm_appfl.aggregation.layer_sampling import from_text, to_text
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import Exchange, Groups
from fedspallm_appfl.errors import SecureSumError, first_line, quoted, shortened
from fedspallm_appfl.secure.exchange import Exchange as Session
from fedspallm_appfl.secure.identity import Roster
from fedspallm_appfl.settings.schema import ClientSettings, ServerSettings

Place = tuple[int, int, str]  # exchange of the round, block, unit
UNIT = "words"  # the one unit of each message of a session


def numbered(
    exchanges: Sequence[Exchange], units_of: Callable[[Exchange], Mapping[int, Iterable[str]]]
) -> dict[Place, int]:
    """The number of each hidden unit in a round.

    Args:
        exchanges: of a round.
        units_of: exchange -> for each block its units.
    """
    hidden = ((number, units_of(one)) for number, one in enumerate(exchanges) if one.hidden)
    places = [(number, block, unit) for number, units in hidden for block in units for unit in units[block]]
    return {place: index for index, place in enumerate(places)}


def summed_in(exchanges: Sequence[Exchange], number: int) -> int:
    """The exchange whose sums are confirmed or opened in another one."""
    return max(before for before in range(number) if exchanges[before].hidden)


def roster_of(settings: ClientSettings | ServerSettings) -> Roster | None:
    """The clients of secure sums, with their public keys where they have identities; None without secure sums.

    Raises:
        SecureSumError: there are fewer than three clients.
        ConfigError: keys are of other clients.
    """
    return Roster(tuple(settings.roster), settings.public_keys) if settings.secure_sums else None


def exchanges_of(settings: ClientSettings | ServerSettings, groups: Groups) -> tuple[Exchange, ...]:
    """The exchanges of the last round, as client and server were told.

    Raises:
        SecureSumError: as `roster_of`; or a model that was pruned before would be recovered, which is not hidden.
        ConfigError: as `roster_of`.
    """
    roster, algorithm = roster_of(settings), registry.find(settings.algorithm)
    if roster and settings.recovery.model:
        raise SecureSumError(
            "secure sums do not go with recovery.model: what is sent would not be hidden; nothing is sent"
        )
    hidden, signed = (len(roster.clients), bool(roster.keys)) if roster else (0, False)
    return algorithm.exchanges(groups, settings.gram, settings.recovery, hidden, signed)


def session(run: str, round_index: int, messages: int, roster: Roster, terms: str = "") -> Session:
    """Keys and shares of a round: each unit is a message, so that a client counts unit by unit."""
    return Session(run, round_index, 0, messages, roster, terms=terms)


def to_json(parts: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes by name, in plain types."""
    return {name: base64.b64encode(part).decode() for name, part in parts.items()}


def from_json(parts: Mapping[str, str], what: str) -> dict[str, bytes]:
    """What `to_json` was given.

    Raises:
        SecureSumError: it is something else; begins with "refused", then `what`.
    """
    try:
        return {name: base64.b64decode(part, validate=True) for name, part in parts.items()}
    except (binascii.Error, ValueError, TypeError, AttributeError) as error:
        raise SecureSumError(f"refused {what}: it is bytes by name in base64, got {quoted(parts)}") from error


def said(parts: Mapping[str, bytes]) -> str:
    """What a client says in an exchange of keys, as its metadata carry it."""
    return json.dumps(to_json(parts))


def heard(text: str, what: str) -> dict[str, bytes]:
    """What `said` was given; from outside.

    Raises:
        SecureSumError: it is something else.
    """
    try:
        parts = json.loads(text, object_pairs_hook=_once)
    except (ValueError, TypeError, RecursionError) as error:
        raise SecureSumError(f"refused {what}: it is JSON that names each part once, got {quoted(text)}") from error
    return from_json(parts, what)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def listed(survivors: Mapping[int, Sequence[str]]) -> list[list[Any]]:
    """Survivors by number of the unit, in short and in plain types: [names, numbers whose survivors they are]."""
    together: dict[tuple[str, ...], list[int]] = {}
    for number, names in survivors.items():
        together.setdefault(tuple(names), []).append(number)
    return [[list(names), to_text(numbers)] for names, numbers in together.items()]


def unlisted(groups: Any, units: int, client: str) -> dict[int, list[str]]:
    """What `listed` was given; from outside.

    Args:
        groups: what the server says.
        units: of the round; their numbers are below it.
        client: whom it is said to.

    Raises:
        SecureSumError: it is something else.
    """
    survivors: dict[int, list[str]] = {}
    try:
        for names, text in groups:
            numbers = from_text(text, units)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"names are a list of texts, got {quoted(names)}")
            if not survivors.keys().isdisjoint(numbers):
                raise ValueError(f"each unit is in one group, got {quoted(text)} once more")
            survivors |= dict.fromkeys(numbers, names)
    except (TypeError, ValueError, AttributeError) as error:
        why = shortened(first_line(error))
        raise SecureSumError(
            f"refused the survivors that the server names to client {client}: they are [names, units] with units below "
            f"{units}, got {quoted(groups)} ({why}); run the server with the same version of this package"
        ) from error
    return survivors
