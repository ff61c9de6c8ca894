"""Code that a model folder brings along (`auto_map` in config.json): it runs only where its folder was allowed to.

Nobody is ever asked on a terminal. The set is that of the process, because what Python has imported stays imported; a
configuration allows its own model (`model.trust_remote_code`), and at a site over Globus Compute only the site file does.
"""

import json
from pathlib import Path

_allowed: set[Path] = set()


def allow(folder: Path) -> None:
    """Let the code of a model folder run in this process."""
    _allowed.add(folder.resolve())


def allowed(folder: Path) -> bool:
    """Whether the code of a folder may run."""
    return folder.resolve() in _allowed


def refusal(folder: Path) -> str | None:
    """What to say where a folder cannot be used without code of its own that must not run; None if that is not why."""
    named = [name for name in ("config.json", "tokenizer_config.json") if "auto_map" in _content(folder / name)]
    if allowed(folder) or not named:
        return None
    return (
        f"{folder} needs Python code of its own (auto_map in {named[0]}), which is not run; read that code and set "
        "model.trust_remote_code to true (--trust-remote-code for evaluate, trust_remote_code in the site file over Globus "
        "Compute), or take a model that transformers knows"
    )


def _content(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # said where the file is needed
        return {}
    return found if isinstance(found, dict) else {}
