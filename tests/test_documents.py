"""What the documents say can be done can be done: commands parse, make targets, links and profiles exist, examples load."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from flows.cli import app
from profiles.load import load, shipped

PROJECT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "profiles/*.md", ".github/**/*.md")
DOCUMENTS = sorted({path for pattern in PATTERNS for path in PROJECT.glob(pattern)})
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(), re.M))
PARSER = typer.main.get_command(app)
UsageError = typer.BadParameter.__base__  # what every wrong option and argument is; typer carries its own click


@dataclass(frozen=True)
class Fence:
    language: str
    text: str


def fences(text: str) -> list[Fence]:
    return [Fence(*found) for found in FENCE.findall(text)]


def commands(text: str, program: str) -> list[str]:
    """Return every command of a program: the lines of fenced blocks, and code spans. A trailing comment is cut off."""
    lines = [line for fence in fences(text) if fence.language not in ("yaml", "python") for line in fence.text.splitlines()]
    candidates = [line.strip().removeprefix("$ ") for line in lines] + SPAN.findall(FENCE.sub("", text))
    wanted = re.compile(rf"(?:\.venv/bin/)?{program}\s+(\S.*)")
    return [found[1].split(" #")[0].strip() for line in candidates if (found := wanted.fullmatch(line.strip()))]


def is_placeholder(word: str) -> bool:
    """PROFILE, <profile>, FILE and … stand for something that the reader puts there."""
    return word.isupper() or "<" in word or "…" in word


def problem_of(command: str) -> str | None:
    """Return what is wrong with the arguments of a `posttrain` command, or None. Nothing is run."""
    # [--json] is an option that may be given; placement.default.tags=[cpu] is a list
    words = [word if "=[" in word else word.strip("[]") for word in shlex.split(command)]
    if words[1:2] == ["|"]:  # run | plan | validate: a list of commands
        return next((f"there is no command {word!r}" for word in words if word not in ("|", *PARSER.commands)), None)
    if words[0] in ("…", "--help") or is_placeholder(words[0]):
        return None
    if words[0] not in PARSER.commands:
        return f"there is no command {words[0]!r}"
    try:
        given = PARSER.commands[words[0]].make_context(words[0], words[1:]).params
    except typer.Exit:  # --help
        return None
    except UsageError as error:
        return str(error)
    name, overrides = given.get("profile"), given.get("overrides") or ()
    if name is None or is_placeholder(name) or name.endswith(".yaml"):
        return None
    if name not in shipped():
        return f"there is no profile {name!r}"
    settings = [setting for setting in overrides if not setting.startswith("key.path") and not is_placeholder(setting)]
    try:
        load(name, settings)
    except ValueError as error:
        return str(error)
    return None


def broken_links(text: str, folder: Path) -> list[str]:
    targets = [link.split("#")[0] for link in LINK.findall(FENCE.sub("", text)) if not re.match(r"[a-z]+:", link)]
    return [target for target in targets if target and not (folder / target).exists()]


documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(PROJECT).as_posix())


@documents
def test_document_names_only_make_targets_that_exist(path):
    named = {
        word for command in commands(path.read_text(), "make") for word in command.split() if re.fullmatch(r"[a-z][\w-]*", word)
    }
    assert named - TARGETS == set()


@documents
def test_document_shows_only_commands_that_parse(path):
    problems = {command: problem for command in commands(path.read_text(), "posttrain") if (problem := problem_of(command))}
    assert problems == {}


@documents
def test_document_links_only_to_files_that_exist(path):
    assert broken_links(path.read_text(), path.parent) == []


@documents
def test_document_names_only_files_of_ours_that_exist(path):
    """Code spans like `tasks/jobs/dpo.py`; one with a placeholder in it stands for many."""
    spans = [span for span in SPAN.findall(FENCE.sub("", path.read_text())) if "<" not in span and "*" not in span]
    named = [
        s for s in spans if re.fullmatch(r"(flows|tasks|profiles|data_contracts|tests|docs|requirements|\.ci)/[\w./-]+", s)
    ]
    assert [name for name in named if not (PROJECT / name).exists()] == []


@documents
def test_document_has_no_gap_left_to_fill(path):
    assert re.findall(r"@@\w+@@|\bTODO\b|\bTBD\b", path.read_text()) == []


@documents
def test_document_shows_only_profiles_that_load(path, tmp_path):
    for number, fence in enumerate(f for f in fences(path.read_text()) if f.language == "yaml"):
        content = yaml.safe_load(fence.text)
        if isinstance(content, dict) and "recipe" in content and ("extends" in content or "description" in content):
            example = tmp_path / f"example{number}.yaml"
            example.write_text(fence.text)
            assert load(str(example)).name == example.stem


def test_makefile_runs_only_commands_that_parse():
    lines = [line.strip() for line in (PROJECT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    found = [line.split("posttrain ", 1)[1] for line in lines if "bin/posttrain " in line]
    assert found
    assert {command: problem for command in found if (problem := problem_of(command))} == {}


def test_check_of_a_document_finds_what_is_wrong_in_one(tmp_path):
    """The checks above can fail: a document with one of each mistake."""
    text = "Run `posttrain run quikstart`, see [there](gone.md) and [here](#top).\n"
    text += "```\nmake quickstrat  # now\nposttrain plan quickstart\n```\n"
    assert commands(text, "make") == ["quickstrat"]
    assert commands(text, "posttrain") == ["plan quickstart", "run quikstart"]
    assert broken_links(text, tmp_path) == ["gone.md"]
    wrong = ["run quikstart", "run quickstart --jsn", "pln quickstart", "ui --port 1", "run | pln | ui"]
    wrong += ["run quickstart --set recipe.polcy.lora=null", "plan quickstart --set recipe.seed=many"]
    assert [command for command in wrong if problem_of(command) is None] == []
    right = ["run PROFILE", "run quickstart --json", "run mine.yaml", "ui", "validate --kind KIND --data FILE", "run --help"]
    assert [command for command in right if problem_of(command)] == []
