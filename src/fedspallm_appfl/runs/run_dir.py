"""The run directory: what may be written where, for one run at a time.

It holds `config.yaml` (resolved), `metrics.jsonl` (an event a line), `model/` (a Hugging Face folder), `manifest.json`
(sparsity of every matrix, read back from disk), `report.html` and `report.md`; with `standalone` a folder for each client
in `models/`, with `gram` also `statistics/`, and `further/` once `fedspallm prune` made models of them; while one of the
two works also `state/`, packed blocks and the server's sums, and a lock.
"""

import copy
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from fedspallm_appfl.errors import ConfigError, first_line, quoted, shortened
from fedspallm_appfl.settings import yaml_text
from fedspallm_appfl.settings.paths import is_folder
from fedspallm_appfl.settings.reading import to_yaml
from fedspallm_appfl.settings.schema import Config, Paths
from fedspallm_appfl.wire.durable import write_text

FREE = {
    "run_dir",
    "workers",
    "server_configs.fold_ranks",
}  # keys that may differ where a run goes on: no bit depends on them
MARK = "metrics.jsonl"  # a run writes this first: never overwrite a folder without it
LOCK = ".lock"
STATE = "state"
SCRATCH = "scratch"  # of `fedspallm prune`
CLIENTS = "clients"  # in it, of clients that see it
AGREED = "agreed"  # in it, what was sent down to clients
CONFIG = "config.yaml"
# What runs write, in the order of removal: the mark goes last, so interrupted clearing can be repeated.
OWN = (
    CONFIG,
    "report.md",
    "report.html",
    "manifest.json",
    "model",
    "models",
    "statistics",
    "further",
    "tracking",
    STATE,
    SCRATCH,
    MARK,
)


def problem(config: Config, overwrite: bool, resume: bool = False) -> str | None:
    """Why the run directory cannot be used, or None."""
    folder = Path(config.run_dir).expanduser()
    try:
        if folder.exists() and not folder.is_dir():
            return f"run_dir: {folder} is a file; name a folder"
        used = _inputs_inside(config, folder)
        if used:
            return f"run_dir: {folder} holds {used}, which a run there would replace; name another folder"
        if not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir()):  # a killed run may leave a lock
            return None
        if not (folder / MARK).is_file():
            return f"run_dir: {folder} is not empty and holds no earlier run (no {MARK}); name another folder"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return f"run_dir: {shortened(folder)} cannot be used: {why}; name another folder"
    if resume:
        return _changed(config, folder) if is_cut_off(folder) or finished(folder) else None
    if not overwrite:
        go_on = "--resume to go on with it, " if is_cut_off(folder) else ""
        return (
            f"run_dir: {folder} exists and is not empty; give another run_dir, {go_on}or --overwrite (overwrite=True in "
            "Python) to replace it"
        )
    return None


def tidy(folder: Path) -> None:
    """Remove what a run that was done to its end, and killed then, has left of its state.

    Raises:
        ConfigError: it cannot be removed.
    """
    _clear(folder, (STATE,))


def _clear(folder: Path, names: Iterable[str]) -> None:
    try:
        for name in names:
            _remove(folder / name)
    except OSError as error:
        raise ConfigError(f"run_dir: earlier results in {folder} cannot be removed: {error}") from error


def finished(folder: Path) -> bool:
    """Whether a run was done there to its end: the report comes last but for the clearing of its state."""
    return (folder / "report.md").is_file()


def is_cut_off(folder: Path) -> bool:
    """Whether a run was cut off there and can go on."""
    return (folder / STATE).is_dir() and (folder / MARK).is_file() and not finished(folder)


def at_work(folder: Path) -> bool:
    """Whether a run or `fedspallm prune` holds the lock of a run directory."""
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or whoever locks it says what is wrong
        return False
    return False


def _changed(config: Config, folder: Path) -> str | None:
    """What differs from the configuration that a run was begun with."""
    try:
        before = yaml_text.flat(yaml_text.load((folder / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = shortened(first_line(error))
        return f"run_dir: {folder / CONFIG} is damaged: {why}; put it right, or give --overwrite to begin anew"
    now = yaml_text.flat(yaml_text.load(_resolved(config)))
    differ = [key for key in sorted((before.keys() | now.keys()) - FREE) if before.get(key) != now.get(key)]
    if not differ:
        return None
    keys = ", ".join(f"{key} ({quoted(before.get(key))} before, now {quoted(now.get(key))})" for key in differ)
    return (
        f"run_dir: {folder} was begun with another configuration; it goes on with the same only: {keys}; use "
        f"fedspallm resume {folder}, or --overwrite to begin anew"
    )


def _resolved(config: Config) -> str:
    return to_yaml(_with_whole_paths(config))


def _inputs_inside(config: Config, folder: Path) -> str | None:
    """An input of the run that lies in a place where the run will write."""
    texts = [client.data.text for client in config.clients] + list(config.evaluation.texts.values())
    texts.append(config.allocation.text)
    models = {config.model.path: "the dense model of model.path"}
    models |= {config.recovery.model: "the pruned model of recovery.model"} if config.recovery.model else {}
    inputs = models | {path: f"the text {path}" for text in texts for path in _as_list(text)}
    for path, what in inputs.items():
        place = Path(path).expanduser().resolve()
        if any(place.is_relative_to((folder / name).resolve()) for name in OWN):
            return what
    for path, what in models.items():
        if Path(path).expanduser().resolve() == folder.resolve():
            return what
    return None


def _with_whole_paths(config: Config) -> Config:
    """The same configuration, valid in any working directory."""
    whole = copy.deepcopy(config)
    if is_folder(Path(config.model.path).expanduser()):
        whole.model.path = _whole(config.model.path)
    whole.recovery.model = config.recovery.model and _whole(config.recovery.model)
    for client in whole.clients:
        client.data.text = client.data.text and _whole(client.data.text)
        client.identity = client.identity and _whole(client.identity)
    whole.server_configs.roster = config.server_configs.roster and _whole(config.server_configs.roster)
    whole.plugins = [_whole(plugin) if plugin.endswith(".py") else plugin for plugin in config.plugins]
    whole.allocation.text = config.allocation.text and _whole(config.allocation.text)
    whole.evaluation.texts = {name: _whole(text) for name, text in config.evaluation.texts.items()}
    return whole


def _whole(paths: Any) -> Any:
    if isinstance(paths, list):
        return [_whole(path) for path in paths]
    return str(Path(paths).expanduser().absolute())


def _as_list(paths: Paths | None) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or [])


@contextmanager
def claimed(config: Config, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """Create the folder, or clear earlier results from it if allowed, and lock it against other runs.

    Args:
        config: the experiment.
        overwrite: replace earlier results.
        resume: leave what is there of a run that was cut off.

    Raises:
        ConfigError: it must not be overwritten, cannot be written, or another run uses it.
    """
    wrong = problem(config, overwrite, resume)
    if wrong:
        raise ConfigError(wrong)
    folder = Path(config.run_dir).expanduser()
    with locked(folder, "name another folder"):
        if resume and finished(folder):
            raise ConfigError(f"run_dir: the run in {folder} is finished; there is nothing to go on with")
        if not (resume and is_cut_off(folder)):
            _clear(folder, OWN)
            write_text(folder / MARK, "")
            write_text(folder / CONFIG, _resolved(config))
        yield folder


@contextmanager
def locked(folder: Path, hint: str) -> Iterator[None]:
    """Lock a run directory against other runs and `fedspallm prune`; it is created if needed.

    Args:
        folder: the run directory.
        hint: what to do if it is in use.

    Raises:
        ConfigError: it is in use or cannot be written, or its file system has no locks.
    """
    lock_file = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("w")
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} cannot be written: {error}") from error
    with lock:
        if not _is_ours(lock, lock_file):
            raise ConfigError(f"run_dir: another run or fedspallm prune is using {folder}; {hint}")
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def _is_ours(lock: IO[str], lock_file: Path) -> bool:
    """Take the lock; it is useless if the previous holder has removed the file meanwhile.

    Raises:
        ConfigError: the system cannot lock; the file stays, because another process may hold it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), lock_file.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise ConfigError(
            f"run_dir: {lock_file.parent} cannot be locked: {error}; name a folder on a file system with flock, such as a "
            "local disk, or have this one mounted with it (Lustre: -o flock; NFS: a lock daemon that runs)"
        ) from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Create an empty `scratch/` in a locked run directory, and remove it at the end; a run may still need its `state/`."""
    state = folder / SCRATCH
    _remove(state)
    state.mkdir()
    try:
        yield state
    finally:
        _remove(state)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
