"""A small Hub on loopback: the endpoints that the real client uses to create, upload, commit, list and download.

It keeps everything in memory, checks tokens, parents and checksums, and can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
READER = "hf_reader"
EMPTY = hashlib.sha1(b"").hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits by sha; branches and pull requests by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {EMPTY: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})
    messages: list[str] = field(default_factory=list)

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", body: Any = None) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body or {}


class LoopbackHub:
    """A Hub at `url`. `fail` maps a pattern of "METHOD /path" to (status, how many times).

    `lose_answers` maps such a pattern to how many requests are carried out but answered by a closed connection.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.fail: dict[str, tuple[int, int]] = {}
        self.lose_answers: dict[str, int] = {}
        self.before_commit: Any = None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Any) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit(self, name: str, ref: str, changes: dict[str, bytes | None], message: str = "") -> str:
        """Commit changes (`None` deletes) to a branch; returns the sha."""
        repository = self.repositories[name]
        files = {**repository.files(ref), **changes}
        kept = {path: data for path, data in files.items() if data is not None}
        content = repr((repository.refs[ref], len(repository.commits), sorted(map(git_hash, kept.values()))))
        sha = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[sha] = kept
        repository.refs[ref] = sha
        repository.messages.append(message)
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.body()
        line = f"{self.command} {path}"
        try:
            with self.hub.lock:
                self.hub.log.append(line)
                self.maybe_fail(line)
                result, headers = self.route(path, query, body)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers["X-Error-Message"] = refusal.message
            self.send(refusal.status, {"error": refusal.message, **refusal.body}, headers)
            return
        for pattern, times in self.hub.lose_answers.items():
            if times and re.match(pattern, line):
                self.hub.lose_answers[pattern] -= 1
                self.close_connection = True
                return
        self.send(200, result, headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().strip(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, status: int, result: Any, headers: dict[str, str]) -> None:
        data = result if isinstance(result, bytes) else json.dumps(result).encode()
        kind = "application/octet-stream" if isinstance(result, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def maybe_fail(self, line: str) -> None:
        for pattern, (status, times) in self.hub.fail.items():
            if times and re.match(pattern, line):
                self.hub.fail[pattern] = (status, times - 1)
                raise Refused(status, "asked to fail")

    def may(self, write: bool = False) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and token != TOKEN:
            raise Refused(403 if token else 401, "you may not write here")
        return bool(token)

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.may()):
            raise Refused(404 if self.may() else 401, "Repository not found", "RepoNotFound")
        return found

    def sha(self, repository: Repository, revision: str) -> str:
        sha = repository.sha(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[Any, dict[str, str]]:
        for pattern, method, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return handle(self, *match.groups(), query=query, body=body)
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    def whoami(self, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        if not self.may():
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}

    def validate(self, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        return {"errors": [], "warnings": []}, {}

    def create(self, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        self.may(write=True)
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo", body=answer)
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return answer, {}

    def info(self, name: str, revision: str | None, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        repository = self.repository(name)
        sha = self.sha(repository, revision or "main")
        siblings = [{"rfilename": file} for file in repository.commits[sha]]
        common = {"id": name, "modelId": name, "sha": sha, "private": repository.private}
        return {"_id": "x", **common, "tags": [], "siblings": siblings}, {}

    def tree(self, name: str, revision: str, folder: str | None, *, query: Any, body: bytes) -> tuple[Any, dict]:
        repository = self.repository(name)
        files = repository.commits[self.sha(repository, revision)]
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = []
        for path, data in sorted(inside.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries, {}

    def branch(self, name: str, branch: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        self.may(write=True)
        repository = self.repository(name)
        if branch in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[branch] = self.sha(repository, json.loads(body or b"{}").get("startingPoint") or "main")
        return {}, {}

    def preupload(self, name: str, revision: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        self.may(write=True)
        repository = self.repository(name)
        remote = repository.commits[self.sha(repository, revision)]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in remote:
                data = remote[path]
                answer["oid"] = hashlib.sha256(data).hexdigest() if is_large(path) else git_hash(data)
            answers.append(answer)
        return {"files": answers}, {}

    def batch(self, name: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        self.may(write=True)
        self.repository(name)
        answers = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}, {}

    def store(self, oid: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(422, "checksum mismatch")
        self.hub.objects[oid] = body
        return b"", {}

    def commit(self, name: str, revision: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        self.may(write=True)
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        repository = self.repository(name)
        head = self.sha(repository, revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"lfs object {value['oid']} is missing")
                changes[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Refused(400, f"unknown operation {operation['key']}")
        answer, ref = {}, revision
        if query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            repository.refs[ref] = head
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        sha = self.hub.commit(name, ref, changes, header["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, **answer}, {}

    def resolve(self, name: str, revision: str, path: str, *, query: Any, body: bytes) -> tuple[Any, dict[str, str]]:
        repository = self.repository(name)
        sha = self.sha(repository, revision)
        data = repository.commits[sha].get(path)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_hash(data)
        return data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


NAME = r"([^/]+/[^/]+?)"
ROUTES = (
    ("/api/whoami-v2", ("GET",), _Handler.whoami),
    ("/api/validate-yaml", ("POST",), _Handler.validate),
    ("/api/repos/create", ("POST",), _Handler.create),
    (rf"/api/models/{NAME}/preupload/(.+)", ("POST",), _Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", ("POST",), _Handler.commit),
    (rf"/api/models/{NAME}/branch/(.+)", ("POST",), _Handler.branch),
    (rf"/api/models/{NAME}/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", ("GET",), _Handler.tree),
    (rf"/api/models/{NAME}(?:/revision/(.+))?", ("GET",), _Handler.info),
    (rf"/{NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler.batch),
    (r"/lfs/([0-9a-f]{64})", ("PUT",), _Handler.store),
    (rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
)
