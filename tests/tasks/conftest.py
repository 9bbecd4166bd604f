"""A job environment that is a folder (an interpreter's path, and library versions beside it), and a disk that is soon full."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB; skip where that is not allowed."""
    folder = tmp_path / "disk"

    def mount(size_kib: int) -> Path:
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("mounting a small disk needs root")
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
