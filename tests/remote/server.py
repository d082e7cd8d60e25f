"""A real S3 server on the loopback: moto, made strict. `python -m tests.remote.server LOG` prints its port and serves.

moto itself takes any credentials and looks at a condition before it takes the lock of a write; here one access key is
known, and one request is served at a time. Each request is one line of LOG: method, path, bytes sent back, conditions.
The file ``LOG.control`` makes it misbehave: ``deaf`` (it pays no heed to conditions), ``down`` (503), ``readonly``
(403 for what writes), ``lost`` (the answer to the next conditional write is lost: it is done, then 503).
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

ACCESS_KEY = "AKIACANARYCANARY0001"
SECRET_KEY = "canary/secret+key/that/no/file/may/hold0"
TOKEN = "canary-session-token-that-no-file-may-hold"
REGION = "eu-north-1"


class Strict:
    """WSGI: one access key, one request at a time, faults on demand."""

    def __init__(self, app: Any, log: Path) -> None:
        self.app = app
        self.log = log
        self.control = Path(f"{log}.control")
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        with self.lock:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            conditions = [f"{k}={environ[v]}" for k, v in CONDITIONS.items() if environ.get(v)]
            body = self.serve(environ, start_response)
            with self.log.open("a") as log:
                log.write(" ".join([method, path, str(sum(map(len, body))), *conditions]) + "\n")
            return body

    def serve(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        fault = self.control.read_text().strip() if self.control.exists() else ""
        signed = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if signed is None or signed[1] != ACCESS_KEY:
            said = f"<AWSAccessKeyId>{signed[1] if signed else ''}</AWSAccessKeyId>"
            return refuse(environ, start_response, "403 Forbidden", "InvalidAccessKeyId", said)
        writes = environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        if fault == "down":
            return refuse(environ, start_response, "503 Service Unavailable", "ServiceUnavailable")
        if fault == "readonly" and writes:
            return refuse(environ, start_response, "403 Forbidden", "AccessDenied")
        if fault == "deaf":
            for name in CONDITIONS.values():
                environ.pop(name, None)
        if fault == "lost" and writes and any(map(environ.get, CONDITIONS.values())):
            self.control.unlink()
            list(self.app(environ, lambda *_: None))
            environ["served"] = True
            return refuse(environ, start_response, "503 Service Unavailable", "ServiceUnavailable")
        return list(self.app(environ, start_response))


CONDITIONS = {"If-None-Match": "HTTP_IF_NONE_MATCH", "If-Match": "HTTP_IF_MATCH"}


def refuse(environ: dict[str, Any], start_response: Any, status: str, code: str, more: str = "") -> list[bytes]:
    if not environ.get("served"):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message>{more}</Error>'.encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def main() -> None:
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None:
            pass

    app = Strict(create_backend_app("s3"), Path(sys.argv[1]))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
