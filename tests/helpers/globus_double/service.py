"""A double of the Globus Compute web service and of Globus Auth, as far as SDK and endpoint 4.8 use them.

    python service.py AMQP_URL

Tasks come in over HTTP and go to endpoints through AMQP; results come back through AMQP and go to the task group that the
SDK listens to. Everything is in memory. What it saw can be read at /seen.
"""

import json
import logging
import re
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pika
from globus_compute_common.messagepack import pack, unpack
from globus_compute_common.messagepack.message_types import EPStatusReport, Result, Task

PORT = 5000  # where the SDK looks for services of its environment "local"
LIMIT = 10_000_000  # bytes of a submission, by the service's documentation
USER = str(uuid.UUID(int=0x4111_8000 << 64 | 1))  # the only identity of this world
PERSON = {
    "sub": USER,
    "username": "tester@example.invalid",
    "preferred_username": "tester@example.invalid",
    "name": "Tester",
    "email": "tester@example.invalid",
}


class RefusalError(Exception):
    """An answer with an error status."""

    def __init__(self, status, code, reason):
        super().__init__(reason)
        self.status = status
        self.body = {"status": "Failed", "code": code, "reason": f"{code}: {reason}", "error_args": []}


class Broker:
    """What the service does with RabbitMQ; every publication has a connection of its own, which is slow and never stale."""

    def __init__(self, url):
        self.url = url
        with self.channel() as channel:
            for name in ("results", "heartbeats"):
                channel.exchange_declare(name, "direct", durable=True)
                channel.queue_declare(name, durable=True)
                channel.queue_bind(name, name, name)
            for name in ("tasks", "commands"):
                channel.exchange_declare(name, "direct", durable=True)

    @contextmanager
    def channel(self):
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def queue(self, name, exchange=None):
        with self.channel() as channel:
            channel.queue_declare(name, durable=True)
            if exchange:
                channel.queue_bind(name, exchange, name)

    def publish(self, exchange, key, body, **properties):
        with self.channel() as channel:
            channel.basic_publish(exchange, key, body, pika.BasicProperties(delivery_mode=2, **properties))

    def follow(self, queue, take):
        """Hand every message of a queue to a function, for ever, in a thread."""

        def loop():
            while True:
                try:
                    with self.channel() as channel:
                        for method, _, body in channel.consume(queue):
                            take(unpack(body), body)
                            channel.basic_ack(method.delivery_tag)
                except pika.exceptions.AMQPError:
                    time.sleep(0.5)
                except Exception:
                    logging.exception("message of %s", queue)

        threading.Thread(target=loop, daemon=True).start()

    def address(self, exchange, queue, publishes=False):
        """How an endpoint is told about a queue."""
        told = {"connection_url": self.url, "exchange": exchange, "queue": queue}
        if publishes:
            told["queue_publish_kwargs"] = {
                "exchange": exchange,
                "routing_key": queue,
                "mandatory": True,
                "properties": {"delivery_mode": 2},
            }
        return told


class Service:
    """Functions, endpoints and tasks."""

    def __init__(self, url):
        self.broker = Broker(url)
        self.lock = threading.RLock()
        self.functions = {}
        self.endpoints = {}
        self.tasks = {}
        self.requests = []
        self.broker.follow("results", self.take_result)
        self.broker.follow("heartbeats", self.take_heartbeat)

    # from endpoints

    def take_heartbeat(self, report, _):
        assert isinstance(report, EPStatusReport)
        with self.lock:
            endpoint = self.endpoints.setdefault(str(report.endpoint_id), {})
            endpoint["beat"] = time.monotonic()
            endpoint["state"] = report.global_state

    def take_result(self, result, body):
        assert isinstance(result, Result)
        with self.lock:
            task = self.tasks.get(str(result.task_id))
        if task:
            task["state"] = "failed" if result.is_error else "success"
            task["result_bytes"] = len(body)
            task["data"] = result.data
            self.broker.publish("", f"group.{task['group']}", body, timestamp=int(time.time()))

    # from everybody

    def register(self, endpoint, description):
        with self.lock:
            self.endpoints.setdefault(endpoint, {})["name"] = description["endpoint_name"]
        self.broker.queue(f"{endpoint}.tasks", "tasks")
        self.broker.queue(f"{endpoint}.commands", "commands")
        return self.credentials(endpoint) | {
            "command_queue_info": self.broker.address("commands", f"{endpoint}.commands"),
            "warnings": [],
        }

    def credentials(self, endpoint):
        return {
            "endpoint_id": endpoint,
            "task_queue_info": self.broker.address("tasks", f"{endpoint}.tasks"),
            "result_queue_info": self.broker.address("results", "results", publishes=True),
            "heartbeat_queue_info": self.broker.address("heartbeats", "heartbeats", publishes=True),
        }

    def submit(self, endpoint, submission, size):
        if size > LIMIT:
            raise RefusalError(413, "TASK_PAYLOAD_TOO_LARGE", f"{size} bytes, the limit is {LIMIT}")
        if "name" not in self.endpoints.get(endpoint, {}):
            raise RefusalError(404, "ENDPOINT_NOT_FOUND", endpoint)
        group = submission.get("task_group_id") or str(uuid.uuid4())
        self.broker.queue(f"group.{group}")
        worker = self.start_worker(endpoint, submission)
        accepted = {}
        for function, payloads in submission["tasks"].items():
            if function not in self.functions:
                raise RefusalError(404, "FUNCTION_NOT_FOUND", function)
            for payload in payloads:
                task = str(uuid.uuid4())
                with self.lock:
                    self.tasks[task] = {"group": group, "endpoint": endpoint, "bytes": len(payload), "state": "sent"}
                accepted.setdefault(function, []).append(task)
                buffer = self.functions[function]["function_code"] + payload
                headers = {
                    "function_uuid": function,
                    "task_uuid": task,
                    "resource_specification": json.dumps(submission.get("resource_specification")),
                    "result_serializers": submission.get("result_serializers") or [],
                }
                message = pack(Task(task_id=task, task_buffer=buffer))
                self.broker.publish("tasks", f"{worker}.tasks", message, headers=headers)
        return {
            "request_id": str(uuid.uuid4()),
            "task_group_id": group,
            "endpoint_id": endpoint,
            "tasks": accepted,
        }

    def start_worker(self, endpoint, submission):
        """Tell a daemon to start the user endpoint of a configuration, unless it runs; returns that one's id."""
        options = submission.get("user_endpoint_config") or {}
        worker = str(uuid.uuid5(uuid.UUID(endpoint), json.dumps(options, sort_keys=True)))
        self.broker.queue(f"{worker}.tasks", "tasks")
        command = {
            "command": "cmd_start_endpoint",
            "args": [],
            "kwargs": {
                "name": f"worker-{worker[:8]}",
                "user_opts": options,
                "user_runtime": submission.get("user_runtime") or {},
                "amqp_creds": self.credentials(worker),
            },
            "globus_effective_identity": USER,
            "globus_username": PERSON["username"],
            "globus_identity_set": [PERSON],
        }
        body = json.dumps(command).encode()
        stamp = {"content_type": "application/json", "timestamp": int(time.time())}
        self.broker.publish("commands", f"{endpoint}.commands", body, **stamp)
        return worker

    def status(self, endpoint):
        if endpoint not in self.endpoints:
            raise RefusalError(404, "ENDPOINT_NOT_FOUND", endpoint)
        known = self.endpoints[endpoint]
        period = known.get("state", {}).get("heartbeat_period", 30)
        fresh = "beat" in known and time.monotonic() - known["beat"] < 2 * period + 2
        return {"status": "online" if fresh else "offline", "details": known.get("state", {})}

    def batch(self, ids):
        """What has become of tasks."""
        told = {}
        for name in ids:
            task = self.tasks[name]
            told[name] = {"task_id": name, "status": task["state"]}
            if "data" in task:
                key = "result" if task["state"] == "success" else "exception"
                told[name] |= {key: task["data"], "completion_t": "0.1"}
        return {"response": "batch", "results": told}

    def seen(self):
        tasks = {name: {key: task[key] for key in task.keys() - {"data"}} for name, task in self.tasks.items()}
        return {"requests": self.requests, "tasks": tasks, "endpoints": sorted(self.endpoints)}


ID = r"(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
ROUTES = []


def route(method, pattern, needs_token=True):
    def register(answer):
        ROUTES.append((method, re.compile(pattern), needs_token, answer))
        return answer

    return register


@route("POST", "/v2/oauth2/token", needs_token=False)
def give_token(service, body, **_):
    scopes = parse_qs(body.decode()).get("scope", ["openid"])[0].split()
    tokens = []
    for server in ("auth.globus.org", "funcx_service"):
        mine = [scope for scope in scopes if ("/scopes/" in scope) == (server == "funcx_service")]
        if mine:
            token = {"access_token": str(uuid.uuid4()), "token_type": "Bearer", "expires_in": 172_800}
            tokens.append(token | {"resource_server": server, "scope": " ".join(mine), "state": "_default"})
    return tokens[0] | {"other_tokens": tokens[1:]}


@route("GET", "/v2/oauth2/userinfo", needs_token=False)
def tell_user(service, **_):
    return PERSON | {"identity_set": [PERSON]}


@route("GET", "/v2/version", needs_token=False)
def tell_version(service, **_):
    return {"api": "0", "min_sdk_version": "2.0.0", "min_ep_version": "2.0.0", "git_sha": ""}


@route("GET", "/v2/get_amqp_result_connection_url")
def tell_results_queue(service, **_):
    return {"queue_prefix": "group.", "connection_url": service.broker.url}


@route("POST", "/v[23]/functions")
def take_function(service, body, **_):
    function = str(uuid.uuid4())
    service.functions[function] = json.loads(body)
    return {"function_uuid": function}


@route("POST", "/v3/endpoints")
def take_endpoint(service, body, **_):
    return service.register(str(uuid.uuid4()), json.loads(body))


@route("PUT", f"/v3/endpoints/{ID}")
def take_endpoint_again(service, body, id, **_):
    return service.register(id, json.loads(body))


@route("GET", f"/v2/endpoints/{ID}/status")
def tell_status(service, id, **_):
    return service.status(id)


@route("POST", f"/v3/endpoints/{ID}/submit")
def take_tasks(service, body, id, **_):
    return service.submit(id, json.loads(body), len(body))


@route("POST", "/v2/batch_status")
def tell_batch(service, body, **_):
    return service.batch(json.loads(body)["task_ids"])


@route("GET", "/seen", needs_token=False)
def tell_all(service, **_):
    return service.seen()


class Handler(BaseHTTPRequestHandler):
    """HTTP for a `Service`."""

    protocol_version = "HTTP/1.1"
    service: Service

    def handle_one(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(size), urlsplit(self.path).path
        try:
            status, answer = 200, self.answer(path, body)
        except RefusalError as refusal:
            status, answer = refusal.status, refusal.body
        except Exception as error:
            logging.exception("%s %s", self.command, path)
            status, answer = 500, {"code": "INTERNAL", "reason": repr(error)}
        self.service.requests.append([self.command, path, status, size])
        logging.info("%s %s -> %s, %d bytes in", self.command, path, status, size)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = handle_one  # noqa: N815 - names of the base class

    def answer(self, path, body):
        for method, pattern, needs_token, answer in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command:
                if needs_token and not (self.headers.get("Authorization") or "").startswith("Bearer "):
                    raise RefusalError(401, "NOT_AUTHENTICATED", "no token")
                return answer(self.service, body=body, **match.groupdict())
        raise RefusalError(404, "NO_SUCH_ROUTE", f"{self.command} {path}")

    def log_message(self, *_):
        pass


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("pika").setLevel(logging.WARNING)
    Handler.service = Service(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
