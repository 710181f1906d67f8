# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub, for the real clients to talk to: in this process, nothing leaves the machine.

Every file is uploaded the regular way (no LFS, no Xet), as the Hub itself has it for small files.
"""

import base64
import hashlib
import json
import re
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Refusal(Exception):
    """An error answer, in the words that `huggingface_hub` turns into its own exceptions."""

    def __init__(self, status, code, message, **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


@dataclass
class Repo:
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit; pull requests live here too
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files, branch):
        self.branches[branch] = sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.snapshots[sha] = files
        return sha

    def resolve(self, rev):
        sha = self.branches.get(rev) or self.tags.get(rev) or rev
        if sha not in self.snapshots:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha


class Hub:
    """`repos[("models", "me/name")]` is what is stored, `requests` is what was asked: (method, path), oldest first."""

    def __init__(self):
        self.port, self.lock = 0, threading.Lock()
        self.reset()
        self.start()

    def reset(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []

    def start(self):
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @contextmanager
    def down(self):
        """No server inside this block: connections are refused, as on a machine without a network."""
        self.server.shutdown()
        self.server.server_close()
        try:
            yield
        finally:
            self.start()

    def files(self, name, revision="main", kind="models"):
        repo = self.repos[kind, name]
        return repo.snapshots[repo.resolve(revision)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(url.path)))
            try:
                status, data, headers = 200, *self.dispatch(url.path)
            except Refusal as refusal:
                status, data, headers = refusal.status, refusal.body, refusal.headers
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(206 if "Content-Range" in headers else status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_DELETE = answer

    def dispatch(self, path):
        writes = self.command in ("POST", "DELETE") and path != "/api/validate-yaml"
        if (writes or path == "/api/whoami-v2") and not self.headers.get("Authorization", "").startswith("Bearer "):
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        for method, pattern, handler in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if "name" in groups:
                    key = groups.pop("kind") or "models", groups.pop("name")
                    if key not in self.hub.repos:
                        raise Refusal(404, "RepoNotFound", "Repository not found")
                    groups |= {"name": key[1], "repo": self.hub.repos[key]}
                answer = handler(self, **groups)
                return answer if isinstance(answer, tuple) else (answer, {})
        raise Refusal(404, "NotFound", f"no route for {self.command} {path}")

    def log_message(self, *_):
        pass


ROUTES = []
REPO = "/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
FILE = "/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"


def route(method, pattern):
    return lambda handler: ROUTES.append((method, pattern, handler)) or handler


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@route("GET", "/api/whoami-v2")
def whoami(request):
    return {"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create_repo(request):
    spec, hub = json.loads(request.body), request.hub
    key = spec.get("type", "model") + "s", f"{spec.get('organization') or 'me'}/{spec['name']}"
    answer = {"url": f"{hub.url}/{key[1]}", "name": key[1], "id": key[1]}
    if key in hub.repos:
        raise Refusal(409, "RepoAlreadyExists", "You already created this repo", **answer)
    hub.repos[key] = Repo()
    hub.repos[key].commit({".gitattributes": b""}, "main")
    return answer


@route("GET", f"{REPO}(?:/revision/(?P<rev>[^/]+))?")
def info(request, name, repo, rev):
    sha = repo.resolve(rev or "main")
    siblings = [{"rfilename": path} for path in sorted(repo.snapshots[sha])]
    return {"_id": name, "id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings}


@route("GET", f"{REPO}/refs")
def refs(request, name, repo):
    def entries(space, commits):
        return [{"name": n, "ref": f"refs/{space}/{n}", "targetCommit": sha} for n, sha in commits.items()]

    return {"branches": entries("heads", repo.branches), "tags": entries("tags", repo.tags), "converts": []}


@route("GET", f"{REPO}/tree/(?P<rev>[^/]+)(?P<path>/.*)?")
def tree(request, name, repo, rev, path):
    files = {p: c for p, c in repo.snapshots[repo.resolve(rev)].items() if f"/{p}".startswith(f"{path or ''}/")}
    return [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in sorted(files.items())]


@route("POST", f"{REPO}/preupload/(?P<rev>[^/]+)")
def preupload(request, name, repo, rev):
    paths = [file["path"] for file in json.loads(request.body)["files"]]
    return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}


@route("POST", f"{REPO}/commit/(?P<rev>[^/]+)")
def commit(request, name, repo, rev):
    files, number = dict(repo.snapshots[repo.resolve(rev)]), len(repo.snapshots)
    for line in map(json.loads, request.body.splitlines()):
        match line:
            case {"key": "file", "value": {"path": path, "content": content}}:
                files[path] = base64.b64decode(content)
            case {"key": "deletedFile", "value": {"path": path}}:
                files.pop(path, None)
            case {"key": "deletedFolder", "value": {"path": path}}:
                files = {p: c for p, c in files.items() if not p.startswith(path.rstrip("/") + "/")}
            case {"key": key} if key != "header":
                raise Refusal(400, "BadRequest", f"{key} is not supported here")
    sha = repo.commit(files, f"refs/pr/{number}" if "create_pr" in request.query else rev)
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{request.hub.url}/{name}/commit/{sha}"}
    if "create_pr" in request.query:
        answer["pullRequestUrl"] = f"{request.hub.url}/{name}/discussions/{number}"
    return answer


@route("POST", f"{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(request, name, repo, branch):
    repo.branches[branch] = repo.resolve(json.loads(request.body or "{}").get("startingPoint") or "main")


@route("POST", f"{REPO}/tag/(?P<rev>[^/]+)")
def create_tag(request, name, repo, rev):
    repo.tags[json.loads(request.body)["tag"]] = repo.resolve(rev)


@route("HEAD", FILE)
@route("GET", FILE)
def resolve(request, name, repo, rev, path):
    sha = repo.resolve(rev)
    if path not in repo.snapshots[sha]:
        raise Refusal(404, "EntryNotFound", f"Entry not found: {path}")
    content = repo.snapshots[sha][path]
    headers = {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        content = content[first : last + 1]
    return content, headers
