"""A stand-in for the Hugging Face hub, as far as downloads of a revision and uploads ask it."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


class FakeHub:
    """Repositories by `KIND/OWNER/NAME`, each a list of commits; the last one is `main`."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, Files]]] = {}
        self.uploads: dict[str, Files] = {}
        self.created: dict[str, str | None] = {}
        """Visibility of the repositories for uploads, by OWNER/NAME."""
        self.refused = "nothing"
        """Part of the paths that a user without permission is refused."""
        self.requests: list[str] = []
        self.url = ""

    def commit(self, kind: str, repo: str, files: Files) -> str:
        """Add a commit and return its hash."""
        commits = self.commits.setdefault(f"{kind}s/{repo}", [])
        sha = hashlib.sha1(f"{repo}/{len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def find(self, key: str, revision: str) -> tuple[str, Files] | None:
        """Return the commit of a revision, `main` or a hash."""
        commits = self.commits[key]
        return next((c for c in commits if c[0] == revision), None) or (
            commits[-1] if revision == "main" else None
        )


def folder(path: Path, **more: str) -> Files:
    """Return the files of a folder, and further ones."""
    read = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    return read | {name: text.encode() for name, text in more.items()}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: object) -> None:
            self.answer(json.dumps(value).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            if hub.refused in path:
                return self.answer(b"", 403, X_Error_Message="no permission")
            words = _parts(path)
            key = "/".join(words[:3])
            if (repo := "/".join(words[1:3])) in hub.created:
                private = hub.created[repo] == "private"
                return self.json({"id": repo, "private": private, "siblings": []})
            if key not in hub.commits or len(words) < 5:
                return self.answer(b"", 404, X_Error_Code="RepoNotFound")
            _, owner, name, what, revision, *rest = words
            if (found := hub.find(key, revision)) is None:
                return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
            sha, files = found
            if what == "revision":
                return self.json({"id": f"{owner}/{name}", "sha": sha, "siblings": []})
            if what == "tree":
                return self.json(
                    [
                        {"type": "file", "path": p, "size": len(c), "oid": _sha(c)}
                        for p, c in files.items()
                    ]
                )
            content = files["/".join(rest)]
            return self.answer(content, ETag=f'"{_sha(content)}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            hub.requests.append(f"POST {path}")
            if hub.refused in path:
                return self.answer(b"", 403, X_Error_Message="no permission")
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                code = 409 if repo in hub.created else 200
                hub.created.setdefault(repo, asked.get("visibility"))
                return self.answer(json.dumps({"url": f"{hub.url}/{repo}"}).encode(), code)
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            repo = "/".join(path.split("/")[3:5])
            if "/preupload/" in path:
                asked = json.loads(body)["files"]
                rest = {"uploadMode": "regular", "shouldIgnore": False}
                return self.json({"files": [{"path": f["path"], **rest} for f in asked]})
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.uploads[repo] = {f["path"]: base64.b64decode(f["content"]) for f in files}
            done = {"commitOid": "c" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'c' * 40}"}
            return self.json({"success": True, **done})

    return Handler


def _parts(path: str) -> list[str]:
    """Return kind, owner, name, question, revision and the rest of a request's path."""
    words = path.split("/")
    if words[0] == "api":
        return words[1:]
    kind = [] if words[0] == "datasets" else ["models"]
    return [*kind, *words]


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Serve a hub, to this process and to those that it starts, with its own cache."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    settings = {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
