"""Identity: equal things have one fingerprint, different things have two, and what has no form has none."""

import copy
import datetime
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.fingerprints import PROJECT, fingerprint, library_versions, tree_digest

NAMES = st.text(min_size=1, max_size=6)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=8)
RECIPES = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4)


def shuffled(value, order: random.Random):
    """Return an equal value whose mappings were filled in another order."""
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: shuffled(value[key], order) for key in keys}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


def places(value, path=()):
    """Yield the path of every leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from (place for key, inner in items for place in places(inner, (*path, key)))
    if not isinstance(value, dict | list):
        yield path


@given(RECIPES, st.randoms(use_true_random=False))
def test_fingerprint_of_keys_in_another_order_is_the_same(recipe, order):
    assert fingerprint(shuffled(recipe, order)) == fingerprint(recipe)


@given(RECIPES, SCALARS, st.data())
def test_fingerprint_of_any_changed_value_is_another(recipe, new, data):
    changed = copy.deepcopy(recipe)
    leaves = list(places(recipe))
    if not leaves:  # only empty containers: a new key is a change as well
        changed["a new key"] = new
    else:
        *parents, last = data.draw(st.sampled_from(leaves))
        inner = changed
        for key in parents:
            inner = inner[key]
        inner[last] = [inner[last], new]
    assert fingerprint(changed) != fingerprint(recipe)


def test_fingerprint_is_twelve_hex_digits():
    value = fingerprint({"a": 1})
    assert len(value) == 12 and int(value, 16) >= 0


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (0, False), (1, 1.0), ("1", 1), (None, "null"), ([], {}), ("é", "e\u0301")]
)
def test_fingerprint_of_values_that_only_look_alike_differs(one, other):
    assert fingerprint({"x": one}) != fingerprint({"x": other})


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), {1, 2}, Path("x"), datetime.date(2026, 1, 1), b"x", object()]
)
def test_value_without_a_canonical_form_is_refused_wherever_it_stands(value):
    for identity in ({"x": value}, {"x": {"y": [1, value]}}):
        with pytest.raises((TypeError, ValueError)):
            fingerprint(identity)


@pytest.mark.parametrize("key", [1, True, None])
def test_key_that_is_no_text_is_refused(key):
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"x": {key: "a"}})


# --- code -----------------------------------------------------------------------------------------------------------------

SOURCES = {
    "tasks/__init__.py": "",
    "tasks/jobs/__init__.py": "",
    "tasks/jobs/top.py": "import json\nfrom tasks.jobs import middle\n\ndef main():\n    return middle.value()\n",
    "tasks/jobs/middle.py": "def value():\n    from tasks.jobs.bottom import LIMIT\n    return LIMIT\n",
    "tasks/jobs/bottom.py": '"""Says the limit."""\n\nLIMIT = 3  # the limit\n',
    "tasks/jobs/stranger.py": "LIMIT = 3\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of three modules in a chain and one beside it, with our own fingerprints.py."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(PROJECT / "tasks" / "fingerprints.py", tmp_path / "tasks")
    return tmp_path


def digest_of_top(project: Path) -> str:
    """Ask in a process of its own: digests are kept for a process's life."""
    code = "from tasks.fingerprints import code_digest; print(code_digest('tasks.jobs.top'))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=project, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("bottom", '"""Says another thing."""\nLIMIT = 3\n'),
        ("bottom", "# why three\nLIMIT = (\n    3\n)\n"),
        ("middle", 'def value():\n    """Return it."""\n    from tasks.jobs.bottom import LIMIT  # here\n\n    return LIMIT\n'),
        ("stranger", "LIMIT = 4\n"),
    ],
    ids=["docstring", "comment and layout", "function docstring", "module that is not imported"],
)
def test_code_digest_after_a_change_of_text_only_is_the_same(module, text, project):
    before = digest_of_top(project)
    (project / "tasks" / "jobs" / f"{module}.py").write_text(text)
    assert digest_of_top(project) == before


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("bottom", SOURCES["tasks/jobs/bottom.py"].replace("LIMIT = 3", "LIMIT = 4")),
        ("middle", SOURCES["tasks/jobs/middle.py"].replace("return LIMIT", "return -LIMIT")),
        ("top", SOURCES["tasks/jobs/top.py"].replace("import json", "import math")),
        ("bottom", SOURCES["tasks/jobs/bottom.py"] + "from tasks.jobs import stranger\n"),
    ],
    ids=["constant two imports below", "code of an import inside a function", "other import", "new module of ours"],
)
def test_code_digest_after_a_change_of_code_is_another(module, text, project):
    before = digest_of_top(project)
    (project / "tasks" / "jobs" / f"{module}.py").write_text(text)
    assert digest_of_top(project) != before


def test_code_digest_of_modules_that_import_each_other_ends(project):
    (project / "tasks" / "jobs" / "bottom.py").write_text("import tasks.jobs.top\nLIMIT = 3\n")
    assert digest_of_top(project)


# --- files and libraries --------------------------------------------------------------------------------------------------


def test_tree_digest_sees_a_byte_and_a_name_but_not_the_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_text("a")
    one = tree_digest(tmp_path / "one")
    assert tree_digest(tmp_path / "two") == one
    (tmp_path / "two" / "sub" / "a.txt").write_text("b")
    assert tree_digest(tmp_path / "two") != one
    (tmp_path / "one" / "sub" / "a.txt").rename(tmp_path / "one" / "sub" / "b.txt")
    assert tree_digest(tmp_path / "one") != one


@pytest.mark.parametrize(
    "hidden",
    [
        ".cache/x",
        ".DS_Store",
        "sub/.DS_Store",
    ],
)
def test_tree_digest_passes_over_hidden_files(hidden, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    before = tree_digest(tmp_path)
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_text("x")
    assert tree_digest(tmp_path) == before


def test_library_versions_are_those_of_the_asked_environment(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, version in (("torch", "9.9.9+cpu"), ("TRL", "8.8"), ("unrelated", "1")):
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert library_versions(tmp_path / "bin" / "python") == {"torch": "9.9.9", "trl": "8.8"}
