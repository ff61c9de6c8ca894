"""Paths that people give: a name that is too long for the system, or not open to this user, is that of nothing here."""

from pathlib import Path


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    try:
        return path.is_dir()
    except OSError:
        return False


def model_name(folder: Path) -> str:
    """What people call the model in a folder: its name, or where that is just `model` the one of the folder around it."""
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    try:
        return path.is_file()
    except OSError:
        return False
