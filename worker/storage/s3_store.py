"""S3 and what speaks its protocol: small files in one request, larger ones as multipart uploads.

Content-MD5 guards what is sent: every store of this kind has known it from the beginning, which
is not true of the newer checksums that boto3 adds by default. An upload whose job was given up
stays in the bucket until a lifecycle rule (AbortIncompleteMultipartUpload) removes it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

PART_BYTES = 8 << 20
MIN_PART_BYTES = 5 << 20  # the protocol's, for every part but the last
MULTIPART_FROM_BYTES = 16 << 20
MAX_PARTS = 10_000  # the protocol's

CONNECT_S = 10.0
STALL_S = 60.0  # no byte went or came for so long; boto3 has no limit for a request as a whole

_GONE = ("NoSuchUpload", "InvalidPart")
# Codes whose HTTP status is one of the client's, though the same request may well succeed: what
# was sent was cut or damaged on the way.
_TRY_AGAIN = ("RequestTimeout", "BadDigest", "IncompleteBody", *_GONE)


class S3Store:
    """A bucket. Nothing in it changes, and boto3's client may be shared: any thread may call `put`.

    endpoint_url: None for AWS itself. prefix: a folder in the bucket, before every key.
    access_key, secret_key: both, or neither to leave it to boto3's own search.
    Files from `multipart_from_bytes` on go in parts of `part_bytes`.
    Raises ConfigError for values that cannot be right.
    """

    name = "s3"

    def __init__(
        self,
        bucket: str,
        endpoint_url: str | None = None,
        region: str | None = None,
        prefix: str = "",
        access_key: str | None = None,
        secret_key: str | None = None,
        part_bytes: int = PART_BYTES,
        multipart_from_bytes: int = MULTIPART_FROM_BYTES,
    ):
        if not bucket or "/" in bucket:
            raise ConfigError("the S3 bucket must be a name without a slash")
        if part_bytes < MIN_PART_BYTES or multipart_from_bytes < 1:
            raise ConfigError(
                f"part_bytes is {part_bytes}, allowed: {MIN_PART_BYTES} or more; "
                f"multipart_from_bytes is {multipart_from_bytes}, allowed: 1 or more"
            )
        if (access_key is None) != (secret_key is None):
            raise ConfigError("S3 needs the access key id and the secret key, or neither")
        if endpoint_url is not None:
            endpoint_url = check_address("the address of S3", endpoint_url)
        self._secrets = [
            check_secret(f"the {what} of S3", value)
            for what, value in (("access key id", access_key), ("secret key", secret_key))
            if value is not None
        ]
        self._bucket = bucket
        folder = prefix.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        self._part_bytes = part_bytes
        self._multipart_from_bytes = multipart_from_bytes
        self._client = _client(endpoint_url, region or "us-east-1", access_key, secret_key)

    def put(
        self,
        key: str,
        file: Path,
        mime_type: str,
        saved: dict[str, Any],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """As ObjectStore.put. `saved` is {} for a file that goes in one request. `should_stop` is
        asked before each request."""
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

        whole_key = self._prefix + key
        check_key(self.name, whole_key)
        with file.open("rb") as content:
            upload = _Upload(self, whole_key, content, mime_type, should_stop)
            try:
                if upload.size < self._multipart_from_bytes:
                    upload.put_whole()
                else:
                    upload.put_in_parts(saved, save)
            except ClientError as exc:
                # Without the cause: its text repeats the answer, which may repeat a key.
                raise self._error(key, exc.response) from None
            except ParamValidationError as exc:
                raise StoreRefused(
                    f"{self.name} cannot be asked to store {shown_name(key)} "
                    f"({type(exc).__name__}); look at the name of the bucket"
                ) from None
            except BotoCoreError as exc:
                raise unreachable(self.name, key, exc) from exc

    def _error(self, key: str, response: dict[str, Any]) -> StoreUnavailable | StoreRefused:
        error = response.get("Error", {})
        code = str(error.get("Code", ""))
        said = shown_text(f"{code}: {error.get('Message', '')}", self._secrets)
        metadata = response.get("ResponseMetadata", {})
        if code in _TRY_AGAIN:
            return StoreUnavailable(f"{self.name}: {shown_name(key)} ({said}); try again")
        retry_after = metadata.get("HTTPHeaders", {}).get("retry-after")
        return answered(self.name, key, metadata.get("HTTPStatusCode", 0), said, retry_after)


class _Upload:
    """One `put`; lives and changes on the stack of the thread that called it."""

    def __init__(
        self,
        store: S3Store,
        key: str,
        content: io.BufferedReader,
        mime_type: str,
        should_stop: Callable[[], bool],
    ):
        self._store = store
        self._client = store._client
        self._object = {"Bucket": store._bucket, "Key": key}
        self._content = content
        self._mime_type = mime_type
        self._should_stop = should_stop
        self.size = os.fstat(content.fileno()).st_size

    def put_whole(self) -> None:
        self._check_stop()
        # MD5 because Content-MD5 and the tags of parts are; it guards against accidents only.
        digest = hashlib.file_digest(self._content, lambda: hashlib.md5(usedforsecurity=False))
        self._content.seek(0)
        self._client.put_object(
            **self._object,
            Body=self._content,
            ContentType=self._mime_type,
            ContentMD5=base64.b64encode(digest.digest()).decode(),
        )

    def put_in_parts(self, saved: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
        from botocore.exceptions import ClientError

        mine = {"store": self._store.name, "key": self._object["Key"], "bytes": self.size}
        upload_id, part_bytes = saved.get("upload_id"), saved.get("part_bytes")
        if saved.items() >= mine.items() and upload_id and part_bytes:
            try:
                self._finish(upload_id, part_bytes, resumed=True)
                return
            except ClientError as exc:
                if exc.response.get("Error", {}).get("Code") not in _GONE:
                    raise
        self._check_stop()
        begun = self._client.create_multipart_upload(**self._object, ContentType=self._mime_type)
        upload_id = str(begun["UploadId"])
        part_bytes = max(self._store._part_bytes, -(-self.size // MAX_PARTS))
        save(mine | {"upload_id": upload_id, "part_bytes": part_bytes})
        self._finish(upload_id, part_bytes, resumed=False)

    def _finish(self, upload_id: str, part_bytes: int, *, resumed: bool) -> None:
        """Send the parts that the store does not have with the same bytes, and join all."""
        stored = self._stored_parts(upload_id) if resumed else {}
        parts = []
        for number, start in enumerate(range(0, self.size, part_bytes), 1):
            self._content.seek(start)
            part = self._content.read(part_bytes)
            if len(part) != min(part_bytes, self.size - start):
                name = shown_name(self._object["Key"])
                raise OSError(f"{name} became shorter while it was sent")
            digest = hashlib.md5(part, usedforsecurity=False)
            etag = f'"{digest.hexdigest()}"'
            # A bucket that encrypts with its own keys has other tags: its parts are sent again.
            if stored.get(number) != (len(part), etag):
                self._check_stop()
                sent = self._client.upload_part(
                    **self._object,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=part,
                    ContentMD5=base64.b64encode(digest.digest()).decode(),
                )
                etag = sent["ETag"]
            parts.append({"PartNumber": number, "ETag": etag})
        self._check_stop()
        self._client.complete_multipart_upload(
            **self._object, UploadId=upload_id, MultipartUpload={"Parts": parts}
        )

    def _stored_parts(self, upload_id: str) -> dict[int, tuple[int, str]]:
        """Size and tag of each part that the store has, by number."""
        pages = self._client.get_paginator("list_parts").paginate(
            **self._object, UploadId=upload_id
        )
        return {
            part["PartNumber"]: (part["Size"], part["ETag"])
            for page in pages
            for part in page.get("Parts", ())
        }

    def _check_stop(self) -> None:
        if self._should_stop():
            raise stopped(self._store.name, self._object["Key"])


def _client(
    endpoint_url: str | None, region: str, access_key: str | None, secret_key: str | None
) -> Any:
    import boto3  # here, because it takes 0.3 s and most pods have no S3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=STALL_S,
        retries={"total_max_attempts": 1, "mode": "standard"},  # the caller has the backoff
        proxies={},  # none, whatever the environment says
        ignore_configured_endpoint_urls=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(
            aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name=region
        )
        return session.client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as exc:
        raise ConfigError(
            f"no S3 client can be made of the settings ({type(exc).__name__}); look at the "
            "address, the region, and AWS_PROFILE if it is set"
        ) from exc
