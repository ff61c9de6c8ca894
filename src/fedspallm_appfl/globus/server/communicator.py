"""APPFL's server communicator for Globus Compute, with its faults fixed, one method for each.

| APPFL 1.12 | here |
| --- | --- |
| opens and sends the source text of each client's data set file | `__init__`: nothing of a file is sent |
| pickles arguments and results both ways | `_load_gce`: JSON; the SDK is told to read nothing else |
| changes one dict of metadata for the next client before the SDK has sent it | `send_task_to_one_client` copies |
| a failed submission ends the Executor for all clients | `_submit` makes a new one and sends again |
| measures a dict by `sys.getsizeof`, and thus never uses S3 for it | `_within_limit` measures what is sent |
| a failed task ends the server; a lost one blocks it forever | `recv_result_from_one_client`: an outcome, or None |
| losing the connection for a minute loses all tasks | `_find_again` asks for those that still run |
| an unanswered task keeps the interpreter from exiting | `shutdown_all_clients` drops it |
| uses one data store name for all runs and clears the whole Redis server | `data_store`; no ProxyStore here |
"""

import json
import logging
import time
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import Any

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.errors import ConfigError, FederationError, extra, first_line
from fedspallm_appfl.globus.server.outcome import Outcome, Task
from fedspallm_appfl.globus.site import tasks as globus_tasks

registration.register()
registration.guard_login_manager()
try:
    from appfl.comm.globus_compute import GlobusComputeServerCommunicator
    from globus_compute_sdk import Executor
    from globus_compute_sdk.sdk import executor as sdk_executor
    from globus_compute_sdk.sdk.asynchronous.compute_future import ComputeFuture
    from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect
    from globus_sdk import GlobusAPIError
    from pika.exceptions import AMQPError

    from fedspallm_appfl.globus.server.login import logged_in
except ImportError as error:
    raise ConfigError(f"--launcher globus needs the Globus Compute SDK ({error}); {extra('globus')}") from error

SUBMISSION_LIMIT = 10_000_000  # bytes, from the documentation of the service
AROUND = 2**16  # bytes of a submission besides the request
NOT_FOUND = 404
LOOK_AGAIN = 15.0  # seconds
LOOK_UP = 300.0  # seconds after which a task is looked for though the connection seems well
THREAD_ENDED = "SDK thread quit"  # a RuntimeError of the SDK if it could not even request the connection
REFUSALS = (
    "not permitted on endpoint",
    "FUNCTION_NOT_FOUND",
)  # from an endpoint with `allowed_functions`, from the service
ALLOWED = "; set server_configs.functions to the ids that the site allows (fedspallm functions makes new ones)"
MOST = 10_000  # maximum characters of an error
logger = logging.getLogger(__name__)
TASKS = {"look_around": globus_tasks.look_around, "prune": globus_tasks.prune}


class GlobusServer(GlobusComputeServerCommunicator):
    """Sends tasks to the endpoints of clients and receives their results.

    Attributes:
        endpoints: client -> endpoint id.
        executing_task_futs: future -> unfinished task.
    """

    def __init__(
        self,
        endpoints: Mapping[str, str],
        functions: Mapping[str, str | None] | None = None,
        patience: float | None = None,
    ) -> None:
        """Log in.

        Args:
            endpoints: client -> endpoint id.
            functions: one of `TASKS` -> the id under which it is registered; None if this run has to register it.
            patience: seconds that the connection may be lost; None for any time.

        Raises:
            FederationError: the service cannot be reached, or refuses the login.
        """
        self.endpoints = dict(endpoints)
        self._functions = dict(functions or {})
        self.executing_task_futs: dict[Future, Task] = {}
        self._out_of_sight: dict[str, Task] = {}  # task id -> what runs while there is no connection
        self._look_at = 0.0  # when to ask for them
        self._patience = patience
        self._lost_at: float | None = None
        logging.getLogger(sdk_executor.__name__).setLevel(logging.CRITICAL)  # futures report the same
        warnings.filterwarnings("ignore", "\\s*Environment differences detected", UserWarning)  # irrelevant for JSON
        self._client = logged_in()
        self._load_gce()

    def _load_gce(self, **kwargs: Any) -> None:
        """Make the Executor, which sends and reads only function source and JSON."""
        allowed = [PureSourceTextInspect, JSONData]
        serializer = ComputeSerializer(PureSourceTextInspect, JSONData, allowed_deserializer_types=allowed)
        # One task per submission: two together might exceed the service's limit.
        self.gce = Executor(client=self._client, serializer=serializer, result_serializers=[JSONData], batch_size=1)
        for kind, registered in self._functions.items():
            if registered:
                self.gce.register_function(TASKS[kind], function_id=registered)

    def register(self) -> dict[str, str]:
        """Register the functions permanently.

        Returns:
            One of `TASKS` -> its id.

        Raises:
            FederationError: the service refuses them.
        """
        try:
            return {kind: str(self.gce.register_function(function)) for kind, function in TASKS.items()}
        except Exception as error:  # HTTP, login and configuration, each with errors of its own
            raise FederationError(
                f"functions cannot be registered: {type(error).__name__}: {first_line(error)}"
            ) from error

    def status_of(self, client: str) -> str:
        """The service's status of a client's endpoint: `online`, `offline`, `unknown`, or why there is none."""
        try:
            return str(self._client.get_endpoint_status(self.endpoints[client])["status"])
        except GlobusAPIError as error:
            return "unknown" if error.http_status == NOT_FOUND else f"not accessible: {error.text}"
        except Exception as error:  # noqa: BLE001 - network, login and configuration, each with errors of its own
            return f"not accessible: {first_line(error)}"

    def send_task_to_one_client(
        self, client_id: str, task_name: str, *, metadata: Mapping[str, Any], **unused: Any
    ) -> None:
        """Send a task.

        Args:
            client_id: the client whose endpoint gets it.
            task_name: one of `TASKS`.
            metadata: its request; a copy of it is sent.
            **unused: APPFL's other arguments for a model.

        Raises:
            FederationError: the request is too large, or the service refuses it.
        """
        text = _within_limit(json.dumps(metadata), client_id)
        self._submit(Task(client_id, task_name, json.loads(text)))

    def _submit(self, task: Task) -> None:
        """Submit a task to the Executor; if that has ended, to a new one."""
        task.sent += 1
        try:
            try:
                future = self._hand_over(task)
            except RuntimeError:  # "is shutdown"
                self._load_gce()
                future = self._hand_over(task)
        except Exception as error:  # registering a function talks to the service
            raise FederationError(
                f"client {task.client}: its task cannot be sent to endpoint {self.endpoints[task.client]}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        self.executing_task_futs[future] = task

    def _hand_over(self, task: Task) -> Future:
        self.gce.endpoint_id = uuid.UUID(self.endpoints[task.client])
        return self.gce.submit(TASKS[task.kind], task.request)

    def recv_result_from_one_client(self, timeout: float | None = None) -> Outcome | None:
        """The outcome of the next task that ends; None if none ends in time.

        Args:
            timeout: seconds to wait.
        """
        self._find_again()
        if not self.executing_task_futs and self._out_of_sight:
            time.sleep(LOOK_AGAIN if timeout is None else min(timeout, LOOK_AGAIN))
        done, _ = wait(self.executing_task_futs, timeout, FIRST_COMPLETED)
        for future in done:
            task = self.executing_task_futs.pop(future)
            outcome = self._outcome(future, task)
            if outcome is not None:
                return outcome
        return None

    def _outcome(self, future: Future, task: Task) -> Outcome | None:
        try:
            return Outcome(task.client, task.request, future.result())
        except CancelledError:  # an earlier submission failed and ended the Executor
            if task.sent > 1:
                return Outcome(task.client, task.request, None, "its task was dropped twice before it was sent")
            self._submit(task)
            return None
        except Exception as error:  # noqa: BLE001 - an error of the task, the service or the SDK
            task_id = getattr(future, "task_id", None)  # set once the service has accepted it
            ended = type(error) is RuntimeError and THREAD_ENDED in str(error)  # not an error that a task raised
            if task_id is not None and (ended or isinstance(error, AMQPError)):
                logger.warning("client %s: the connection to Globus Compute was lost; its task continues", task.client)
                self._out_of_sight[task_id] = task
                self._lost_at = time.monotonic() if self._lost_at is None else self._lost_at
                return None
            words = str(error).strip() or repr(error)
            line = f"{type(error).__name__}: {words.splitlines()[-1][:MOST]}"
            hint = ALLOWED if any(refusal in words for refusal in REFUSALS) else ""
            return Outcome(task.client, task.request, None, line + hint, words[-MOST:] if "\n" in words else "")

    def _find_again(self) -> None:
        """Wait again for tasks that the SDK gave up without a connection; they may have finished since.

        Raises:
            FederationError: there has been no connection for too long.
        """
        now = time.monotonic()
        self._look_up(now)
        if not self._out_of_sight or now < self._look_at:
            return
        self._look_at = now + LOOK_AGAIN
        futures = {task_id: ComputeFuture(task_id) for task_id in self._out_of_sight}
        try:
            pending = sdk_executor.Executor._load_tasks_status(futures, client=self._client)
            self.gce._get_result_watcher().watch_for_task_results(self.gce, pending)
        except Exception as error:  # noqa: BLE001 - any error may be temporary
            logger.warning("no connection to Globus Compute: %s; retrying in %.0f s", first_line(error), LOOK_AGAIN)
            self._require_patience(now)
            return
        self._lost_at = None
        for task_id, future in futures.items():
            task = self._out_of_sight.pop(task_id)
            if future.done() or future in pending:
                self.executing_task_futs[future] = task
            else:  # the service does not know it any more
                self._submit(task)

    def _require_patience(self, now: float) -> None:
        self._lost_at = now if self._lost_at is None else self._lost_at
        if self._patience is not None and now - self._lost_at >= self._patience:
            raise FederationError(
                f"no connection to Globus Compute for {now - self._lost_at:.0f} s, server_configs.connection_deadline is "
                f"{self._patience:g}; tasks are out at {', '.join(sorted(self.busy()))} and go on there"
            )

    def _look_up(self, now: float) -> None:
        """Ask for tasks that have been out for long: a result may have fallen between two connections."""
        old = {
            task_id: future
            for future, task in self.executing_task_futs.items()
            if (task_id := getattr(future, "task_id", None)) and not future.done() and now - task.looked > LOOK_UP
        }
        if not old:
            return
        twins = {task_id: ComputeFuture(task_id) for task_id in old}
        for future in old.values():
            self.executing_task_futs[future].looked = now
        try:
            sdk_executor.Executor._load_tasks_status(twins, client=self._client)
        except Exception as error:  # noqa: BLE001 - any error may be temporary
            logger.warning("tasks cannot be looked up at Globus Compute: %s", first_line(error))
            return
        for task_id, twin in twins.items():
            if twin.done():
                self.executing_task_futs[twin] = self.executing_task_futs.pop(old[task_id])

    def look_for(self, client: str, kind: str, request: Mapping[str, Any], task_id: str) -> None:
        """Wait for a task that an earlier start has sent; it is sent again if the service does not know it any more.

        Args:
            client: the client whose endpoint has it.
            kind: one of `TASKS`.
            request: what it would be sent with.
            task_id: its id.
        """
        self._out_of_sight[task_id] = Task(client, kind, dict(request))

    def task_ids(self) -> dict[str, str]:
        """Client -> id of its task, where the service has accepted one."""
        ids = {task.client: getattr(future, "task_id", None) for future, task in self.executing_task_futs.items()}
        return {client: str(task_id) for client, task_id in ids.items() if task_id}

    def busy(self) -> set[str]:
        """Clients with an unfinished task."""
        return {task.client for task in (*self.executing_task_futs.values(), *self._out_of_sight.values())}

    def forget(self, client: str) -> None:
        """Stop waiting for the tasks of a client."""
        kept = {future: task for future, task in self.executing_task_futs.items() if task.client != client}
        self.executing_task_futs = kept
        self._out_of_sight = {name: task for name, task in self._out_of_sight.items() if task.client != client}

    def cancel_all_tasks(self) -> None:
        """Forget unfinished tasks; a running task cannot be cancelled."""
        self.executing_task_futs = {}
        self._out_of_sight = {}

    def shutdown_all_clients(self) -> None:
        """End the SDK's threads, even if tasks are unanswered."""
        self.cancel_all_tasks()
        self.gce.shutdown(wait=False, cancel_futures=True)
        watcher = sdk_executor._RESULT_WATCHERS.get(self.gce.task_group_id)
        if watcher is not None:
            watcher.shutdown(wait=True, cancel_futures=True)


def _within_limit(text: str, client: str) -> str:
    if len(text) > SUBMISSION_LIMIT - AROUND:
        raise FederationError(
            f"client {client}: its task has {len(text)} bytes, Globus Compute allows {SUBMISSION_LIMIT} per submission; "
            "set client_configs.comm_configs.store to a store that all sites can reach (docs/globus.md)"
        )
    return text
