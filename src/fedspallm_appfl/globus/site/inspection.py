"""The checks of the preflight at a client's site, each independent of the others."""

from typing import Any

import torch

from fedspallm_appfl.devices import choose_devices
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.globus.site.record import Record, require_approval
from fedspallm_appfl.globus.site.site_file import Site, load_site
from fedspallm_appfl.globus.site.worker import in_words, require_consent, same_model, site_store, told
from fedspallm_appfl.globus.store.data_store import GREETING
from fedspallm_appfl.models.storage.checkpoint import config_hash
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.settings.schema import ClientSettings
from fedspallm_appfl.texts.checks import too_few
from fedspallm_appfl.texts.tokenizer import tokenizer_for
from fedspallm_appfl.texts.windows import Cut, windows_of


def inspect_site(request: dict[str, Any]) -> dict[str, Any]:
    """Run the checks of the preflight at a site where this package is installed.

    Returns:
        `{"checks": {name: {"ok": bool, "says": words}}}`.
    """
    checks: dict[str, dict[str, Any]] = {}
    try:
        site = load_site(str(request.get("client", "")))
        record = Record(site, request, "look_around")
        settings = told(request)
        record.settings(settings)
        record.write()
        require_consent(settings, site)
        require_approval(site, settings)
    except FedSpaLLMError as error:
        return {"checks": {"text": {"ok": False, "says": str(error)}}}
    looks = {"GPU": _look_at_gpu, "model": _look_at_model, "text": _look_at_text, "store": _look_at_store}
    for name, look in looks.items():
        try:
            checks[name] = {"ok": True, "says": look(request, settings, site)}
        except Exception as error:  # noqa: BLE001 - shown in the table
            checks[name] = {"ok": False, "says": in_words(error, site)}
    return {"checks": checks}


def _look_at_gpu(request: dict[str, Any], settings: ClientSettings, site: Site) -> str:
    used = [device for device in choose_devices(settings, 0) if device != "cpu"]
    return "; ".join(map(_memory_of, used)) or "none, CPU"


def _memory_of(device: str) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _look_at_model(request: dict[str, Any], settings: ClientSettings, site: Site) -> str:
    folder = same_model(settings.model, site, settings.client_id)
    return f"same as the server's, config {config_hash(folder)}"


def _look_at_text(request: dict[str, Any], settings: ClientSettings, site: Site) -> str:
    client, data = settings.client_id, settings.data
    site.require_text(client, pruners.find(settings.pruner), settings.recovery.rounds > 0)
    if site.text is None:
        return "not needed"
    tokenizer = tokenizer_for(site.model_folder(settings.model.path), site.text)
    cut = Cut(data.length, data.bos, site.field or data.field, data.control_words)
    found = len(windows_of(site.text, cut, tokenizer, data.windows))
    if found < data.windows:
        raise ConfigError(too_few(client, data.windows, data.length, found))
    return f"{data.windows} windows wanted, enough"


def _look_at_store(request: dict[str, Any], settings: ClientSettings, site: Site) -> str:
    """Read what the server has placed, place something for it to read; what was read goes nowhere."""
    store = site_store(request, site)
    if store is None:
        return "not used"
    [name] = request["names"]
    with store:
        store.get(GREETING)
        store.put(name, b"reached")
    return "reached"
