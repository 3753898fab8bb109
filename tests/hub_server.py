"""A server on this machine that plays the Hugging Face hub: the routes huggingface_hub calls, and everything that
goes wrong with the real one (licence gates, wrong tokens, breaks in mid-file, errors of its own, no ranges).

Large files (*.safetensors) are kept by content, as the hub keeps them, and handed out by a redirect to a second
origin (another port), as the hub's network does; small ones come from the first.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Repository = dict[str, bytes]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    span: str | None
    token: str | None

    @property
    def start(self) -> int:
        """First byte asked for."""
        found = re.fullmatch(r"bytes=(\d+)-\d*", self.span or "bytes=0-")
        assert found
        return int(found[1])


@dataclass
class Faults:
    """What goes wrong; everything off at first."""

    gated: set[str] = field(default_factory=set)  # repositories whose files need a token that was granted access
    status: dict[str, int] = field(default_factory=dict)  # part of a path -> the answer
    breaks: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes sent before each request breaks off
    busy: dict[str, list[int]] = field(default_factory=dict)  # file -> answers in place of its content, in turn
    stall: dict[str, int] = field(default_factory=dict)  # file -> bytes sent before the server falls silent
    no_ranges: bool = False
    other_content: set[str] = field(default_factory=set)  # files that are sent with a bit turned
    silent: bool = False  # accepts, and never answers


class Hub:
    """`with Hub() as hub: hub.add("google/x", folder)`; `hub.requests` is what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults, self.requests = Faults(), list[Request]()
        self.stalled, self._closing = threading.Event(), threading.Event()
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> Hub:
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, first=not self._servers))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From here on there is no way to the hub."""
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def content_endpoint(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"  # another host, as far as a client can tell

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        self.repositories[name] = files | more

    def commit(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + hashlib.sha256(files[key]).digest() for key in files)).hexdigest()

    def gets(self, file: str = "") -> list[Request]:
        """Requests for the content of files whose name contains this; not those for a header alone."""
        asked = [r for r in self.requests if r.method == "GET" and r.path.startswith("/content/") and file in r.path]
        return [r for r in asked if r.span is None or r.span.endswith("-")]

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if path in request.path]


def large(file: str) -> bool:
    return file.endswith(".safetensors")


def stored_apart(file: str, content: bytes, digest: str) -> dict[str, Any]:
    """What the hub says of a large file's content; the checksum's name is another in every answer."""
    about = {digest: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"lfs": about} if large(file) else {}


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub, first: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Tests read hub.requests instead."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
            if hub.faults.silent:
                hub._closing.wait(30)
                self.close_connection = True
                return
            if fault := next((code for part, code in hub.faults.status.items() if part in path), None):
                self.refuse(fault)
            elif token == "hf_expired":
                self.refuse(401, message="Invalid credentials in Authorization header")
            elif not first:
                self.content(path)
            elif path == "/":
                self.reply(200, b"the hub")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main|/tree/\w+)?", path):
                self.api(found[1], found[2] or "")
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
                self.resolve(found[1], found[2], found[3], token)
            else:
                self.refuse(404, code="RepoNotFound")

        do_HEAD = do_GET

        def named(self, name: str) -> str | None:
            """The hub's own spelling; it does not mind case."""
            return next((known for known in hub.repositories if known.casefold() == name.casefold()), None)

        def api(self, asked: str, what: str) -> None:
            if (name := self.named(asked)) is None:
                return self.refuse(401, code="RepoNotFound", message="Invalid username or password.")
            files = hub.repositories[name].items()
            if what.startswith("/tree/"):
                found: Any = [{"type": "file", "path": file, "size": len(content), "oid": blob_id(content)}
                              | stored_apart(file, content, "oid") for file, content in files]  # fmt: skip
            else:
                siblings = [{"rfilename": file, "size": len(content), "blobId": blob_id(content)}
                            | stored_apart(file, content, "sha256") for file, content in files]  # fmt: skip
                found = {"_id": "1", "id": name, "modelId": name, "sha": hub.commit(name), "private": False,
                         "gated": "manual" if name in hub.faults.gated else False, "disabled": False, "tags": [],
                         "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def resolve(self, asked: str, commit: str, file: str, token: str | None) -> None:
            name = self.named(asked)
            if name is None:
                return self.refuse(404, code="RepoNotFound")
            if name in hub.faults.gated and token != "hf_granted":
                return self.refuse(401 if token is None else 403, code="GatedRepo", message="Access is restricted.")
            if commit not in ("main", hub.commit(name)) or file not in hub.repositories[name]:
                return self.refuse(404, code="EntryNotFound")
            content = hub.repositories[name][file]
            digest = hashlib.sha256(content).hexdigest() if large(file) else blob_id(content)
            headers = {"X-Repo-Commit": hub.commit(name), "ETag": f'"{digest}"'}
            if large(file):
                headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                            "Location": f"{hub.content_endpoint}/content/{name}/{file}"}  # fmt: skip
                return self.reply(302, b"", headers)
            self.reply(200, content, headers)

        def content(self, path: str) -> None:
            name, _, file = path.removeprefix("/content/").rpartition("/")
            if self.command == "GET" and (answers := hub.faults.busy.get(file)):
                return self.refuse(answers.pop(0))
            content = hub.repositories[name][file]
            if file in hub.faults.other_content:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start, end, status, headers = 0, len(content), 200, {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked and not hub.faults.no_ranges:
                start, end = int(asked[1]), min(int(asked[2] or end) + 1, end) if asked[2] else end
                status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            self.send_response(status)
            for key, value in {"Content-Length": str(end - start), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if asked and asked[2]:  # a header, which comes whole
                self.wfile.write(content[start:end])
            elif self.command == "GET":
                self.body(file, content[start:end])

        def body(self, file: str, content: bytes) -> None:
            if breaks := hub.faults.breaks.get(file):
                self.wfile.write(content[: breaks.pop(0)])
                self.close_connection = True
            elif file in hub.faults.stall:
                self.wfile.write(content[: hub.faults.stall.pop(file)])
                self.wfile.flush()
                hub.stalled.set()
                hub._closing.wait(30)
                self.close_connection = True
            else:
                self.wfile.write(content)

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def refuse(self, status: int, code: str = "", message: str = "") -> None:
            said = {"X-Error-Code": code, "X-Error-Message": message}
            self.reply(status, b"{}", {key: value for key, value in said.items() if value})

    return Handler
