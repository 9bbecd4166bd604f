"""A real S3 server: SeaweedFS, one process, on ports of 127.0.0.1."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_server import answers, wait_until

from tasks.guard import guarded

PARTS = ("master", "volume", "filer", "s3")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
NOTHING_ELSE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a client of a server that knows one user and makes no bucket by itself.

    Its whole process tree ends with the block.
    """
    user = {"accessKey": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secretKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
    identities = [{"name": "test", "credentials": [user], "actions": ["Admin"]}]
    (folder / "users.json").write_text(json.dumps({"identities": identities}))
    ports = free_ports(2 * len(PARTS))
    names = [f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
    command = [
        str(Path(sys.executable).parent / "weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3",
        "-filer", f"-s3.config={folder / 'users.json'}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=100",
        *[f"-{name}={port}" for name, port in zip(names, ports, strict=True)],
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            guarded(command, 1), stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    url = f"http://127.0.0.1:{ports[names.index('s3.port')]}"
    wait_until(lambda: answers(f"{url}/healthz"), 60, (folder / "server.log").read_text)
    try:
        yield CREDENTIALS | NOTHING_ELSE | {"AWS_ENDPOINT_URL": url}
    finally:
        process.stdin.close()
        process.wait()
        for port in ports:  # it names its sockets by its ports, and a killed one leaves them
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()
