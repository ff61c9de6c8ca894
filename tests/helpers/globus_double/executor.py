"""Stand-ins for the SDK's Client and Executor without a service: real serializer, real engine, and its worst habits.

Like the real Executor it serializes in a thread, later than `submit` returns; it sends at most one task at a time, refuses
what exceeds the service's limit, and is of no use any more after a submission that was refused: what stands in its queue
is cancelled then. It does without HTTP, AMQP, login and rate limits.
"""

import multiprocessing
import queue
import threading
import time
import uuid
from concurrent.futures import Future

from globus_compute_common.messagepack import pack, unpack
from globus_compute_common.messagepack.message_types import Task
from globus_compute_endpoint.engines import ProcessPoolEngine
from globus_compute_endpoint.engines.base import GCFuture
from globus_compute_sdk.errors import TaskExecutionFailed

from helpers.globus_double.service import LIMIT

LATER = 0.02  # seconds between `submit` and serialization


class Site:
    """The endpoints of all clients, with one worker process for all of them.

    Attributes:
        sent: (endpoint id, text of the submission) of every task.
        silent: endpoints that take tasks and never answer.
        offline: endpoints that the service knows to be down.
        refusals: errors for the next submissions.
        functions: name -> id of those that were registered before they were used.
    """

    def __init__(self, folder, allowed=None):
        self.sent = []
        self.silent = set()
        self.offline = set()
        self.refusals = []
        self.functions = {}
        context = multiprocessing.get_context("fork")
        self.engine = ProcessPoolEngine(max_workers=1, mp_context=context, allowed_serializers=allowed)
        self.engine.start(endpoint_id=uuid.uuid4(), run_dir=str(folder))

    def client(self):
        return Client(self)

    def executor(self, client, **options):
        return Executor(self, client, **options)

    def close(self):
        self.engine.shutdown(block=True)


class Client:
    """Knows endpoints."""

    def __init__(self, site):
        self._site = site

    def get_endpoint_status(self, endpoint):
        return {"status": "offline" if endpoint in self._site.offline else "online"}


class Executor:
    """Runs functions at the site."""

    def __init__(self, site, client, serializer, result_serializers, batch_size):
        assert batch_size == 1
        self.client = client
        self.endpoint_id = None
        self.task_group_id = uuid.uuid4()
        self._site = site
        self.serializer = serializer
        self._paths = [f"{one.__module__}.{one.__name__}" for one in result_serializers]
        self._stopped = False
        self._queue = queue.Queue()
        threading.Thread(target=self._send, daemon=True).start()

    def register_function(self, function, function_id=None):
        self._site.functions[function.__name__] = function_id or str(uuid.uuid4())
        return self._site.functions[function.__name__]

    def submit(self, function, *args, **kwargs):
        if self._stopped:
            raise RuntimeError("the double is shutdown; no new functions may be executed")
        future = Future()
        self._queue.put((future, str(self.endpoint_id), function, args, kwargs))
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        self._stopped = True

    def _send(self):
        while True:
            future, *task = self._queue.get()
            try:
                self._send_one(future, *task)
            except BaseException as error:  # or somebody would wait for the future without end
                future.set_exception(error)
                raise

    def _send_one(self, future, endpoint, *call):
        time.sleep(LATER)
        if self._stopped:
            future.cancel()
            future.set_running_or_notify_cancel()
            return
        text = self.serializer.pack_buffers([self.serializer.serialize(part) for part in call])
        self._site.sent.append((endpoint, text))
        if self._site.refusals or len(text) > LIMIT:
            self._stopped = True
            future.set_exception(self._site.refusals.pop(0) if self._site.refusals else OSError("413 too large"))
        elif endpoint not in self._site.silent:
            self._run(future, text)

    def _run(self, future, text):
        task = uuid.uuid4()
        running = GCFuture(gc_task_id=task)
        running.add_done_callback(lambda done: self._finish(future, done))
        self._site.engine.submit(running, pack(Task(task_id=task, task_buffer=text)), {}, self._paths)

    def _finish(self, future, running):
        try:
            result = unpack(running.result())
            if result.is_error:
                raise TaskExecutionFailed(result.data)
            future.set_result(self.serializer.deserialize(result.data))
        except Exception as error:  # noqa: BLE001 - as the SDK does
            future.set_exception(error)
