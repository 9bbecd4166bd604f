"""Asks a running server which model it serves: a release that nobody serves is none."""

import logging
import threading
import time

import httpx

from tasks.errors import ReleaseFailed, RunCancelled
from tasks.monitoring.registry import Version

POLL_SECONDS = 2.0
NEVER = threading.Event()
log = logging.getLogger("posttrain")


def served_name(profile: str, fingerprint: str) -> str:
    """Return the name under which a server lists exactly this export; beside it the profile's plain name is served."""
    return f"{profile}@{fingerprint}"


def assert_served(
    version: Version, address: str | None, timeout_seconds: float, stop: threading.Event | None = None, way_back: str = ""
) -> None:
    """Return when the server at this address, if there is one, serves this version; raises ReleaseFailed if it never does.

    `stop` ends the wait, with RunCancelled: the release is in force all the same. `way_back` is what else a person could do.
    """
    if not address:
        return
    wanted, end = served_name(version.name, version.fingerprint), time.monotonic() + timeout_seconds
    log.info("%s is the champion; waiting until %s serves it", version, address)
    while True:
        names, why = ask(address)
        if wanted in names:
            return
        if time.monotonic() > end:
            seen = why or f"still serves {', '.join(names) or 'nothing'}"
            raise ReleaseFailed(
                f"{version} is the champion, but {address} {seen} after "
                f"release.served_timeout_seconds ({timeout_seconds:g}). Start it anew: posttrain serve "
                f"{version.name}@champion{way_back}"
            )
        if (stop or NEVER).wait(POLL_SECONDS):
            raise RunCancelled(f"{version} is the champion; the run was stopped while it waited for {address} to serve it")


def models_at(address: str) -> list[str]:
    """Return the names of the models that an OpenAI-compatible server lists; none while it does not answer."""
    return ask(address)[0]


def ask(address: str) -> tuple[list[str], str]:
    """Return the names that a server lists, or none and why. A server on this machine is not asked through a proxy."""
    try:
        is_here = httpx.URL(address).host in ("127.0.0.1", "localhost", "::1")
        answer = httpx.get(f"{address.rstrip('/')}/v1/models", timeout=10, trust_env=not is_here).raise_for_status().json()
        return [model["id"] for model in answer["data"]], ""
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        return [], f"does not list what it serves ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
