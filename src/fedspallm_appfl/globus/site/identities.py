"""With whom a site takes part in secure sums: the clients of its own roster, each with the key that stands there.

The server tells who takes part, and which keys its own roster has. Both have to be what the site's roster says, which never
comes from the server.
"""

from pathlib import Path

import yaml

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.globus.site.site_file import Site, SiteFile
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.settings.schema import ClientSettings


def require_roster(settings: ClientSettings, site: Site) -> None:
    """Refuse a task whose sums this site does not take part in.

    Args:
        settings: what the server tells.
        site: its own.

    Raises:
        ConfigError: sums are not hidden where the site file wants them to be, or the rosters differ; shows no path.
    """
    who = f"client {settings.client_id}"
    if site.only_secure_sums and not (settings.secure_sums and algorithms.find(settings.algorithm).adds_up):
        raise ConfigError(
            f"{who}: this site sends nothing but parts of secure sums; set server_configs.secure_sums, with algorithm "
            "gram, consensus or fedprllm"
        )
    if not settings.secure_sums:
        return
    if (site.roster is None or site.identity is None) and (
        site.only_secure_sums or settings.public_keys or site.roster or site.identity
    ):
        raise ConfigError(
            f"{who}: identities need `roster` in the site file, and `identity` under clients: {settings.client_id}:, and "
            "one of them is not there; add it, or let all sides go without"
        )
    if site.roster is not None:
        _require_same(settings, _own(settings.client_id, site), who)


def _require_same(settings: ClientSettings, own: Roster, who: str) -> None:
    if {*settings.roster} != {*own.clients}:
        raise ConfigError(
            f"{who}: the roster of this site has {', '.join(own.clients)}, and the server names "
            f"{', '.join(sorted(settings.roster))}; let `clients` of the server be those that the sites agreed on"
        )
    if settings.public_keys != own.keys:
        told = settings.public_keys
        other = sorted(client for client in own.clients if told.get(client) != own.keys[client])
        raise ConfigError(
            f"{who}: the server has other keys than the roster of this site, of {', '.join(other)}; give "
            "server_configs.roster the file that the sites agreed on"
        )


def _own(client: str, site: Site) -> Roster:
    """This site's roster, in which its identity stands."""
    try:
        roster, identity = Roster.read(Path(str(site.roster))), Identity.load(Path(str(site.identity)))
    except FedSpaLLMError as error:  # its words name a path
        raise ConfigError(
            f"client {client}: the roster or the identity that the site file names cannot be used; at the site, fedspallm "
            "site SITE.yaml says why"
        ) from error
    if roster.keys.get(client) != identity.public:
        raise ConfigError(
            f"client {client}: the roster of this site has another key of it than its identity; give the sites the line "
            "that fedspallm site SITE.yaml --keys prints"
        )
    return roster


def public_keys(site: Site) -> dict[str, str]:
    """Client -> public key, of this site's roster; nothing without one."""
    return dict(Roster.read(Path(site.roster)).keys) if site.roster else {}


def make_keys(site_file: SiteFile) -> str:
    """Make the identities that a site file names and that are not there; their lines for the roster.

    Raises:
        ConfigError: a client has no `identity`, or one cannot be read or written.
    """
    lines = {}
    for client in site_file.clients:
        named = site_file.of(client).identity
        if named is None:
            raise ConfigError(f"client {client}: name a file for its secret key, e.g. identity: {client}.key")
        try:
            if not Path(named).exists():
                Identity.make().save(Path(named))
        except OSError as error:
            raise ConfigError(f"client {client}: the identity {named} cannot be written: {error.strerror}") from error
        lines[client] = Identity.load(Path(named)).public
    return yaml.safe_dump(lines, sort_keys=False, width=1000).rstrip()


def problems(site_file: SiteFile) -> list[str]:
    """What is wrong with roster and identities, for users who may see paths."""
    found, shared = [], site_file.shared
    roster = None
    try:
        roster = Roster.read(Path(shared.roster)) if shared.roster else None
    except FedSpaLLMError as error:
        found.append(str(error))
    if shared.only_secure_sums and shared.roster is None:
        found.append("`secure_sums: required` needs `roster`, a file of client -> public key")
    for client in site_file.clients:
        try:
            named = site_file.of(client).identity
        except FedSpaLLMError:
            continue  # the check of texts says why
        try:
            if named and roster and roster.keys.get(client) != Identity.load(Path(named)).public:
                found.append(f"client {client}: {shared.roster} has another key of it than {named}, or none")
            elif shared.roster and named is None:
                found.append(f"client {client}: it has no `identity`, and the roster wants one; add it, then --keys")
        except FedSpaLLMError as error:
            found.append(f"client {client}: {error}")
    return found


def told(site_file: SiteFile) -> list[str]:
    """What sites compare of their rosters, and whose identities fit this one; nothing without a roster that can be read."""
    try:
        roster = Roster.read(Path(site_file.shared.roster)) if site_file.shared.roster else None
    except FedSpaLLMError:
        return []  # `problems` says why
    if roster is None:
        return []
    fit = [client for client in site_file.clients if _fits(site_file, client, roster)]
    return [
        f"fingerprint of the roster, to be compared with the other sites: {roster.digest.hex()}",
        f"identities that fit the roster: {', '.join(fit) or 'none'}",
    ]


def _fits(site_file: SiteFile, client: str, roster: Roster) -> bool:
    try:
        named = site_file.of(client).identity
        return named is not None and Identity.load(Path(named)).public == roster.keys.get(client)
    except FedSpaLLMError:
        return False
