"""Supabase Storage: small files in one request, larger ones by TUS 1.0, its resumable protocol.

https://supabase.com/docs/guides/storage/uploads/resumable-uploads and https://tus.io/protocols.
Answers with an error of the plain route have HTTP status 400 nearly always; the status that is
meant stands in their body (`{"statusCode": "404", "error": …, "message": …}`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from worker.errors import ConfigError
from worker.storage.stores import (
    StoreRefused,
    StoreUnavailable,
    answered,
    check_address,
    check_key,
    check_secret,
    shown_name,
    shown_text,
    stopped,
    unreachable,
)

CHUNK_BYTES = 6 << 20  # Supabase takes this size and no other, but for the last chunk
BLOCK_BYTES = (
    64 << 10
)  # read and sent at once; between two, the time and `should_stop` are looked at

CONNECT_S = 10.0
STALL_S = 30.0  # the network may take no byte for so long
OTHER_S = 60.0  # a request, whatever is sent; the first client's limits were these two
VIDEO_S = 180.0
SLOWEST_BYTES_PER_S = 128 << 10  # for what is sent, on top: 1 Mbit/s

_GONE = (404, 410)
# HEAD has no body to say what is meant, and a wrong key is told apart by the request that follows.
_GONE_FOR_HEAD = (400, 403, 404, 410)


def allowed_s(sent_bytes: int, mime_type: str) -> float:
    """Seconds that a request may take to be sent, and then again to be answered."""
    base_s = VIDEO_S if mime_type.startswith("video/") else OTHER_S
    return base_s + sent_bytes / SLOWEST_BYTES_PER_S


class SupabaseStore:
    """A bucket of Supabase Storage. Nothing in it changes: any thread may call `put`.

    resumable_from_bytes: files from this size on go by TUS, in chunks of `chunk_bytes`.
    Raises ConfigError for an address or key that cannot be one.
    """

    name = "supabase"

    def __init__(
        self,
        url: str,
        service_key: str,
        bucket: str = "workspace-temp",
        resumable_from_bytes: int = CHUNK_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._base = check_address("the address of Supabase", url) + "/storage/v1"
        self._service_key = check_secret("the service key of Supabase", service_key)
        if not bucket or "/" in bucket:
            raise ConfigError("the bucket of Supabase must be a name without a slash")
        if resumable_from_bytes < 1 or chunk_bytes < 1:
            raise ConfigError(
                f"resumable_from_bytes is {resumable_from_bytes} and chunk_bytes {chunk_bytes}; "
                "allowed: 1 or more"
            )
        self._bucket = bucket
        self._resumable_from_bytes = resumable_from_bytes
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._tls = httpx.create_ssl_context(trust_env=False)  # 20 ms, so not for each file

    def put(
        self,
        key: str,
        file: Path,
        mime_type: str,
        saved: dict[str, Any],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """As ObjectStore.put. `saved` is {} for a file that goes in one request."""
        check_key(self.name, key)
        with (
            file.open("rb") as content,
            # A client per file: no connection is left open between files, none outlives `put`.
            httpx.Client(
                headers={
                    "Authorization": f"Bearer {self._service_key}",
                    "apikey": self._service_key,
                    "Accept-Encoding": "identity",
                },
                verify=self._tls,
                trust_env=False,
                follow_redirects=False,  # they would carry the key elsewhere
            ) as client,
        ):
            upload = _Upload(self, client, key, content, mime_type, should_stop)
            if upload.size < self._resumable_from_bytes:
                upload.put_whole()
            else:
                upload.put_in_chunks(saved, save)


class _Upload:
    """One `put`; lives and changes on the stack of the thread that called it."""

    def __init__(
        self,
        store: SupabaseStore,
        client: httpx.Client,
        key: str,
        content: io.BufferedReader,
        mime_type: str,
        should_stop: Callable[[], bool],
    ):
        self._store = store
        self._client = client
        self._key = key
        self._content = content
        self._mime_type = mime_type
        self._should_stop = should_stop
        self.size = os.fstat(content.fileno()).st_size

    def put_whole(self) -> None:
        headers = {"Content-Type": self._mime_type, "x-upsert": "true"}
        answer = self._send("POST", self._object_path("object"), headers, 0, self.size)
        if answer.status_code not in (200, 201):
            raise self._error(answer)

    def put_in_chunks(self, saved: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
        # The hash, because an upload that began with other bytes must not end with these.
        digest = hashlib.file_digest(self._content, "sha256").hexdigest()
        mine = {"store": self._store.name, "key": self._key, "bytes": self.size, "sha256": digest}
        upload_id, offset = "", None
        if saved.items() >= mine.items() and isinstance(saved.get("upload"), str):
            upload_id = saved["upload"]
            offset = self._offset(upload_id)
            # The last chunk is followed by a step of the store of its own, which may have failed.
            if offset == self.size and not self._is_there():
                offset = None
        begun = 0
        while offset is None or offset < self.size:
            if offset is None:
                if begun == 2:
                    raise StoreUnavailable(
                        f"{self._store.name} lost the upload of {shown_name(self._key)} twice; "
                        "try again"
                    )
                begun += 1
                upload_id, offset = self._create(), 0
                save(mine | {"upload": upload_id})
            offset = self._send_chunk(upload_id, offset)

    def _create(self) -> str:
        """Begin an upload; its id, the last part of the address it got.

        Only the id is kept: a store behind a proxy may give an address that is not its own, and
        the key must never go anywhere else.
        """
        metadata = {
            "bucketName": self._store._bucket,
            "objectName": self._key,
            "contentType": self._mime_type,
        }
        headers = {
            "Upload-Length": str(self.size),
            "Upload-Metadata": ",".join(
                f"{name} {base64.b64encode(value.encode()).decode()}"
                for name, value in metadata.items()
            ),
            "x-upsert": "true",
        }
        answer = self._tus("POST", "/upload/resumable", headers)
        if answer.status_code != 201:
            raise self._error(answer)
        address = str(answer.headers.get("Location", ""))
        upload_id = urlsplit(address).path.rsplit("/", 1)[-1]
        if not upload_id:
            raise StoreRefused(
                f"{self._store.name} began an upload of {shown_name(self._key)} and gave no "
                "address for it; look at the proxy before it"
            )
        return upload_id

    def _offset(self, upload_id: str) -> int | None:
        """How many bytes the store has of an upload; None when it knows no such upload."""
        answer = self._tus("HEAD", f"/upload/resumable/{upload_id}", {})
        if answer.status_code in _GONE_FOR_HEAD:
            return None
        if answer.status_code not in (200, 204):
            raise self._error(answer)
        return self._told_offset(answer)

    def _send_chunk(self, upload_id: str, offset: int) -> int | None:
        """Send the chunk at `offset`; the offset after it, None when the upload has expired."""
        headers = {
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "x-upsert": "true",
        }
        length = min(self._store._chunk_bytes, self.size - offset)
        path = f"/upload/resumable/{upload_id}"
        answer = self._tus("PATCH", path, headers, offset, length)
        if answer.status_code in _GONE:
            return None
        if answer.status_code == 409:  # an earlier request got further than its answer
            after = self._offset(upload_id)
        elif answer.status_code in (200, 204):
            after = self._told_offset(answer)
        else:
            raise self._error(answer)
        if after is not None and after <= offset:  # the next attempt asks where to go on
            raise StoreUnavailable(
                f"{self._store.name} has {after} bytes of {shown_name(self._key)} after it was "
                f"sent byte {offset} and following; try again"
            )
        return after

    def _told_offset(self, answer: httpx.Response) -> int | None:
        """The offset in an answer; None for one that this file cannot have."""
        told = answer.headers.get("Upload-Offset", "")
        if not (told.isascii() and told.isdigit()):
            raise StoreUnavailable(
                f"{self._store.name} did not say how much of {shown_name(self._key)} it has; "
                "try again"
            )
        offset = int(told)
        return offset if offset <= self.size else None

    def _is_there(self) -> bool:
        """Whether the store has an object of this name and size."""
        answer = self._send("HEAD", self._object_path("object/authenticated"), {})
        if answer.status_code in _GONE_FOR_HEAD:
            return False
        if answer.status_code != 200:
            raise self._error(answer)
        return bool(answer.headers.get("Content-Length") == str(self.size))

    def _object_path(self, route: str) -> str:
        parts = [self._store._bucket, *self._key.split("/")]
        return f"/{route}/" + "/".join(quote(part, safe="") for part in parts)

    def _tus(
        self, method: str, path: str, headers: dict[str, str], start: int = 0, length: int = 0
    ) -> httpx.Response:
        return self._send(method, path, headers | {"Tus-Resumable": "1.0.0"}, start, length)

    def _send(
        self, method: str, path: str, headers: dict[str, str], start: int = 0, length: int = 0
    ) -> httpx.Response:
        """One request; POST and PATCH with `length` bytes of the file from `start` on."""
        if self._should_stop():
            raise stopped(self._store.name, self._key)
        seconds = allowed_s(length, self._mime_type)
        body = None
        if method in ("POST", "PATCH"):
            headers = headers | {"Content-Length": str(length)}
            body = self._blocks(start, length, self._store._clock() + seconds)
        try:
            return self._client.request(
                method,
                self._store._base + path,
                headers=headers,
                content=body,
                timeout=httpx.Timeout(seconds, connect=CONNECT_S, write=STALL_S),
            )
        except httpx.HTTPError as exc:
            raise unreachable(self._store.name, self._key, exc) from exc

    def _blocks(self, start: int, length: int, deadline: float) -> Iterator[bytes]:
        self._content.seek(start)
        left = length
        while left:
            if self._should_stop():
                raise stopped(self._store.name, self._key)
            if self._store._clock() >= deadline:
                raise StoreUnavailable(
                    f"{self._store.name} took {length - left} of {length} bytes of "
                    f"{shown_name(self._key)} in the time allowed; try again"
                )
            block = self._content.read(min(BLOCK_BYTES, left))
            if not block:
                raise OSError(f"{shown_name(self._key)} became shorter while it was sent")
            left -= len(block)
            yield block

    def _error(self, answer: httpx.Response) -> StoreUnavailable | StoreRefused:
        status, said = answer.status_code, answer.text
        try:
            body = json.loads(answer.content)
        except ValueError:  # of a proxy, or of TUS, which answers with plain text
            body = None
        if isinstance(body, dict):
            meant = str(body.get("statusCode"))
            if status == 400 and len(meant) == 3 and meant.isascii() and meant.isdigit():
                status = int(meant)
            said = ": ".join(str(body[name]) for name in ("error", "message") if body.get(name))
        said = shown_text(said, [self._store._service_key])
        retry_after = answer.headers.get("Retry-After")
        return answered(self._store.name, self._key, status, said, retry_after)
