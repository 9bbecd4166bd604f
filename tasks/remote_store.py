"""The part of the store that machines without a common disk share: a folder (file://) or a bucket (s3://), through fsspec.

A bucket has no rename, so an artifact begins to exist with its manifest, which is written last and only if none is there. The
files lie beside it in a folder named after their digest: two builds of one key never write to the same place.
"""

import errno
import json
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.errors import MachineUnfit
from tasks.failures import BUG, HICCUP

log = logging.getLogger("posttrain")
MANIFEST = "manifest.json"
THREADS = 4  # s3fs holds up to ten parts of 50 MiB in memory for each file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class RemoteStore:
    """`<url>/<stage>/<fingerprint>/` for artifacts, `<url>/runs/<work>/` for what a job says while it runs."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        self.is_folder = url.startswith("file:")
        scheme, _, place = self.url.partition("://")
        if not scheme or not place or (self.is_folder and not place.startswith("/")):
            raise MachineUnfit(_unusable(url, "that is no address"))
        # Another process's writes must be seen at once: no cache of listings. A bucket has no folders to make.
        options = {"auto_mkdir": True} if self.is_folder else {}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise MachineUnfit(_unusable(url, str(error))) from None

    def id(self) -> str:
        """Return what was written into the store when it was first used: one address may lead to two places, and two to one."""
        path = f"{self.root}/.id"
        with self._errors_named():
            with suppress(FileNotFoundError):
                return self.fs.cat_file(path).decode()
            self._create(path, uuid.uuid4().hex.encode())
            return self.fs.cat_file(path).decode()

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return an artifact's manifest if it is there and every file of it has the manifest's size, else None."""
        with self._errors_named():
            sizes = self._sizes(self._place(stage, key))
            if MANIFEST not in sizes:
                return None
            with suppress(FileNotFoundError):
                content, problem = _judge(self.fs.cat_file(self._manifest(stage, key)), sizes)
                if problem is None:
                    return content
                log.warning("%s/%s/%s is damaged (%s): it will be built again", self.url, stage, key, problem)
        return None

    def push(self, folder: Path, stage: str, key: str) -> dict[str, Any]:
        """Copy a whole artifact there and return the manifest that is there then: the first of two builds stays."""
        if (first := self.manifest(stage, key)) is not None:
            return first
        content = (folder / MANIFEST).read_bytes()
        made = json.loads(content)
        target = f"{self._place(stage, key)}/{made['artifact']['digest']}"
        with self._errors_named(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self.fs.put_file(str(folder / name), f"{target}/{name}"), made["files"]))
        kept = self._publish(stage, key, content)
        if kept is None:
            raise MachineUnfit(_unusable(self.url, f"what was written to {self.address(stage, key)} is not there whole"))
        return kept

    def pull(self, stage: str, key: str, into: Path) -> None:
        """Copy the manifest and the files that it names into an empty folder; of one with files amiss, the manifest alone."""
        with self._errors_named(let_pass=DISK_FULL), suppress(FileNotFoundError):
            content = self.fs.cat_file(self._manifest(stage, key))
            (into / MANIFEST).write_bytes(content)
            manifest, problem = _judge(content, self._sizes(self._place(stage, key)))
            if problem is None:
                source = f"{self._place(stage, key)}/{manifest['artifact']['digest']}"
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(lambda name: self._get(f"{source}/{name}", into / name), manifest["files"]))

    def forget(self, stage: str, key: str) -> None:
        """Remove an artifact's manifest: what is damaged must not be found again."""
        with self._errors_named(), suppress(FileNotFoundError):
            self.fs.rm_file(self._manifest(stage, key))

    def put_work(self, work: str, path: Path) -> None:
        """Copy one file of a job's work folder there; a store that does not answer costs the job a warning and no more."""
        try:
            with self._errors_named():
                self.fs.put_file(str(path), f"{self.root}/runs/{work}/{path.name}")
        except MachineUnfit as error:
            log.warning("%s of %s was not copied: %s", path.name, work, error)

    def get_work(self, work: str, path: Path) -> None:
        """Bring one file of a job's work folder up to date here, or warn: a .json whole, of a log that grew its new end."""
        try:
            with self._errors_named(), suppress(FileNotFoundError):
                self._bring(f"{self.root}/runs/{work}/{path.name}", path)
        except MachineUnfit as error:
            log.warning("%s of %s was not brought here: %s", path.name, work, error)

    def address(self, stage: str, key: str) -> str:
        return f"{self.url}/{stage}/{key}"

    def _place(self, stage: str, key: str) -> str:
        return f"{self.root}/{stage}/{key}"

    def _manifest(self, stage: str, key: str) -> str:
        return f"{self._place(stage, key)}/{MANIFEST}"

    def _sizes(self, folder: str) -> dict[str, int]:
        found = self.fs.find(folder, detail=True)
        start = len(folder.strip("/")) + 1
        return {path.strip("/")[start:]: entry["size"] for path, entry in found.items()}

    def _publish(self, stage: str, key: str, content: bytes) -> dict[str, Any] | None:
        """Write the manifest unless a whole artifact has one there, and return the one that holds."""
        with self._errors_named():
            if not self._create(self._manifest(stage, key), content) and self.manifest(stage, key) is None:
                self.forget(stage, key)
                self._create(self._manifest(stage, key), content)
        return self.manifest(stage, key)

    def _create(self, target: str, content: bytes) -> bool:
        """Write a file at once and whole, and return True; if it is there already leave it, and return False."""
        try:
            if not self.is_folder:
                self.fs.pipe_file(target, content, mode="create")
                return True
            beside = f"{target}.{uuid.uuid4().hex[:8]}"
            try:
                self.fs.pipe_file(beside, content)
                self.fs.link(beside, target)
            finally:
                self.fs.rm_file(beside)
        except OSError:  # not every S3 server says which condition of a write did not hold, as s3fs asks for FileExistsError
            if not self.fs.exists(target):
                raise
            return False
        return True

    def _get(self, source: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(source, str(path))

    def _bring(self, source: str, path: Path) -> None:
        # In this order: on a common disk `path` is the file that the job appends to, and its copy is never ahead of it.
        there = self.fs.size(source)
        here = path.stat().st_size if path.is_file() else 0
        if path.suffix == ".json":
            path.write_bytes(self.fs.cat_file(source))
        elif there > here:
            with path.open("ab") as file:
                file.write(self.fs.cat_file(source, start=here))

    @contextmanager
    def _errors_named(self, let_pass: tuple[int, ...] = ()) -> Iterator[None]:
        """Turn what fsspec and the libraries below it raise into an error that names the setting."""
        try:
            yield
        except MachineUnfit:
            raise
        except Exception as error:  # botocore's and aiohttp's errors share no other class with OSError
            if isinstance(error, OSError) and error.errno in let_pass:
                raise
            cause = BUG if isinstance(error, PermissionError | FileNotFoundError) else HICCUP
            raise MachineUnfit(_unusable(self.url, f"{type(error).__name__}: {error}"), cause) from error


def _judge(content: bytes, sizes: dict[str, int]) -> tuple[dict[str, Any], str | None]:
    """Return a manifest's content and what is wrong with the files that are there, if anything."""
    try:
        manifest = json.loads(content)
        digest, _ = manifest["artifact"]["digest"], manifest["identity"]
        wrong = [name for name, entry in manifest["files"].items() if sizes.get(f"{digest}/{name}") != entry["size"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"manifest unreadable: {type(error).__name__}: {error}"
    return manifest, f"{wrong[0]} is missing or has another size" if wrong else None


def _unusable(url: str, problem: str) -> str:
    return (
        f"POSTTRAIN_STORE is {url!r}, and it cannot be used: {problem}. No artifact can be found there or left there. "
        "Name a folder (file:///a/shared/folder) or a prefix in a bucket that exists (s3://bucket/prefix, with "
        "AWS_ENDPOINT_URL and credentials as for any AWS client), or unset it to keep artifacts on this machine only."
    )
