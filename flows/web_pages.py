"""`posttrain ui`: Prefect's and MLflow's own pages on this store, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from tasks.environment import home
from tasks.errors import MachineUnfit
from tasks.guard import guarded
from tasks.monitoring import mlflow_runs

GRACE_SECONDS = 5.0
STARTUP_SECONDS = 180


def serve(prefect_port: int, mlflow_port: int) -> None:
    """Start both servers on 127.0.0.1, print their addresses once they answer, and stop both on Ctrl-C or TERM.

    Raises MachineUnfit if a port is taken or a server does not start.
    """
    if prefect_port == mlflow_port:
        raise MachineUnfit(f"--prefect-port and --mlflow-port are both {prefect_port}. Give each its own.")
    for option, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
        refuse_taken(option, port)
    mlflow_runs.prepare_database()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    servers = [
        _start([sys.executable, "-m", "prefect", "server", "start"], {"PREFECT_SERVER_API_PORT": str(prefect_port)}),
        _start(mlflow_command(mlflow_port), {}),
    ]
    try:
        _wait(servers[0], f"http://127.0.0.1:{prefect_port}/api/health")
        _wait(servers[1], f"http://127.0.0.1:{mlflow_port}/health")
        print(
            f"Prefect  http://127.0.0.1:{prefect_port}\nMLflow   http://127.0.0.1:{mlflow_port}\nCtrl-C stops both.", flush=True
        )
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
        raise MachineUnfit(f"a server ended by itself; see {home() / '.servers.log'}")
    except KeyboardInterrupt:
        print("stopping")
    finally:
        for server in servers:
            server.stdin.close()
        for server in servers:
            server.wait()


def mlflow_command(port: int) -> list[str]:
    """Return the command of MLflow's server on the local database, one worker."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    root = mlflow_runs.artifact_root()
    return [*command, "--backend-store-uri", mlflow_runs.tracking_uri(), "--default-artifact-root", root.as_uri()]


def refuse_taken(option: str, port: int) -> None:
    """Raise MachineUnfit if a port of 127.0.0.1 is no port, or somebody listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError:
            raise MachineUnfit(f"{option} is {port}: a port lies between 1 and 65535.") from None
        except OSError as error:
            raise MachineUnfit(f"{option} {port} is taken ({error.strerror}). Give another port with {option}.") from None


def _start(command: list[str], settings: dict[str, str]) -> subprocess.Popen:
    """Start a server under the guard: whatever happens to this process, the server does not outlive it."""
    log = home() / ".servers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            guarded(command, GRACE_SECONDS),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | settings,
            start_new_session=True,
        )


def _wait(server: subprocess.Popen, health: str) -> None:
    end = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise MachineUnfit(f"the server behind {health} did not start; see {home() / '.servers.log'}")
