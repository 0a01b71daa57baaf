"""A small Hub on loopback that speaks what `huggingface_hub` asks for: create, preupload, LFS, commit, resolve."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("".join(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories by name, LFS objects by sha256, and every request that came, as `METHOD path`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repositories[repo].files

    def card(self, repo: str) -> ModelCard:
        return ModelCard(self.files(repo)["README.md"].decode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str) -> None:
        self.answer({"error": what}, 404, X_Error_Code=what)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                repo = found.groupdict().get("repo")
                if repo is not None and repo not in self.server.repositories:
                    self.missing("RepoNotFound")
                else:
                    action(self, body, **found.groupdict())
                return
        self.missing("NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815  # names of http.server

    def validate(self, body: bytes) -> None:
        try:
            ModelCard(json.loads(body)["content"])
        except Exception as error:  # whatever is wrong with a card is told to the client
            self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        known = repo in self.server.repositories
        self.server.repositories.setdefault(repo, Repository())
        self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}, 409 if known else 200)

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.server.url}/objects/{file['oid']}"}}}
            for file in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer({"error": "wrong sha256"}, 400)
            return
        self.server.objects[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: str) -> None:
        repository = self.server.repositories[repo]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
            else:
                self.answer({"error": f"unknown entry {entry['key']}"}, 400)
                return
        self.answer({"commitOid": repository.sha, "commitUrl": f"{self.server.url}/{repo}/commit/{repository.sha}"})

    def resolve(self, body: bytes, repo: str, file: str) -> None:
        repository = self.server.repositories[repo]
        if file not in repository.files:
            self.missing("EntryNotFound")
            return
        content = repository.files[file]
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=repository.sha)

    def info(self, body: bytes, repo: str) -> None:
        repository = self.server.repositories[repo]
        self.answer(
            {
                "id": repo,
                "sha": repository.sha,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": name} for name in repository.files],
            }
        )

    def tree(self, body: bytes, repo: str) -> None:
        files = self.server.files(repo)
        self.answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )


ROUTES = [
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{REPOSITORY}/preupload/main", Handler.preupload),
    ("POST", f"/{REPOSITORY}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", Handler.upload),
    ("POST", f"/api/models/{REPOSITORY}/commit/main", Handler.commit),
    ("GET HEAD", rf"/{REPOSITORY}/resolve/\w+/(?P<file>.+)", Handler.resolve),
    ("GET", rf"/api/models/{REPOSITORY}(?:/revision/\w+)?", Handler.info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/\w+", Handler.tree),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
