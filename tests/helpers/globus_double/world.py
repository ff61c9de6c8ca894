"""Start and stop RabbitMQ, Redis, the double of the web service and endpoint daemons, each in a folder of a test run."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from helpers.globus_double.service import PORT
from helpers.paths import ROOT, TESTS

BIN = Path(sys.executable).parent
NEWER = Path(__file__).parent / "newer-requirements.txt"
RABBITMQ = Path("/usr/lib/rabbitmq/bin")  # the scripts in PATH change the user
EXAMPLE = ROOT / "examples" / "globus" / "user_config_template.yaml.j2"
CREDENTIALS = {"GLOBUS_COMPUTE_CLIENT_ID": "22222222-2222-4222-8222-222222222222", "GLOBUS_COMPUTE_CLIENT_SECRET": "x"}
PORTS = range(20_000, 30_000)  # below those that the kernel gives to connections
HEARTBEAT = 5  # seconds, the least that endpoints take
MARK = "ENDPOINT_OF_THE_DOUBLE"  # an environment variable by which the processes of an endpoint are known


def missing():
    """What is not installed, in words."""
    wanted = {"rabbitmq-server": RABBITMQ / "rabbitmq-server", "redis-server": shutil.which("redis-server")}
    return [name for name, program in wanted.items() if not (program and Path(program).exists())]


def free_port():
    """A port that is free and stays so while its server is down.

    Of the ports that the kernel gives to connections none will do: somebody's connection may take it meanwhile, or a
    client that tries again and again to reach the server is connected with itself.
    """
    for port in random.sample(PORTS, 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of 100 ports of {PORTS} is free")


def newer_environment(folder):
    """Make a virtual environment with a newer SDK and endpoint, and everything else as it is here; returns its bin.

    Raises:
        RuntimeError: pip could not install them.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    packages = next(folder.glob("lib/python*/site-packages"))
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "here.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in here))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--requirement", NEWER]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=180)
    if done.returncode:
        raise RuntimeError(f"pip could not install {NEWER.name}:\n{done.stderr}")
    return folder / "bin"


def listens(port):
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true, what, seconds=60, process=None):
    """Wait for something, no longer than its process lives.

    Raises:
        TimeoutError: it did not happen in time.
        RuntimeError: the process has ended.
    """
    until = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{what} did not come up: it ended with exit code {process.returncode}")
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come up in {seconds} s")
        time.sleep(0.2)


@dataclass
class Endpoint:
    """An endpoint daemon.

    Attributes:
        name: what it is called.
        programs: the folder of its globus-compute-endpoint.
        environment: of its processes.
        process: of the daemon, once it was started.
    """

    name: str
    programs: Path
    environment: dict
    process: subprocess.Popen | None = None

    def line(self, verb, *options):
        return [str(self.programs / "globus-compute-endpoint"), verb, self.name, *options]

    def kill(self):
        """End the daemon, what it has started, and what that has started, all without a word.

        A daemon's child begins a session, to which its workers belong, and overwrites its environment with its title.
        """
        if self.process is None:
            return
        processes = dict(_processes())
        mine = f"{MARK}={self.environment[MARK]}\0".encode()
        sessions = {session for _, session, _, environment in processes.values() if mine in environment + b"\0"}
        sessions |= {self.process.pid} | {pid for pid, (parent, *_) in processes.items() if parent == self.process.pid}
        for pid, (_, session, _, _) in processes.items():
            if session in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(5)


def _processes():
    """Process id, (its parent, session, group and environment) of all that runs here and may be looked at."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            state, parent, group, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if state != "Z":
                yield int(entry.name), (int(parent), int(session), int(group), (entry / "environ").read_bytes())


def _group_lives(number):
    return any(group == number for _, (_, _, group, _) in _processes())


class World:
    """Everything that a run over Globus Compute needs, on this machine.

    Attributes:
        folder: where it lies.
        environment: of processes that live in it.
        redis_port: where Redis listens.
    """

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}
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
                "service",
                [sys.executable, "-m", "helpers.globus_double.service", url],
                cwd=TESTS,
            )
            wait_until(lambda: listens(PORT), "the double of the web service", process=self.processes["service"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.ExitStack() as last_first:  # if one cannot be ended the others are
            if self.mapper:
                kill = ["epmd", "-port", str(self.mapper), "-kill"]
                last_first.callback(subprocess.run, kill, capture_output=True, timeout=30)
            for process in self.processes.values():
                last_first.callback(self._stop, process)
            for endpoint in self.endpoints.values():  # an endpoint that is stopped takes a quarter of a minute
                last_first.callback(endpoint.kill)

    def check(self):
        """Nothing works without the servers.

        Raises:
            RuntimeError: one has ended.
        """
        for name in ("redis", "rabbitmq", "service"):
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                log = self.folder / f"{name}.log"
                said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
                raise RuntimeError(f"{name} does not run any more; it said:\n{said}")

    def _start(self, name, command, environment=None, **options):
        """Start a server in a session of its own: an endpoint that stops ends its whole process group."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env=environment or self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **options,
            )
        self.processes[name] = process
        return process

    @staticmethod
    def _stop(process):
        """End a process and what it has started and left in its group; a script may end before the server that it runs."""
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            until = time.monotonic() + patience
            while time.monotonic() < until:
                if process.poll() is not None and not _group_lives(process.pid):
                    return
                time.sleep(0.1)
        raise RuntimeError(f"process {process.pid} ({process.args[0]}) cannot be ended")

    def _start_redis(self):
        options = ["--port", self.redis_port, "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        process = self._start("redis", ["redis-server", *options])
        wait_until(lambda: listens(self.redis_port), "redis-server", process=process)

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
        self._broker = {"port": port, "environment": environment}
        self._run_rabbitmq()
        return f"amqp://double:double@127.0.0.1:{port}/%2F"

    def _run_rabbitmq(self):
        port = self._broker["port"]
        server, environment = [RABBITMQ / "rabbitmq-server"], self._broker["environment"]
        process = self._start("rabbitmq", server, environment, cwd=environment["HOME"])
        wait_until(lambda: listens(port), "rabbitmq-server", 120, process)

    def restart_broker(self, meanwhile):
        """Stop RabbitMQ, do something, and start it again with what was in its queues."""
        self._stop(self.processes["rabbitmq"])
        meanwhile()
        self._run_rabbitmq()

    def environment_of(self, programs):
        """The environment of processes of a virtual environment, of which a folder has the programs."""
        return {**self.environment, "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin"}

    def start_endpoint(self, name, worker_init, programs=BIN, contact=None, functions=()):
        """Configure an endpoint as the example does, but for shell lines of its own, and start it.

        Args:
            name: what it is called.
            worker_init: its shell lines.
            programs: the folder of its globus-compute-endpoint.
            contact: an address; newer versions want one of root, older ones do not know it.
            functions: ids of those that it runs; none of them lets it run all.

        Returns:
            Its id.
        """
        home = Path(self.environment["GLOBUS_COMPUTE_USER_DIR"]) / name
        endpoint = Endpoint(name, programs, self.environment_of(programs) | {MARK: f"{home}/"})
        configure = endpoint.line("configure", *(["--contact-email", contact] if contact else []))
        done = subprocess.run(configure, env=endpoint.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"endpoint {name} could not be configured:\n{done.stdout}{done.stderr}")
        settings = {"display_name": name, "heartbeat_period": HEARTBEAT} | ({"email": contact} if contact else {})
        settings |= {"allowed_functions": list(functions)} if functions else {}
        (home / "config.yaml").write_text(yaml.safe_dump(settings))
        template = yaml.safe_load(EXAMPLE.read_text())
        template["heartbeat_period"] = HEARTBEAT
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
        kept += ["NO_PROXY", "no_proxy", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", MARK]
        (home / "user_environment.yaml").write_text(yaml.safe_dump({key: endpoint.environment[key] for key in kept}))
        self.endpoints[name] = endpoint
        self.run_endpoint(name)
        identity = home / "endpoint.json"
        wait_until(identity.is_file, f"endpoint {name}", process=self.endpoints[name].process)
        given = json.loads(identity.read_text())["endpoint_id"]
        wait_until(lambda: self.ask(f"/v2/endpoints/{given}/status")["status"] == "online", f"heartbeat of {name}")
        return given

    def run_endpoint(self, name):
        """Start an endpoint that has been configured."""
        endpoint = self.endpoints[name]
        endpoint.process = self._start(f"endpoint-{name}", endpoint.line("start"), endpoint.environment)

    def stop_endpoint(self, name):
        """Stop an endpoint as its site would, and spare the test the three heartbeats that a restart should wait for.

        The daemon kills a user process that ends slowly; where it leaves a file with its id the next one does not start.
        """
        endpoint = self.endpoints[name]
        subprocess.run(endpoint.line("stop"), env=endpoint.environment, capture_output=True, timeout=60)
        endpoint.process.wait(60)  # longer than the command itself waits
        for file in Path(self.environment["GLOBUS_COMPUTE_USER_DIR"]).glob("worker-*/daemon.pid"):
            if not Path("/proc", file.read_text().strip()).exists():
                file.unlink()

    def lose_endpoint(self, name):
        """What the others see when the machine of an endpoint loses its power."""
        self.endpoints[name].kill()

    def register_endpoint(self, name):
        """An endpoint that the service knows and that nobody starts; returns its id."""
        return self.ask("/v3/endpoints", {"endpoint_name": name})["endpoint_id"]

    def ask(self, path, body=None):
        """Read from the double what it saw, or tell it something."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Authorization": "Bearer test"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
