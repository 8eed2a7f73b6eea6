"""moto's S3 server as a process of its own, and a client to look into it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ACCESS_KEY, SECRET_KEY = "AKIDFORTESTS", "a-secret-key/for+tests"
START_S = 60.0


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[str]:
    """The address of a server that holds no bucket yet. Its log goes to `folder`.

    Any key is right for it, as long as a request is signed.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "moto.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None, f"the S3 server ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"the S3 server did not answer in {START_S:g} s"
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def client(url: str) -> Any:
    """A plain client of the server at `url`."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
    return session.client("s3", endpoint_url=url, config=Config(proxies={}))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/moto-api/", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
