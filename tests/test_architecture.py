"""The house's rules that a reader could break without noticing: who imports whom, what is named how, how long a thing is."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
OURS = ("flows", "tasks", "profiles", "data_contracts")
FILES = sorted(path for package in OURS for path in (PROJECT / package).rglob("*.py"))
HEAVY = {"torch", "trl", "transformers", "peft", "vllm", "accelerate", "datasets"}


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively: code_digest does not follow that"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def below(*folders: str) -> list[Path]:
    return [path for path in FILES if name_of(path).startswith(folders)]


def closure(path: Path) -> set[Path]:
    """Return a file and every file of ours that it imports, directly or not."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        if (file := todo.pop()) in seen:
            continue
        seen.add(file)
        bases = [PROJECT.joinpath(*name.split(".")) for name in imports(file) if name.split(".")[0] in OURS]
        todo += [p for base in bases for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
    return seen


JOBS = below("tasks/jobs/")
OTHERS = [path for path in FILES if path not in JOBS]


@pytest.mark.parametrize(
    ("package", "may_import"),
    [
        ("flows", {"flows", "tasks", "profiles", "data_contracts"}),
        ("tasks", {"tasks", "profiles", "data_contracts"}),
        ("profiles", {"profiles"}),
        ("data_contracts", {"data_contracts"}),
    ],
)
def test_imports_run_one_way(package, may_import):
    wrong = {name_of(p): found for p in below(f"{package}/") if (found := packages(p) & set(OURS) - may_import)}
    assert wrong == {}


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_job_never_reaches_what_only_the_orchestrator_has(path):
    """Not even through another module of ours: the job environment has no prefect, no mlflow, no great_expectations."""
    wrong = {name_of(p): found for p in closure(path) if (found := packages(p) & {"prefect", "mlflow", "great_expectations"})}
    assert wrong == {}


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_orchestrator_never_imports_what_only_the_job_has(path):
    assert packages(path) & HEAVY == set()
    assert not {name for name in imports(path) if name.startswith("tasks.jobs.")}


def test_mlflow_is_imported_in_one_place():
    assert [name_of(p) for p in FILES if "mlflow" in packages(p)] == ["tasks/monitoring/mlflow_runs.py"]


def test_great_expectations_is_imported_only_beside_the_contracts_and_where_they_are_held():
    users = {name_of(p) for p in FILES if "great_expectations" in packages(p)}
    assert users
    assert {u for u in users if not u.startswith("data_contracts/")} <= {"tasks/validate_data.py"}


def test_jobs_are_started_as_modules_and_each_ends_in_a_main():
    """`accelerate launch --module`: a stage's module that does nothing when run would leave no result."""
    for stage in ("sft", "reward_model", "grpo", "dpo", "evaluate", "merge", "export"):
        assert '__name__ == "__main__"' in (PROJECT / "tasks" / "jobs" / f"{stage}.py").read_text()


def installed_modules() -> set[str]:
    """Return the top-level modules of both environments, as far as they are there."""
    job = (PROJECT / ".venv-job" / "lib").glob("python3*/site-packages/*")
    found = {path.name.split(".")[0] for path in job if path.suffix in ("", ".py", ".so")}
    return found | set(packages_distributions()) | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [*below("flows/"), *(p for p in below("tasks/") if p not in JOBS)], ids=name_of)
def test_module_is_not_named_like_an_installed_one(path):
    """tasks/guard.py is started by its path, which puts tasks/ first on sys.path: a twin there would be imported instead."""
    if path.stem != "__init__":
        assert path.stem not in installed_modules()


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_job_module_is_not_named_like_the_standard_library(path):
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_keeps_the_house_limits(path):
    """architecture.md §2: no file over 400 lines, no function over 80, nothing that is a drawer for everything."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 80] == []
    assert not {"utils", "util", "common", "helpers", "core"} & set(Path(name_of(path)).with_suffix("").parts)
    assert path.stem == "__init__" or ast.get_docstring(ast.parse(text)) is not None


def test_import_of_every_flow_and_profile_module_loads_nothing_heavy():
    """Each costs seconds: the command answers a wrong setting before any of them is loaded."""
    names = [name_of(p).removesuffix(".py").replace("/", ".") for p in below("flows/", "profiles/") if p.stem != "__init__"]
    code = f"import sys, {', '.join(names)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & (HEAVY | {"mlflow", "great_expectations", "duckdb", "matplotlib"}) == set()


def test_import_of_the_command_does_not_even_load_prefect():
    code = "import sys, flows.cli, flows.terminal, tasks.check_profile\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert "prefect" not in done.stdout.split()
