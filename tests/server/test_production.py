"""docs/production.md holds: both servers on PostgreSQL, each behind a password, started from the files of docs/production."""

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import BIN, PROJECT, answers, free_port, wait_until

from tasks.guard import guarded

FILES = PROJECT / "docs" / "production"
UNITS = sorted(path.name for path in FILES.glob("*.service"))
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)), Path("absent")).parent
DATABASES = ("prefect", "mlflow", "mlflow_auth")
PLAIN = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}  # a service starts with nothing else
# PostgreSQL refuses to run as root, and its superuser is the system's user of that name.
AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
needs_postgres = pytest.mark.skipif(
    not (POSTGRES / "initdb").is_file(), reason="no /usr/lib/postgresql/*/bin: apt-get install postgresql"
)
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")

PROBE = """
import json, os, sys
from pathlib import Path
from prefect import flow

@flow
def probe(answer: str) -> None:
    Path(answer).write_text(json.dumps(dict(os.environ)))
"""

MLFLOW_RUN = """
import sys
from tasks.errors import JobFailed
from tasks.monitoring import mlflow_runs

parent = mlflow_runs.open_run("production", "pipeline", {"run_id": "r1"})
with mlflow_runs.closing(parent):
    try:
        with mlflow_runs.stage_run("production", "grpo", {"stage": "grpo"}, parent) as child:
            steps = range(int(sys.argv[1]))
            mlflow_runs.log_points(child, [{"step": n, "time": n, "metrics": {"reward": n / 2}} for n in steps])
            mlflow_runs.log_dict(child, {"seed": 1}, "profile.json")
            raise JobFailed("exit code 1")
    except JobFailed:
        pass
points = mlflow_runs.history(child, "reward")
print(child, len(points), *points[-1])
"""


class Production:
    """PostgreSQL and both servers as the page sets them up, with other paths, ports and passwords."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data
        self.etc = folder / "etc"
        self.ports = {"5432": str(free_port()), "4200": str(free_port()), "5000": str(free_port())}
        self.prefect_url = f"http://127.0.0.1:{self.ports['4200']}/api"
        self.mlflow_url = f"http://127.0.0.1:{self.ports['5000']}"
        self.words = {word: secrets.token_hex(12) for word in placeholders()}
        self.processes: list[subprocess.Popen] = []
        self.install()

    def install(self) -> None:
        """Copy the files, with every place, port and capital word of theirs replaced."""
        places = {"/etc/posttrain": self.etc, "/var/lib/posttrain": self.folder / "var", "/srv/posttrain": self.folder / "srv"}
        for place in places.values():
            place.mkdir()
        for source in FILES.iterdir():
            text = re.sub(r"\b[A-Z_]+\b", lambda found: self.words.get(found[0], found[0]), source.read_text())
            for name, place in places.items():
                text = text.replace(name, str(place))
            text = re.sub(r"\b(5432|4200|5000)\b", lambda found: self.ports[found[0]], text)
            (self.etc / source.name).write_text(text.replace("/opt/posttrain/.venv/bin", str(BIN)))

    def start_postgres(self) -> None:
        settings = {"port": self.ports["5432"], "listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.data)}
        self.postgres("initdb", "--auth-local=peer", "--auth-host=scram-sha-256", "-D", self.data / "pg")
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [*AS_POSTGRES, POSTGRES / "postgres", "-D", self.data / "pg", *options]
        self.start("postgres", command, PLAIN)
        ready = [POSTGRES / "pg_isready", "-h", "127.0.0.1", "-p", self.ports["5432"]]
        wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60, self.log("postgres").read_text)
        passwords = {name: self.words[name] for name in ("PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD")}
        self.postgres("psql", "postgres", stdin=(FILES / "databases.sql").read_bytes(), env=passwords)

    def postgres(self, program: str, *arguments: object, stdin: bytes | None = None, env: dict[str, str] = PLAIN) -> bytes:
        """Run one of PostgreSQL's programs as its superuser and return its standard output."""
        command = [*AS_POSTGRES, POSTGRES / program, *arguments]
        place = {"PGHOST": str(self.data), "PGPORT": self.ports["5432"]}
        done = subprocess.run(
            [str(part) for part in command], input=stdin, capture_output=True, cwd="/", env=PLAIN | place | env
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def rows(self, database: str, query: str) -> list[list[str]]:
        lines = self.postgres("psql", "--no-align", "--tuples-only", "-c", query, database).decode().splitlines()
        return [line.split("|") for line in lines]

    def counts(self, database: str) -> dict[str, int]:
        """Return the number of rows of every table."""
        tables = [row[0] for row in self.rows(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        query = " UNION ALL ".join(f"SELECT '{table}', count(*) FROM \"{table}\"" for table in tables)
        return {name: int(number) for name, number in self.rows(database, query)}

    def start_servers(self) -> None:
        prefect, mlflow = (self.start_unit(f"posttrain-{name}.service") for name in ("prefect", "mlflow"))
        for process, health in ((prefect, self.prefect_url + "/health"), (mlflow, self.mlflow_url + "/health")):
            wait_until(lambda p=process, h=health: answers(h) or p.poll() is not None, 180, self.logs)
            assert process.poll() is None, self.logs()

    def start_unit(self, name: str, instance: str = "") -> subprocess.Popen:
        """Do what systemd would: the file's variables and nothing else, then ExecStartPre, then ExecStart, in its folder."""
        settings = read_unit(self.etc / name.replace(f"@{instance}", "@"), instance)
        env = PLAIN | {"HOME": str(self.folder)} | dict(line.split("=", 1) for line in settings.get("Environment", []))
        for file in settings["EnvironmentFile"]:
            env |= read_env(Path(file))
        for line in settings.get("ExecStartPre", []):
            subprocess.run(line.split(), env=env, cwd=self.folder, check=True, capture_output=True)
        command = re.sub(r"\$\{(\w+)\}", lambda found: env[found[1]], settings["ExecStart"][0]).split()
        return self.start(name, command, env)

    def start(self, name: str, command: list[object], env: dict[str, str]) -> subprocess.Popen:
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                guarded([str(part) for part in command], 10), stdin=subprocess.PIPE, stdout=log, stderr=log, env=env,
                start_new_session=True, cwd=PROJECT if "worker" in command else "/",
            )  # fmt: skip
        self.processes.append(process)
        return process

    def stop(self, keep: int = 0) -> None:
        """End all processes but the first `keep`, the last one first."""
        while len(self.processes) > keep:
            process = self.processes.pop()
            process.stdin.close()
            process.wait()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in self.folder.glob("*.log"))

    def client(self, **env: str) -> dict[str, str]:
        """Return the environment of who uses the servers: worker.env and nothing else."""
        return PLAIN | {"HOME": str(self.folder)} | read_env(self.etc / "worker.env") | env

    def prefect(self, *arguments: str) -> str:
        command = [BIN / "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.client(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def placeholders() -> set[str]:
    """Return the capital words in the files that stand for a secret: values, and not names of variables."""
    text = "\n".join(path.read_text() for path in FILES.glob("*.env")) + (FILES / "mlflow-auth.ini").read_text()
    return set(re.findall(r"[=:]([A-Z_]+_(?:PASSWORD|KEY))\b", text))


def read_env(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def read_unit(file: Path, instance: str) -> dict[str, list[str]]:
    """Return the settings of a unit; each may be given more than once."""
    settings: dict[str, list[str]] = {}
    text = file.read_text().replace("%H", "here").replace("%I", instance).replace("%i", instance)
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            settings.setdefault(line.split("=", 1)[0], []).append(line.split("=", 1)[1])
    return settings


def status(url: str, credentials: str | None, body: dict[str, str] | None = None) -> int:
    """Return the HTTP status of a GET, or of a POST of `body`."""
    headers = {"Content-Type": "application/json"}
    if credentials is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    data = Path(tempfile.mkdtemp(prefix="posttrain-postgres-"))  # pytest's own folders are closed to the user postgres
    if AS_POSTGRES:
        shutil.chown(data, "postgres", "postgres")
    here = Production(tmp_path_factory.mktemp("production"), data)
    try:
        here.start_postgres()
        here.start_servers()
        user = {"username": "pipeline", "password": here.words["MLFLOW_PASSWORD"]}
        admin = f"admin:{here.words['MLFLOW_ADMIN_PASSWORD']}"
        assert status(f"{here.mlflow_url}/api/2.0/mlflow/users/create", admin, user) == 200
        yield here
    finally:
        here.stop()
        shutil.rmtree(data)


@pytest.fixture(scope="module")
def mlflow_run(production) -> str:
    """What the pipeline's own module left on the MLflow server: the id of a failed stage's run, and what it read back."""
    command = [BIN / "python", "-c", MLFLOW_RUN, "1001"]
    done = subprocess.run(command, env=production.client(), cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def probe(production) -> dict[str, str]:
    """The environment that a flow saw which the worker of GPU 1 ran."""
    answer = production.folder / "answer.json"
    (production.folder / "probing.py").write_text(PROBE)
    production.prefect("work-pool", "create", "gpu-h100", "--type", "process")
    place = f"working_dir={production.folder}"
    production.prefect("deploy", "probing.py:probe", "-n", "one", "-p", "gpu-h100", "--job-variable", place)
    production.start_unit("posttrain-gpu@1.service", "1")
    production.prefect("deployment", "run", "probe/one", "--param", f"answer={answer}", "--watch", "--watch-timeout", "120")
    return json.loads(answer.read_text())


@needs_systemd
def test_units_have_nothing_that_systemd_would_ignore(tmp_path):
    """systemd ignores a setting that it cannot read, with a warning and exit code 0: there must be no line at all."""
    for name in UNITS:
        text = (FILES / name).read_text().replace("/opt/posttrain/.venv/bin", str(BIN)).replace("/opt/posttrain", str(PROJECT))
        (tmp_path / name.replace("@.", "@0.")).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", *tmp_path.iterdir()], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_files_of_the_page_name_every_secret_once_generated():
    """The page generates them by name; one that it leaves out would be a password that everyone can read here."""
    generated = re.search(r"for name in ([A-Z_\s\\]+); do", (PROJECT / "docs" / "production.md").read_text())
    assert set(generated[1].replace("\\", "").split()) == placeholders()


PASSWORDS = [
    ("prefect_url", "/admin/version", "admin", "PREFECT_PASSWORD"),
    ("mlflow_url", "/api/2.0/mlflow/experiments/get?experiment_id=0", "pipeline", "MLFLOW_PASSWORD"),
]


@needs_postgres
@pytest.mark.parametrize(("server", "page", "user", "password"), PASSWORDS)
def test_server_without_its_password_is_refused(production, server, page, user, password):
    url = getattr(production, server) + page
    assert status(url, None) == 401
    assert status(url, f"{user}:wrong") == 401
    assert status(url, f"{user}:{production.words[password]}") == 200


@needs_postgres
def test_mlflow_user_who_is_no_admin_cannot_make_users(production):
    user = {"username": "guest", "password": "long enough for mlflow"}
    pipeline = f"pipeline:{production.words['MLFLOW_PASSWORD']}"
    assert status(f"{production.mlflow_url}/api/2.0/mlflow/users/create", pipeline, user) == 403


@needs_postgres
def test_run_of_the_pipeline_is_kept_whole_by_mlflow_on_postgresql(production, mlflow_run):
    run_id, num_points, step, value = mlflow_run.split()
    assert (num_points, step, value) == ("1001", "1000", "500.0")
    assert production.rows("mlflow", f"SELECT status FROM runs WHERE run_uuid = '{run_id}'") == [["FAILED"]]
    assert production.rows("mlflow", "SELECT count(*) FROM metrics WHERE key = 'reward'") == [["1001"]]
    assert len(list((production.folder / "var" / "mlflow-artifacts").rglob("profile.json"))) == 1
    assert production.rows("mlflow_auth", "SELECT username FROM users ORDER BY 1") == [["admin"], ["pipeline"]]


@needs_postgres
def test_wrong_mlflow_password_stops_a_run_before_it_starts_and_says_where(production):
    env = production.client(MLFLOW_TRACKING_PASSWORD="wrong")
    done = subprocess.run([BIN / "python", "-c", MLFLOW_RUN, "1"], env=env, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MachineUnfit" in done.stderr and production.mlflow_url in done.stderr and "401" in done.stderr


@needs_postgres
@pytest.mark.parametrize(
    ("wrong", "failed", "setting"),
    [
        ({}, [], ""),
        ({"PREFECT_API_AUTH_STRING": "prefect:wrong"}, ["Prefect at"], "PREFECT_API_AUTH_STRING"),
        ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, ["MLflow at"], "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_doctor_asks_each_server_as_the_user_it_is(wrong, failed, setting, production):
    env = production.client(**wrong)
    done = subprocess.run([BIN / "posttrain", "doctor"], env=env, cwd=PROJECT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    refused = [name for name in ("Prefect at", "MLflow at") if re.search(rf"{name} \S+ answers 40[13]", " ".join(text.split()))]
    assert refused == failed and setting in text, text


@needs_postgres
def test_flow_run_of_a_gpu_worker_is_completed_in_postgresql(production, probe):
    query = "SELECT r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id WHERE f.name = 'probe'"
    assert production.rows("prefect", query) == [["COMPLETED"]]


@needs_postgres
def test_gpu_worker_hands_its_flows_its_own_gpu_and_all_settings(production, probe):
    assert probe["CUDA_VISIBLE_DEVICES"] == "1"
    given = read_env(production.etc / "worker.env").items()
    wanted = {name: value for name, value in given if not name.startswith("PREFECT_WORKER_")}  # the worker's own business
    assert {name: probe.get(name) for name in wanted} == wanted


@needs_postgres
def test_databases_lost_and_restored_hold_every_row_and_serve_again(production, mlflow_run, probe):
    """The page's way: both servers stopped, a dump of each database, the database gone, the dump restored as its owner."""
    production.stop(keep=1)
    before = {name: production.counts(name) for name in DATABASES}
    dumps = {name: production.postgres("pg_dump", "--format=custom", name) for name in DATABASES}
    for name, dump in dumps.items():
        owner = name.split("_")[0]
        production.postgres("dropdb", name)
        production.postgres("createdb", f"--owner={owner}", name)
        restore = ["--exit-on-error", "--no-owner", f"--role={owner}", f"--dbname={name}"]
        production.postgres("pg_restore", *restore, stdin=dump)
    assert {name: production.counts(name) for name in DATABASES} == before
    assert before["prefect"]["flow_run"] == 1 and before["mlflow"]["metrics"] == 1001 and before["mlflow_auth"]["users"] == 2
    production.start_servers()
    runs = json.loads(production.prefect("flow-run", "ls", "--flow-name", "probe", "--output", "json"))
    assert [run["state"]["type"] for run in runs] == ["COMPLETED"]
    url = f"{production.mlflow_url}/api/2.0/mlflow/runs/get?run_id={mlflow_run.split()[0]}"
    assert status(url, f"pipeline:{production.words['MLFLOW_PASSWORD']}") == 200
