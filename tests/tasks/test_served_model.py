"""What a server says it serves, asked over HTTP; the server is a small program that lists what it was told."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tasks.errors import ReleaseFailed, RunCancelled
from tasks.monitoring.registry import Version
from tasks.served_model import ask, assert_served, models_at

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
names = sys.argv[1:]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": name} for name in (names if len(names) < 2 else [names.pop(0)])]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
VERSION = Version("mine", 3, 0.0, "", {"fingerprint": "abc", "run_id": "run"})


@pytest.fixture
def serving() -> Iterator:
    """A function that starts a server which lists one name after the other, the last one for ever; returns its address."""
    started = []

    def start(*names: str) -> str:
        process = subprocess.Popen([sys.executable, "-c", SERVER, *names], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return f"http://127.0.0.1:{process.stdout.readline().strip()}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_server_of_this_very_export_is_believed(serving):
    assert_served(VERSION, serving("mine@abc"), 1)


def test_server_that_comes_to_serve_it_is_waited_for(serving):
    assert_served(VERSION, serving("mine@old", "mine@abc"), 30)


def test_server_of_another_export_is_named_with_what_it_serves(serving):
    with pytest.raises(ReleaseFailed, match="still serves mine@old"):
        assert_served(VERSION, serving("mine@old"), 0)


def test_server_that_does_not_answer_serves_nothing():
    assert models_at("http://127.0.0.1:9") == []
    with pytest.raises(ReleaseFailed, match="does not list what it serves .ConnectError"):
        assert_served(VERSION, "http://127.0.0.1:9", 0)


@pytest.mark.parametrize("address", ["http://host:port", "http://[::1", "nowhere"])
def test_address_that_is_none_lists_nothing_and_says_why(address):
    names, why = ask(address)
    assert names == [] and "does not list" in why


def test_server_that_answers_otherwise_is_named_with_its_answer(serving):
    names, why = ask(f"{serving('mine@abc')}/v1")
    assert names == [] and "404" in why


def test_server_on_this_machine_is_not_asked_through_a_proxy(serving, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert models_at(serving("mine@abc")) == ["mine@abc"]


def test_run_that_is_stopped_waits_for_no_server():
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunCancelled, match="is the champion"):
        assert_served(VERSION, "http://127.0.0.1:9", 600, stop)


def test_without_an_address_nobody_is_asked():
    assert_served(VERSION, None, 0)
