"""Asks a running server which model it serves: a release that nobody serves is none."""

import time
from typing import Any

import httpx

from tasks.errors import ReleaseFailed
from tasks.monitoring.registry import Version

POLL_SECONDS = 2.0


def served_name(profile: str, fingerprint: str) -> str:
    """Return the name under which a server lists exactly this export; beside it the profile's plain name is served."""
    return f"{profile}@{fingerprint}"


def assert_served(version: Version, address: str | None, timeout_seconds: float) -> None:
    """Return when the server at this address, if there is one, serves this version; raises ReleaseFailed if it never does."""
    if not address:
        return
    wanted, end = served_name(version.name, version.fingerprint), time.monotonic() + timeout_seconds
    while wanted not in (names := models_at(address)):
        if time.monotonic() > end:
            raise ReleaseFailed(
                f"{version} is the champion, but {address} still serves {', '.join(names) or 'nothing'} after "
                f"release.served_timeout_seconds ({timeout_seconds:g}). Start it anew: posttrain serve "
                f"{version.name}@champion; or go back: posttrain rollback {version.name}"
            )
        time.sleep(POLL_SECONDS)


def models_at(address: str) -> list[str]:
    """Return the names of the models that an OpenAI-compatible server lists; none while it does not answer."""
    try:
        answer: dict[str, Any] = httpx.get(f"{address.rstrip('/')}/v1/models", timeout=10).raise_for_status().json()
        return [model["id"] for model in answer["data"]]
    except (httpx.HTTPError, ValueError, KeyError):
        return []
