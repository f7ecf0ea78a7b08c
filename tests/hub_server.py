"""A Hugging Face Hub on loopback, for tests that drive the real clients.

It speaks the part of the protocol that ``huggingface_hub``, ``transformers`` and ``datasets``
use to read repositories, and what it takes to make one and commit to it by LFS. Xet storage, gzip
bodies and tags are left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

Kind = Literal["model", "dataset", "space"]
Query = dict[str, list[str]]

USER = "user"
LFS_SUFFIXES = (".bin", ".parquet", ".safetensors")
_DATE = "2024-01-01T00:00:00.000Z"
_CHUNK = 1 << 20
_OPERATIONS = "revision|tree|paths-info|refs|auth-check|preupload|commit"
_API = re.compile(
    rf"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+(?:/(?!(?:{_OPERATIONS})(?:/|$))[^/]+)?)"
    rf"(?:/(?P<op>{_OPERATIONS})(?:/(?P<rest>.*))?)?"
)
_RESOLVE = re.compile(
    r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"
)
_CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})")
_LFS = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_UPLOAD = re.compile(r"/upload/(?P<sha256>[0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Request:
    """One request as received; ``path`` carries neither the query nor any decoding."""

    method: str
    path: str
    query: Query
    headers: Message
    body: bytes

    def flag(self, name: str) -> bool:
        """Whether the query turns ``name`` on."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """One answer; ``body`` may be any iterable of chunks, and may stop short of Content-Length."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()


class HubError(Exception):
    """An answer other than success, with the headers by which clients tell errors apart."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        """Return this error as the Hub words it."""
        answer = _json({"error": self.message}, self.status)
        named = {"X-Error-Code": self.code} if self.code else {}
        answer.headers |= named | {"X-Error-Message": self.message} | self.headers
        return answer


class Dropped(Exception):
    """Raised instead of an answer, or within its body: the connection ends here."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


@dataclass(frozen=True)
class Blob:
    """The content of one file together with the identities that git and LFS give it."""

    source: bytes | Path
    size: int
    oid: str
    sha256: str
    pointer_size: int | None

    @classmethod
    def of(cls, source: bytes | Path, *, always_lfs: bool, threshold: int) -> Blob:
        """Hash ``source``; a file on disk is read again for each download, so keep it unchanged."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        for chunk in _chunks(source, 0, size):
            sha256.update(chunk)
            git.update(chunk)
        if not always_lfs and size < threshold:
            return cls(source, size, git.hexdigest(), sha256.hexdigest(), None)
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\n"
            f"size {size}\n"
        ).encode()
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return cls(source, size, oid, sha256.hexdigest(), len(pointer))

    def lfs(self, hash_name: str) -> dict[str, Any] | None:
        """Return the LFS record, whose hash goes by another name in each API."""
        if self.pointer_size is None:
            return None
        return {hash_name: self.sha256, "size": self.size, "pointerSize": self.pointer_size}


@dataclass(frozen=True)
class Commit:
    """An immutable set of files."""

    sha: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository with one branch, ``main``, whose past commits stay reachable by sha."""

    kind: Kind
    repo_id: str
    gated: bool
    commits: list[Commit]

    def commit(self, revision: str) -> Commit:
        """Return the commit that ``revision`` names or raise the Hub's RevisionNotFound."""
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1]
        for commit in self.commits:
            if commit.sha == revision:
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class HubServer:
    """A Hub that listens on a free loopback port for as long as its context is open.

    ``token``, when given, is the one valid token; it opens gated repositories, and any other is
    refused. Without it every token is that of a user to whom no gated repository is open. The user
    is called ``USER`` and may write into repositories of that name's alone.
    """

    def __init__(
        self, *, token: str | None = None, lfs_threshold: int = _CHUNK, page_size: int = 1000
    ) -> None:
        self._token = token
        self._lfs_threshold = lfs_threshold
        self._page_size = page_size
        self._lock = threading.Lock()
        self._repos: dict[tuple[str, str], Repo] = {}
        self._uploads: dict[str, bytes] = {}
        self.private: set[str] = set()
        self._log: list[tuple[str, str]] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The endpoint, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        """A copy of the log: the method and the path without its query, oldest first."""
        with self._lock:
            return list(self._log)

    def clear_requests(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    def add_repo(
        self,
        kind: Kind,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        message: str = "",
        gated: bool = False,
    ) -> str:
        """Commit ``files``, as the whole tree, to ``main`` of a new or known repository.

        Returns the commit's sha, which follows from the content, the message and the parent.
        ``gated`` holds for the whole repository from this commit on.
        """
        blobs = {
            path: Blob.of(
                source, always_lfs=path.endswith(LFS_SUFFIXES), threshold=self._lfs_threshold
            )
            for path, source in sorted(files.items())
        }
        with self._lock:
            repo = self._repos.setdefault((kind, repo_id), Repo(kind, repo_id, gated, []))
            parent = repo.commits[-1].sha if repo.commits else ""
            tree = [(path, blob.oid) for path, blob in blobs.items()]
            sha = hashlib.sha1(repr((kind, repo_id, parent, message, tree)).encode()).hexdigest()
            repo.commits.append(Commit(sha, message, blobs))
            repo.gated = gated
        return sha

    def answer(self, request: Request) -> Response:
        """Answer one request. Every request passes here: override it to inject a fault."""
        try:
            self._check_token(request)
            if match := _CDN.fullmatch(request.path):
                return self._cdn(request, match["sha256"])
            if match := _UPLOAD.fullmatch(request.path):
                self._uploads[match["sha256"]] = request.body
                return _json({})
            if match := _LFS.fullmatch(request.path):
                return self._lfs_batch(request, match["id"])
            if request.path == "/api/whoami-v2":
                if "Authorization" not in request.headers:
                    raise HubError(401, "", "Invalid username or password.")
                return _json({"type": "user", "name": USER})
            if request.path == "/api/validate-yaml":
                return _validated(request)
            if request.path == "/api/repos/create":
                return self._create(request)
            if match := _API.fullmatch(request.path):
                repo = self._repo(match["kind"], match["id"], request)
                return self._api(request, repo, match["op"], match["rest"] or "")
            if match := _RESOLVE.fullmatch(request.path):
                repo = self._repo(match["kind"] or "model", match["id"], request)
                return self._resolve(request, repo, unquote(match["rev"]), unquote(match["path"]))
            raise HubError(404, "", "Not Found")
        except HubError as error:
            return error.response()

    def _record(self, request: Request) -> None:
        with self._lock:
            self._log.append((request.method, request.path))

    def _check_token(self, request: Request) -> None:
        sent = request.headers.get("Authorization")
        if self._token and sent and sent != f"Bearer {self._token}":
            raise HubError(401, "", "Invalid credentials in Authorization header")

    def _check_gate(self, request: Request, repo: Repo, commit: Commit | None = None) -> None:
        sent = request.headers.get("Authorization")
        if repo.gated and not (self._token and sent):
            headers = {"X_Repo_Commit": commit.sha} if commit else {}
            message = f"Access to {repo.kind} {repo.repo_id} is restricted."
            raise HubError(403 if sent else 401, "GatedRepo", message, **headers)

    def _repo(self, kind: str, repo_id: str, request: Request) -> Repo:
        with self._lock:
            repo = self._repos.get((kind, unquote(repo_id)))
        if repo is None:
            # The Hub hides from strangers whether a repository exists. The clients read a bare
            # 401 in that way over https alone, hence the code here.
            status = 404 if request.headers.get("Authorization") else 401
            raise HubError(status, "RepoNotFound", "Repository not found")
        return repo

    def _api(self, request: Request, repo: Repo, operation: str | None, rest: str) -> Response:
        if operation == "auth-check":
            self._check_gate(request, repo)
            return _json({})
        if operation == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].sha}
            return _json({"branches": [main], "converts": [], "tags": [], "pullRequests": []})
        if operation in ("preupload", "commit"):
            self._check_writer(request, repo.repo_id)
            return _preupload(request) if operation == "preupload" else self._commit(request, repo)
        revision, _, directory = rest.partition("/")
        commit = repo.commit(unquote(revision) or "main")
        if operation == "tree":
            return self._tree(request, commit, unquote(directory))
        if operation == "paths-info":
            form = parse_qs(request.body.decode())
            entries = _entries(commit, "", expand=form.get("expand", [""])[0].lower() == "true")
            return _json([entries[path] for path in form.get("paths", []) if path in entries])
        return _json(_info(repo, commit, request))

    def _check_writer(self, request: Request, repo_id: str) -> None:
        if not request.headers.get("Authorization"):
            raise HubError(401, "", "Invalid username or password.")
        if not repo_id.startswith(f"{USER}/"):
            owner = repo_id.partition("/")[0]
            message = f"You don't have the rights to write under the namespace {owner}"
            raise HubError(403, "", message)

    def _create(self, request: Request) -> Response:
        wanted = json.loads(request.body)
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        self._check_writer(request, repo_id)
        with self._lock:
            known = ("model", repo_id) in self._repos
        if not known:
            self.add_repo("model", repo_id, {".gitattributes": b""})
            if wanted.get("visibility") == "private":
                self.private.add(repo_id)
        return _json({"url": f"{self.url}/{repo_id}"}, 409 if known else 200)

    def _lfs_batch(self, request: Request, repo_id: str) -> Response:
        self._check_writer(request, unquote(repo_id))
        objects = json.loads(request.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, request: Request, repo: Repo) -> Response:
        header, *operations = map(json.loads, request.body.splitlines())
        files: dict[str, bytes | Path] = {
            path: blob.source for path, blob in repo.commits[-1].files.items()
        }
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self._uploads[value["oid"]]
        message = header["value"]["summary"]
        sha = self.add_repo(repo.kind, repo.repo_id, files, message=message)
        url = f"{self.url}/{repo.repo_id}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url})

    def _tree(self, request: Request, commit: Commit, directory: str) -> Response:
        found = _entries(commit, directory, expand=request.flag("expand"))
        if not found and directory:
            message = f"{directory} does not exist on revision"
            raise HubError(404, "EntryNotFound", message, X_Repo_Commit=commit.sha)
        depth = directory.count("/") + 1 if directory else 0
        deep = request.flag("recursive")
        listed = [entry for path, entry in found.items() if deep or path.count("/") == depth]
        start = int(request.query.get("cursor", ["0"])[0])
        end = start + self._page_size
        response = _json(listed[start:end])
        if end < len(listed):
            query = urlencode(request.query | {"cursor": [str(end)]}, doseq=True)
            response.headers["Link"] = f'<{self.url}{request.path}?{query}>; rel="next"'
        return response

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        commit = repo.commit(revision)
        self._check_gate(request, repo, commit)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.sha)
        if blob.pointer_size is None:
            return _content(blob, blob.oid, request, {"X-Repo-Commit": commit.sha})
        # Another host than the endpoint's, so that clients treat it as a CDN and withhold tokens.
        location = f"http://localhost:{self._server.server_port}/cdn/{blob.sha256}"
        headers = {
            "X-Repo-Commit": commit.sha,
            "X-Linked-ETag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "Accept-Ranges": "bytes",
            "Location": location,
        }
        return _whole(302, f"Found. Redirecting to {location}".encode(), "text/plain", headers)

    def _cdn(self, request: Request, sha256: str) -> Response:
        if "Authorization" in request.headers:
            raise HubError(400, "", "Only one auth mechanism allowed")
        with self._lock:
            commits = [commit for repo in self._repos.values() for commit in repo.commits]
        for blob in (blob for commit in commits for blob in commit.files.values()):
            if blob.sha256 == sha256:
                return _content(blob, sha256, request, {})
        raise HubError(403, "", "Access Denied")


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that is killed in a test drops its connections; that is no fault of the server.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _serve(self) -> None:
        if self.server.fileno() == -1:
            # Connections outlive the listening socket; a Hub that is down must not answer them.
            self.close_connection = True
            return
        target = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, target.path, parse_qs(target.query), self.headers, body)
        self.server.hub._record(request)
        try:
            self._send(self.server.hub.answer(request))
        except Dropped as dropped:
            self.close_connection = True
            if dropped.reset:
                # Closing at once, with this set, sends a reset instead of an end.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        for chunk in response.body:
            self.wfile.write(chunk)
            sent += len(chunk)
        if sent != int(response.headers.get("Content-Length", -1)):
            # The client would wait for the rest, or take the next answer for it.
            self.close_connection = True


def _validated(request: Request) -> Response:
    header = yaml.safe_load(json.loads(request.body)["content"].split("---\n")[1])
    base = header.get("base_model", "a/b")
    wrong = [] if base.count("/") <= 1 and not base.startswith("/") else ["base_model"]
    errors = [{"message": f'"{name}" is not valid'} for name in wrong]
    return _json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _preupload(request: Request) -> Response:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(request.body)["files"]
    ]
    return _json({"files": files})


def _chunks(source: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source[start:stop]
        return
    with source.open("rb") as stream:
        stream.seek(start)
        while start < stop and (chunk := stream.read(min(_CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def _whole(status: int, body: bytes, content_type: str, headers: dict[str, str]) -> Response:
    common = {"Content-Type": content_type, "Content-Length": str(len(body))}
    return Response(status, common | headers, [body])


def _json(value: Any, status: int = 200) -> Response:
    return _whole(status, json.dumps(value).encode(), "application/json; charset=utf-8", {})


def _content(blob: Blob, etag: str, request: Request, headers: dict[str, str]) -> Response:
    start, stop, status = 0, blob.size, HTTPStatus.OK
    headers = headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if wanted := _RANGE.fullmatch(request.headers.get("Range", "")):
        start, stop = _bounds(wanted[1], wanted[2], blob.size)
        if start >= stop:
            extra = {"Content_Range": f"bytes */{blob.size}"}
            raise HubError(416, "", "Range Not Satisfiable", **extra)
        status = HTTPStatus.PARTIAL_CONTENT
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(stop - start)}
    return Response(status, headers, _chunks(blob.source, start, stop))


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last or 0)), size
    return int(first), min(size, int(last) + 1 if last else size)


def _info(repo: Repo, commit: Commit, request: Request) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if request.flag("blobs"):
        for sibling, blob in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"size": blob.size, "blobId": blob.oid}
            sibling |= {"lfs": lfs} if (lfs := blob.lfs("sha256")) else {}
    info = {
        "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "author": repo.repo_id.rpartition("/")[0],
        "sha": commit.sha,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": False,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "usedStorage": sum(blob.size for blob in commit.files.values()),
        "siblings": siblings,
    }
    if expand := request.query.get("expand"):
        return {name: value for name, value in info.items() if name in ("_id", "id", *expand)}
    return info


def _entries(commit: Commit, directory: str, *, expand: bool) -> dict[str, dict[str, Any]]:
    """Return the tree entries of all files and folders below ``directory``, by path."""
    prefix = f"{directory}/" if directory else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        if not path.startswith(prefix):
            continue
        for parent in reversed(Path(path).parents):
            folder = parent.as_posix()
            if folder != "." and folder.startswith(prefix):
                oid = hashlib.sha1(f"{commit.sha} {quote(folder)}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if lfs := blob.lfs("oid"):
            entries[path]["lfs"] = lfs
    if expand:
        for entry in entries.values():
            entry["lastCommit"] = {"id": commit.sha, "title": commit.message, "date": _DATE}
    return entries
