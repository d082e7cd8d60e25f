"""Files and batches of OpenAI's protocol on a loopback address: batches are done when a test says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.hostile.loopback import LoopbackServer

PAGE = 2
"""Entries of a page of a list, whatever is asked for."""

Line = dict[str, Any]
Fault = Callable[[str, str], int | None]
"""Given method and path: the status to answer with instead, before anything is done; a negative one after it."""


@dataclass
class Remote:
    """A batch as the server has it."""

    id: str
    input_file_id: str
    metadata: dict[str, str]
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """As the protocol has it."""
        errors = {"object": "list", "data": [{"code": "x", "message": m} for m in self.errors]} if self.errors else None
        return {**vars(self), "object": "batch", "endpoint": "/v1/chat/completions", "errors": errors}


class BatchServer(LoopbackServer):
    """Keeps what was uploaded and created, and how often each path was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, tuple[str, bytes]] = {}
        """Name and bytes, by id."""
        self.batches: dict[str, Remote] = {}
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.fault: Fault = lambda method, path: None
        self.lists = True

    # -- what a test does --

    def requests(self, batch: Remote) -> list[Line]:
        """The lines of a batch."""
        return [json.loads(line) for line in self.files[batch.input_file_id][1].splitlines()]

    def finish(
        self,
        answer: Callable[[Line], dict[str, Any] | None],
        status: str = "completed",
        errors: Callable[[Line], dict[str, Any] | None] = lambda _: None,
        tail: bytes = b"",
    ) -> None:
        """End all open batches: for each request a body, or a line of the error file, or nothing."""
        for batch in self.batches.values():
            if batch.status != "validating":
                continue
            batch.status = status
            good, bad = [], []
            for request in self.requests(batch):
                body, problem = answer(request), errors(request)
                if problem is not None:
                    bad.append({"custom_id": request["custom_id"], **problem})
                elif body is not None:
                    response = {"status_code": 200, "request_id": "r", "body": body}
                    good.append({"id": "x", "custom_id": request["custom_id"], "response": response, "error": None})
            if good or tail:
                batch.output_file_id = self._file("out.jsonl", _lines(good) + tail)
            if bad:
                batch.error_file_id = self._file("errors.jsonl", _lines(bad))

    def fail(self, why: str) -> None:
        """Reject all open batches as a whole."""
        for batch in self.batches.values():
            if batch.status == "validating":
                batch.status, batch.errors = "failed", [why]

    def _file(self, name: str, data: bytes) -> str:
        name_id = f"file-{len(self.files)}"
        self.files[name_id] = name, data
        return name_id

    # -- the server --

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        self.headers.append(dict(request.headers))
        status = self.fault(request.method, request.path)
        if status is not None and status > 0:
            return _error(status)
        answer = await self._answer(request)
        return _error(-status) if status is not None else answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        method, path = request.method, request.path.removeprefix("/v1/").split("/")
        if method == "POST" and path == ["files"]:
            form = await request.post()
            upload = form["file"]
            assert isinstance(upload, web.FileField) and form["purpose"] == "batch"
            name_id = self._file(upload.filename, upload.file.read())
            return web.json_response({"id": name_id, "filename": upload.filename, "purpose": "batch"})
        if method == "POST" and path == ["batches"]:
            body = await request.json()
            assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
            assert body["input_file_id"] in self.files
            batch = Remote(f"batch-{len(self.batches)}", body["input_file_id"], body["metadata"])
            self.batches[batch.id] = batch
            return web.json_response(batch.told())
        if method == "GET" and path == ["files"] and self.lists:
            assert request.query["purpose"] == "batch"
            return self._page(request, [{"id": n, "filename": name} for n, (name, _) in self.files.items()])
        if method == "GET" and path == ["batches"] and self.lists:
            return self._page(request, [batch.told() for batch in self.batches.values()])
        if method == "GET" and path[0] == "batches" and path[-1] in self.batches:
            return web.json_response(self.batches[path[-1]].told())
        if method == "GET" and path[0] == "files" and path[-1] == "content" and path[1] in self.files:
            return web.Response(body=self.files[path[1]][1], content_type="application/jsonl")
        return _error(404)

    def _page(self, request: web.Request, entries: list[dict[str, Any]]) -> web.Response:
        entries = entries[::-1]  # the newest first
        ids = [entry["id"] for entry in entries]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = entries[start : start + PAGE]
        return web.json_response({"object": "list", "data": page, "has_more": start + PAGE < len(entries)})


def _error(status: int) -> web.Response:
    return web.json_response({"error": {"message": f"no ({status})", "type": "error"}}, status=status)


def _lines(records: list[Line]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
