"""Supabase Storage as its clients see it, in memory: plain uploads, TUS 1.0, reads.

Statuses and bodies follow https://github.com/supabase/storage: an error of the plain routes has
HTTP status 400 and the one that is meant in its body; TUS answers with the status itself; a wrong
key is refused with 401 by the gateway that stands before them all.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from flask import Blueprint, Flask, Response, jsonify, request
from werkzeug.exceptions import ClientDisconnected
from werkzeug.serving import WSGIRequestHandler, make_server

BLOCK_BYTES = 16 << 10


@dataclass
class Stored:
    content: bytes
    mime_type: str
    writes: int = 1  # how often this name was written


@dataclass
class TusUpload:
    bucket: str
    name: str
    mime_type: str
    length: int
    content: bytearray = field(default_factory=bytearray)
    # One request at a time, as with the real one: the next waits until a cut one is noticed.
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Shelf:
    """What the stand-in holds. Its server's threads write it; a test reads between requests."""

    service_key: str = "a-service-key-for-tests"
    buckets: set[str] = field(default_factory=lambda: {"workspace-temp"})
    limit_bytes: int = 50 << 20  # for one object
    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)  # by bucket and name
    uploads: dict[str, TusUpload] = field(default_factory=dict)  # unfinished and finished, by id
    seen: list[str] = field(default_factory=list)  # "METHOD /path" of each request
    accepted_bytes: int = 0  # of all TUS uploads, repeated ones counted again
    finishing_fails: bool = False  # the next TUS upload has all its bytes and makes no object
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Empty it, for the next round of a test."""
        self.objects.clear()
        self.uploads.clear()
        self.seen.clear()
        self.accepted_bytes = 0

    def expire_uploads(self) -> None:
        """What Supabase does a day after an upload began."""
        self.uploads.clear()

    def store(self, bucket: str, name: str, content: bytes, mime_type: str) -> None:
        with self.lock:
            before = self.objects.get((bucket, name))
            writes = before.writes + 1 if before else 1
            self.objects[bucket, name] = Stored(content, mime_type, writes)


def storage_blueprint(shelf: Shelf) -> Blueprint:
    """The routes below /storage/v1, over `shelf`."""
    routes = Blueprint("storage", __name__, url_prefix="/storage/v1")

    @routes.before_request
    def check_key() -> tuple[Response, int] | None:
        shelf.seen.append(f"{request.method} {request.path}")
        right = request.headers.get("Authorization") == f"Bearer {shelf.service_key}"
        if right and request.headers.get("apikey", shelf.service_key) == shelf.service_key:
            return None
        return jsonify(message="Invalid authentication credentials"), 401

    @routes.post("/object/<bucket>/<path:name>")
    def upload(bucket: str, name: str) -> tuple[Response, int] | Response:
        if bucket not in shelf.buckets:
            return refused(404, "Bucket not found", "Bucket not found")
        if (request.content_length or 0) > shelf.limit_bytes:
            return refused(413, "Payload too large", "The object exceeded the maximum allowed size")
        content = request.get_data()  # raises ClientDisconnected when the request was cut
        if (bucket, name) in shelf.objects and request.headers.get("x-upsert") != "true":
            return refused(409, "Duplicate", "The resource already exists")
        shelf.store(bucket, name, content, request.headers.get("Content-Type", ""))
        return jsonify(Key=f"{bucket}/{name}", Id=str(uuid.uuid4()))

    @routes.get("/object/<bucket>/<path:name>")
    @routes.get("/object/authenticated/<bucket>/<path:name>")
    def read(bucket: str, name: str) -> tuple[Response, int] | Response:
        stored = shelf.objects.get((bucket, name))
        if stored is None:
            return refused(404, "not_found", "Object not found")
        return Response(stored.content, mimetype=stored.mime_type)

    @routes.post("/upload/resumable")
    def create() -> Response:
        pairs = [pair.split() for pair in request.headers["Upload-Metadata"].split(",")]
        metadata = {name: base64.b64decode(value).decode() for name, value in pairs}
        bucket, name = metadata["bucketName"], metadata["objectName"]
        length = int(request.headers["Upload-Length"])
        if bucket not in shelf.buckets:
            return tus(404, text="Bucket not found")
        if length > shelf.limit_bytes:
            return tus(413, text="Maximum size exceeded")
        if (bucket, name) in shelf.objects and request.headers.get("x-upsert") != "true":
            return tus(409, text="The resource already exists")
        upload_id = base64.urlsafe_b64encode(f"{bucket}/{name}/{uuid.uuid4()}".encode()).decode()
        mime_type = metadata.get("contentType", "application/octet-stream")
        shelf.uploads[upload_id] = TusUpload(bucket, name, mime_type, length)
        # Behind a proxy that it does not know, the real one names its own host like this.
        return tus(201, Location=f"http://storage:5000/upload/resumable/{upload_id}")

    @routes.route("/upload/resumable/<upload_id>", methods=["HEAD"])
    def offset(upload_id: str) -> Response:
        found = shelf.uploads.get(upload_id)
        if found is None:
            return tus(404)
        with found.lock:
            return tus(200, Upload_Offset=len(found.content), Upload_Length=found.length)

    @routes.patch("/upload/resumable/<upload_id>")
    def append(upload_id: str) -> Response:
        found = shelf.uploads.get(upload_id)
        if found is None:
            return tus(404, text="The file for this url was not found")
        if request.headers.get("Content-Type") != "application/offset+octet-stream":
            return tus(415, text="Content-Type must be application/offset+octet-stream")
        with found.lock:
            if int(request.headers["Upload-Offset"]) != len(found.content):
                return tus(409, text="Upload-Offset from request does not match the offset")
            if len(found.content) + (request.content_length or 0) > found.length:
                return tus(413, text="Maximum size exceeded")
            with contextlib.suppress(ClientDisconnected):
                while block := request.stream.read(BLOCK_BYTES):
                    found.content += block
                    shelf.accepted_bytes += len(block)
            if len(found.content) == found.length and shelf.finishing_fails:
                shelf.finishing_fails = False
                return tus(500, text="Internal server error")
            if len(found.content) == found.length:
                shelf.store(found.bucket, found.name, bytes(found.content), found.mime_type)
            return tus(204, Upload_Offset=len(found.content))

    return routes


def refused(status: int, error: str, message: str) -> tuple[Response, int]:
    return jsonify(statusCode=str(status), error=error, message=message), 400


def tus(status: int, text: str = "", **headers: str | int) -> Response:
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return Response(text, status, {"Tus-Resumable": "1.0.0", **named})


class _Quiet(WSGIRequestHandler):
    disable_nagle_algorithm = True  # head and body are two writes; without this 40 ms lie between

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


@contextlib.contextmanager
def serve(app: Flask) -> Iterator[str]:
    """The address of a server for `app` on this machine, one thread a request."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
