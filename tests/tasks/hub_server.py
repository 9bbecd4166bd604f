"""A small program that takes a commit as the Hugging Face hub's HTTP API does: files beside the commit, large ones by LFS.

`python hub_server.py FOLDER TOKEN` prints its port. What was pushed to owner/name is in FOLDER/owner/name, and every request
with another token is refused with 401.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

FOLDER, TOKEN = Path(sys.argv[1]), sys.argv[2]
LFS: dict[str, bytes] = {}


def files(name: str) -> list[str]:
    return sorted(path.name for path in (FOLDER / name).iterdir() if not path.name.startswith("."))


def head(name: str) -> str:
    """The newest commit: its number, in 40 digits."""
    commits = FOLDER / name / ".commits"
    return f"{len(commits.read_text()) if commits.exists() else 0:040d}"


class Handler(BaseHTTPRequestHandler):
    """Answers what `create_repo` and `upload_folder` of huggingface_hub ask."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            folder = FOLDER / name
            if not (folder / ".visibility").exists():  # the hub changes nothing of a repository that is there
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".visibility").write_text(asked["visibility"])
            return self.answer({"url": f"{self.here()}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files
            ]
            return self.answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.here()}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self.commit(self.path.split("/api/models/")[1].split("/commit/")[0], body)
        return self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        LFS[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/api/models/")[1].split("/")[:2])
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in files(name)])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if not (FOLDER / name / ".visibility").exists():
            return self.answer({"error": "Repository not found"}, 404)
        is_private = (FOLDER / name / ".visibility").read_text() == "private"
        siblings = [{"rfilename": path} for path in files(name)]
        self.answer({"id": name, "sha": head(name), "siblings": siblings, "private": is_private})

    def commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.write(name, value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                self.write(name, value["path"], LFS[value["oid"]])
            elif line["key"] == "deletedFile":
                (FOLDER / name / value["path"]).unlink()
        with (FOLDER / name / ".commits").open("a") as commits:
            commits.write("c")
        self.answer({"success": True, "commitOid": head(name), "commitUrl": f"{self.here()}/{name}/commit/{head(name)}"})

    def write(self, name: str, path: str, data: bytes) -> None:
        file = FOLDER / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form: str, *parts: object) -> None:
        print(form % parts, file=sys.stderr, flush=True)


server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
