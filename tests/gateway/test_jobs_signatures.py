"""Signatures of callbacks, and the secret that those of single jobs come from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError, Unauthorized
from gateway.jobs.signatures import SECRET_FILE, Signatures, own_secret
from worker.storage.deliver import signature as workers_signature

OWN, SHARED = "own-secret-of-the-gateway-0123456789", "shared-secret"
BODY = '{"job_id": "a", "status": "completed", "note": "é"}'.encode()
JOB, OTHER_JOB = "job-a", "job-b"


def sign(secret: str, body: bytes = BODY) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


@pytest.fixture
def signatures() -> Signatures:
    return Signatures(OWN, SHARED)


def test_right_signatures_pass(signatures: Signatures) -> None:
    signatures.check_callback(BODY, sign(SHARED))
    signatures.check_webhook(JOB, BODY, sign(signatures.secret_of(JOB)))


def test_a_worker_signs_the_same(signatures: Signatures) -> None:
    signatures.check_webhook(JOB, BODY, workers_signature(signatures.secret_of(JOB), BODY))


WRONG: dict[str, Callable[[str], str]] = {
    "missing": lambda right: "",
    "without scheme": lambda right: right.removeprefix("sha256="),
    "other scheme": lambda right: right.replace("sha256", "sha1"),
    "upper case": lambda right: "sha256=" + right.removeprefix("sha256=").upper(),
    "cut": lambda right: right[:-1],
    "longer": lambda right: right + "0",
    "blank around": lambda right: f" {right} ",
    "zeros": lambda right: "sha256=" + "0" * 64,
    "no ascii": lambda right: "sha256=é\udc80",
}


@pytest.mark.parametrize("how", list(WRONG))
def test_wrong_signatures_do_not_pass(signatures: Signatures, how: str) -> None:
    with pytest.raises(Unauthorized):
        signatures.check_callback(BODY, WRONG[how](sign(SHARED)))
    with pytest.raises(Unauthorized):
        signatures.check_webhook(JOB, BODY, WRONG[how](sign(signatures.secret_of(JOB))))


def test_a_jobs_secret_signs_for_that_job_alone(signatures: Signatures) -> None:
    of_other = sign(signatures.secret_of(OTHER_JOB))

    with pytest.raises(Unauthorized):
        signatures.check_webhook(JOB, BODY, of_other)
    with pytest.raises(Unauthorized):
        signatures.check_callback(BODY, of_other)
    with pytest.raises(Unauthorized):
        signatures.check_webhook(JOB, BODY, sign(SHARED))


def test_secrets_tell_nothing_of_the_own_one(signatures: Signatures) -> None:
    assert signatures.secret_of(JOB) != signatures.secret_of(OTHER_JOB)
    assert OWN not in signatures.secret_of(JOB)
    assert signatures.secret_of(JOB) == Signatures(OWN, None).secret_of(JOB)


@pytest.mark.parametrize("shared", [None, ""])
def test_without_a_shared_secret_no_callback_passes(shared: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        Signatures(OWN, shared).check_callback(BODY, sign(""))

    assert caught.value.status == 500


@given(st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_a_body_that_changed_by_one_byte_does_not_pass(at: int, by: int) -> None:
    signatures = Signatures(OWN, SHARED)
    changed = bytes([*BODY[:at], BODY[at] ^ by, *BODY[at + 1 :]])

    with pytest.raises(Unauthorized):
        signatures.check_callback(changed, sign(SHARED))


def test_the_own_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    first = own_secret(folder)

    assert own_secret(folder) == first
    assert len(first) == 64
    assert (folder / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert own_secret(tmp_path / "another") != first


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40])
def test_a_secret_file_that_holds_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SECRET_FILE).write_bytes(content)

    with pytest.raises(ConfigError):
        own_secret(tmp_path)
