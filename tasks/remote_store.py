"""The part of the store that machines without a common disk share: any file system that fsspec speaks (s3://, file://, …).

An object store has no rename, so the manifest is written last: without one, what lies there does not exist.
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.errors import MachineUnfit

log = logging.getLogger("posttrain")
MANIFEST = "manifest.json"
THREADS = 8


class RemoteStore:
    """`<url>/<stage>/<fingerprint>/` for artifacts, `<url>/runs/<work>/` for what a job says while it runs."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise MachineUnfit(
                f"POSTTRAIN_STORE is {url!r}: {error}. Use file:///a/shared/folder or s3://bucket/prefix."
            ) from None

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return an artifact's manifest if it is there and every file of it has the manifest's size, else None."""
        folder = self._place(stage, key)
        try:
            content = json.loads(self.fs.cat_file(f"{folder}/{MANIFEST}"))
        except FileNotFoundError:
            return None
        self.fs.invalidate_cache(folder)
        sizes = self._sizes(folder)
        wrong = [name for name, entry in content["files"].items() if sizes.get(name) != entry["size"]]
        if wrong:
            log.warning("%s/%s/%s is damaged (%s): it will be built again", self.url, stage, key, wrong[0])
            return None
        return content

    def push(self, folder: Path, stage: str, key: str) -> str:
        """Copy a whole artifact there and return its address; the manifest makes it exist, so it goes last."""
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        target = self._place(stage, key)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self._put(folder / name, f"{target}/{name}"), [n for n in names if n != MANIFEST]))
        self._put(folder / MANIFEST, f"{target}/{MANIFEST}")
        return self.address(stage, key)

    def pull(self, stage: str, key: str, into: Path) -> None:
        """Copy every file that the manifest names, and the manifest, into an empty folder."""
        source = self._place(stage, key)
        manifest = self.fs.cat_file(f"{source}/{MANIFEST}")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self._get(f"{source}/{name}", into / name), json.loads(manifest)["files"]))
        (into / MANIFEST).write_bytes(manifest)

    def forget(self, stage: str, key: str) -> None:
        """Remove an artifact's manifest: what is damaged must not be found again."""
        self.fs.rm_file(f"{self._place(stage, key)}/{MANIFEST}")

    def put_work(self, work: str, path: Path) -> None:
        """Copy one file of a job's work folder there, over what was there before."""
        self._put(path, f"{self.root}/runs/{work}/{path.name}")

    def get_work(self, work: str, path: Path) -> None:
        """Bring one file of a job's work folder up to date here; one that only grew is read from where it ended."""
        source = f"{self.root}/runs/{work}/{path.name}"
        have = path.stat().st_size if path.is_file() else 0
        try:
            self.fs.invalidate_cache(f"{self.root}/runs/{work}")
            if self.fs.size(source) > have:
                with path.open("ab") as file:
                    file.write(self.fs.cat_file(source, start=have))
        except FileNotFoundError:
            return

    def address(self, stage: str, key: str) -> str:
        return f"{self.url}/{stage}/{key}"

    def _place(self, stage: str, key: str) -> str:
        return f"{self.root}/{stage}/{key}"

    def _sizes(self, folder: str) -> dict[str, int]:
        found = self.fs.find(folder, detail=True)
        start = len(folder.strip("/")) + 1
        return {path.strip("/")[start:]: entry["size"] for path, entry in found.items()}

    def _put(self, path: Path, target: str) -> None:
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self.fs.put_file(str(path), target)

    def _get(self, source: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(source, str(path))
