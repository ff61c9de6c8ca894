"""Start and stop RabbitMQ, Redis, the double of the web service and endpoint daemons, each in a folder of a test run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

from globus_double.service import PORT

BIN = Path(sys.executable).parent
RABBITMQ = Path("/usr/lib/rabbitmq/bin")  # the scripts in PATH change the user
EXAMPLE = Path(__file__).parents[2] / "examples" / "globus" / "user_config_template.yaml.j2"
CREDENTIALS = {"GLOBUS_COMPUTE_CLIENT_ID": "22222222-2222-4222-8222-222222222222", "GLOBUS_COMPUTE_CLIENT_SECRET": "x"}


def missing():
    """What is not installed, in words."""
    wanted = {"rabbitmq-server": RABBITMQ / "rabbitmq-server", "redis-server": shutil.which("redis-server")}
    return [name for name, program in wanted.items() if not (program and Path(program).exists())]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true, what, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come up in {seconds} s")
        time.sleep(0.2)


class World:
    """Everything that a run over Globus Compute needs, on this machine.

    Attributes:
        folder: where it lies.
        environment: of processes that live in it.
        redis_port: where Redis listens.
    """

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.endpoints = {}
        self.redis_port = free_port()
        self.mapper = 0  # port of the daemon that Erlang starts and leaves behind
        self.environment = {
            **os.environ,
            **CREDENTIALS,
            "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin",
            "GLOBUS_SDK_ENVIRONMENT": "local",
            "GLOBUS_SDK_SERVICE_URL_AUTH": f"http://127.0.0.1:{PORT}/",
            "GLOBUS_COMPUTE_USER_DIR": str(folder / "endpoints"),
            "NO_PROXY": "localhost,127.0.0.1",
            "no_proxy": "localhost,127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def __enter__(self):
        if listens(PORT):
            raise RuntimeError(f"port {PORT}, where the SDK looks for its local service, is taken; free it first")
        try:
            self._start_redis()
            url = self._start_rabbitmq()
            self._start(
                "service", [sys.executable, "-m", "globus_double.service", url], cwd=Path(__file__).parent.parent
            )
            wait_until(lambda: listens(PORT), "the double of the web service")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        stopping = [self._command("stop", name) for name in self.endpoints]
        for process in stopping:
            process.wait(120)
        for process in reversed(self.processes):
            self._stop(process)
        if self.mapper:
            subprocess.run(["epmd", "-port", str(self.mapper), "-kill"], capture_output=True)

    def _start(self, name, command, environment=None, **options):
        """Start a server in a session of its own: an endpoint that stops ends its whole process group."""
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment or self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        self.processes.append(process)
        return process

    @staticmethod
    def _stop(process):
        """End a process and what it has started and left in its group."""
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _start_redis(self):
        options = ["--port", self.redis_port, "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        self._start("redis", ["redis-server", *options])
        wait_until(lambda: listens(self.redis_port), "redis-server")

    def _start_rabbitmq(self):
        port, between_nodes, self.mapper = free_port(), free_port(), free_port()
        home = self.folder / "rabbitmq"
        home.mkdir()
        (home / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{port}\n"
            "default_user = double\ndefault_pass = double\ndisk_free_limit.absolute = 50MB\n"
        )
        (home / "plugins").write_text("[].\n")
        on_loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        environment = {
            **self.environment,
            "HOME": str(home),
            "RABBITMQ_NODENAME": f"double{port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_DIST_PORT": str(between_nodes),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{on_loopback} +S 1:1",
            "RABBITMQ_CTL_ERL_ARGS": on_loopback,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.mapper),
        }
        self._start("rabbitmq", [RABBITMQ / "rabbitmq-server"], environment)
        wait_until(lambda: listens(port), "rabbitmq-server", 120)
        return f"amqp://double:double@127.0.0.1:{port}/%2F"

    def _command(self, verb, name):
        command = [str(BIN / "globus-compute-endpoint"), verb, name]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def start_endpoint(self, name, worker_init):
        """Configure an endpoint as the example does, but for shell lines of its own, and start it; returns its id."""
        out, _ = self._command("configure", name).communicate(timeout=120)
        home = Path(self.environment["GLOBUS_COMPUTE_USER_DIR"]) / name
        (home / "config.yaml").write_text(yaml.safe_dump({"display_name": name, "heartbeat_period": 5}))
        template = yaml.safe_load(EXAMPLE.read_text())
        template["heartbeat_period"] = 5
        template["engine"] |= {"address": "127.0.0.1", "heartbeat_period": 5}
        template["engine"]["provider"]["worker_init"] = worker_init
        (home / "user_config_template.yaml.j2").write_text(yaml.safe_dump(template))
        (home / "user_config_schema.json").write_text("{}")
        kept = [
            *CREDENTIALS,
            "PATH",
            "GLOBUS_SDK_ENVIRONMENT",
            "GLOBUS_SDK_SERVICE_URL_AUTH",
            "GLOBUS_COMPUTE_USER_DIR",
        ]
        kept += ["NO_PROXY", "no_proxy", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"]
        (home / "user_environment.yaml").write_text(yaml.safe_dump({key: self.environment[key] for key in kept}))
        process = self._start(f"endpoint-{name}", [BIN / "globus-compute-endpoint", "start", name])
        self.endpoints[name] = process
        identity = home / "endpoint.json"
        wait_until(identity.is_file, f"endpoint {name}")
        return json.loads(identity.read_text())["endpoint_id"]

    def register_endpoint(self, name):
        """An endpoint that the service knows and that nobody starts; returns its id."""
        return self.ask("/v3/endpoints", {"endpoint_name": name})["endpoint_id"]

    def ask(self, path, body=None):
        """Read from the double what it saw, or tell it something."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Authorization": "Bearer test"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
