"""One real server per module."""

from collections.abc import Iterator

import pytest
from real_s3 import s3_server
from real_server import Server, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the shipped pools and deployments; the workers are each test's own business."""
    server = Server(tmp_path_factory.mktemp("server"), free_port())
    try:
        done = server.posttrain("pools")
        assert done.returncode == 0, done.stderr
        server.prefect("deploy", "--all")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server; returns the environment variables by which any AWS client finds it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as client:
        yield client
