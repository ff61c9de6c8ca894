"""Log in to Globus Compute without asking: a run may stand in a queue, where nobody answers a prompt.

Needs the Globus Compute SDK; `globus_communicator` says so where it is missing.
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
    """What the SDK calls to ask for a login: because there is none, or Globus wants a new one."""

    @classmethod
    def for_globus_app(cls, *, login_client: Any, **unused: Any) -> "NoPrompt":
        """Make one, as an app does."""
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
    """The SDK's client, by the login that is stored here or by client id and secret in the environment.

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
    """The SDK's, but one that does not prompt."""
    app = get_globus_app()
    if isinstance(app, UserApp):
        config = dataclasses.replace(app.config, login_flow_manager=NoPrompt)
        app = UserApp(app.app_name, client_id=app.client_id, config=config)
    return app


def _reach(url: str) -> None:
    """Ask the service for anything; whatever it answers will do."""
    try:
        requests.get(f"{url}/v2/version", timeout=PATIENCE)
    except requests.RequestException as error:
        raise FederationError(
            f"the Globus Compute service at {url} cannot be reached: {_root(error)}; see to the network of this machine, "
            "and to HTTPS_PROXY if it needs a proxy"
        ) from error


def _root(error: BaseException) -> BaseException:
    """What the operating system said, below three layers of libraries."""
    while error.__context__ is not None:
        error = error.__context__
    return error
