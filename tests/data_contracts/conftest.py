"""Rows to start from: one clean factory per kind and form, and a file to put them in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WriteRows = Callable[..., Path]
_SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def shared_data() -> Path:
    """The folder of real sets, which stands beside the repository and is no part of it."""
    if not _SHARED.is_dir():
        pytest.skip(f"the real sets are not at {_SHARED}")
    return _SHARED


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


_CLEAN = {
    ("language_modeling", "standard"): lambda n: {"text": f"Text number {n}."},
    ("language_modeling", "conversational"): lambda n: {"messages": _user(f"Say {n}") + _assistant(f"{n}.")},
    ("prompt_completion", "standard"): lambda n: {"prompt": f"Say {n}", "completion": f" {n}."},
    ("prompt_completion", "conversational"): lambda n: {
        "prompt": _user(f"Say {n}"),
        "completion": _assistant(f"{n}."),
    },
    ("preference", "standard"): lambda n: {"prompt": f"Say {n}", "chosen": f" {n}.", "rejected": " No, I will not."},
    ("preference", "conversational"): lambda n: {
        "prompt": _user(f"Say {n}"),
        "chosen": _assistant(f"{n}." if n % 2 else f"Gladly, here it is: {n}."),
        "rejected": _assistant("No, I will not."),
    },
    ("unpaired_preference", "standard"): lambda n: {"prompt": f"Say {n}", "completion": f" {n}.", "label": n % 2 == 0},
    ("unpaired_preference", "conversational"): lambda n: {
        "prompt": _user(f"Say {n}"),
        "completion": _assistant(f"{n}."),
        "label": n % 2 == 0,
    },
    ("stepwise_supervision", "standard"): lambda n: {
        "prompt": f"Say {n} twice",
        "completions": [f"First: {n}.", f"Second: {n}."],
        "labels": [True, n % 2 == 0],
    },
    ("prompt_only", "standard"): lambda n: {"prompt": f"Say {n}", "solution": str(n), "weight": n / 2, "level": n},
    ("prompt_only", "conversational"): lambda n: {"prompt": _user(f"Say {n}"), "is_hard": n > 3},
    ("eval", "standard"): lambda n: {"prompt": f"Say {n}", "answer": str(n)},
    ("eval", "conversational"): lambda n: {"prompt": _user(f"Say {n}"), "answer": str(n), "topic": "numbers"},
}


@pytest.fixture(params=_CLEAN, ids="-".join)
def kind_and_form(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def clean_rows() -> Callable[[str, str, int], list[dict]]:
    def make(kind: str, form: str, count: int) -> list[dict]:
        return [_CLEAN[kind, form](n) for n in range(count)]

    return make
