"""Log in to Globus Compute without a prompt: a run may wait in a queue, where nobody would answer it.

Needs the Globus Compute SDK; `communicator` reports it if it is missing.
"""

import dataclasses
from typing import Any

import requests
from globus_compute_sdk import Client
from globus_compute_sdk.sdk._environments import get_web_service_url
from globus_compute_sdk.sdk.auth.globus_app import get_globus_app
from globus_sdk import GlobusApp, UserApp
from globus_sdk.login_flows import LoginFlowManager

from fedspallm_appfl.errors import FederationError, first_line

PATIENCE = 10.0  # seconds; the SDK itself tries six times and waits a minute each time
HOW = (
    "log in on a terminal with globus-compute-endpoint login, or set GLOBUS_COMPUTE_CLIENT_ID and "
    "GLOBUS_COMPUTE_CLIENT_SECRET"
)


class NoPrompt(LoginFlowManager):
    """The SDK calls this to ask for a login, if there is none or Globus wants a new one."""

    @classmethod
    def for_globus_app(cls, *, login_client: Any, **unused: Any) -> "NoPrompt":
        """Make one, like an app."""
        return cls(login_client)

    def run_login_flow(self, auth_parameters: Any) -> Any:
        """Refuse.

        Raises:
            FederationError: always.
        """
        why = auth_parameters.session_message
        said = f" (Globus says: {why}; login --force makes a new one)" if why else ""
        raise FederationError(f"you are not logged in to Globus Compute{said}; {HOW}")


def logged_in() -> Client:
    """The SDK's client, with the stored login or with client id and secret from the environment.

    Raises:
        FederationError: the service cannot be reached or refuses, or there is no login.
    """
    _reach(get_web_service_url())
    try:
        return Client(app=_app())
    except FederationError:
        raise
    except Exception as error:  # HTTP, login and configuration, each with errors of its own
        raise FederationError(
            f"Globus Compute cannot be used: {type(error).__name__}: {first_line(error)}; {HOW}"
        ) from error


def _app() -> GlobusApp:
    """The SDK's app, without prompts."""
    app = get_globus_app()
    if isinstance(app, UserApp):
        config = dataclasses.replace(app.config, login_flow_manager=NoPrompt)
        app = UserApp(app.app_name, client_id=app.client_id, config=config)
    return app


def _reach(url: str) -> None:
    """Send any request to the service; any answer will do."""
    try:
        requests.get(f"{url}/v2/version", timeout=PATIENCE)
    except requests.RequestException as error:
        raise FederationError(
            f"the Globus Compute service at {url} cannot be reached: {_root(error)}; check the network of this machine, "
            "and to HTTPS_PROXY if it needs a proxy"
        ) from error


def _root(error: BaseException) -> BaseException:
    """The error of the operating system, below three layers of libraries."""
    while error.__context__ is not None:
        error = error.__context__
    return error
