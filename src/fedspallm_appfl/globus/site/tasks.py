"""The two functions that Globus Compute runs at a client's endpoint. Only their source text is sent.

Arguments and results are plain dicts, sent as JSON: no side unpickles data of the other.
"""


def look_around(request: dict) -> dict:
    """What the preflight wants to know; works where nothing is installed."""
    import importlib.metadata
    import platform
    import socket

    facts: dict = {"host": socket.gethostname(), "python": platform.python_version(), "versions": {}}
    for package in ("fedspallm-appfl", "appfl", "torch", "transformers"):
        try:
            facts["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][package] = None
    try:
        from fedspallm_appfl.globus.site.inspection import inspect_site
    except ImportError as error:
        return {**facts, "not_importable": str(error)}
    return {**facts, **inspect_site(request)}


def prune(request: dict) -> dict:
    """A client's messages of one exchange."""
    from fedspallm_appfl.settings.imports import importing

    with importing("transformers"):
        from fedspallm_appfl.globus.site.worker import run_exchange

    return run_exchange(request)
