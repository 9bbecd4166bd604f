"""A job environment that is a folder: an interpreter's path, and library versions beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

MakeEnvironment = Callable[..., str]


@pytest.fixture
def job_environment_with(tmp_path: Path) -> MakeEnvironment:
    """Make an environment whose installed libraries have the given versions; return its interpreter's path."""

    def make(name: str = "job", **versions: str) -> str:
        site = tmp_path / name / "lib" / "python3.11" / "site-packages"
        for library, version in versions.items():
            folder = site / f"{library}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
        return str(python)

    return make
