"""The files of a model folder beside its weights, and files that are whole or not there at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pth", ".pt")
CARD, BASE_CARD = "README.md", "README.base.md"  # the card of the base model makes room for that of the pruned one
INDEX_ENDINGS = (".bin.index.json", ".safetensors.index.json")


def companions(source: Path, inside: str = "") -> Iterator[tuple[str, Path]]:
    """What lies beside the weights and in subfolders, as (name in the folder, file); hidden files are left out.

    A link to a folder is not entered, and a link to a file is followed only where it stays within the model, so that
    nothing else of this machine lands in a folder that may be passed on.
    """
    cached = source.parent.name == "snapshots"  # of the hub's cache, where files are links to `blobs`
    home = (source.parents[1] if cached else source).resolve()
    for file in sorted((source / inside).iterdir()):
        name = f"{inside}/{file.name}" if inside else file.name
        about_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(INDEX_ENDINGS)
        if file.name.startswith((".", "__pycache__")) or about_weights:
            continue
        if file.is_dir() and not file.is_symlink():
            yield from companions(source, name)
        elif file.is_file() and file.resolve().is_relative_to(home):
            yield name, file


@contextmanager
def partial_file(file: Path) -> Iterator[Path]:
    """A temporary path for a file that gets its name once it is complete; its folder is made."""
    partial = file.with_name(f"{file.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)  # left by a killed run; it may be read-only
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
