"""Answers to what never becomes a request."""

from __future__ import annotations

import json

import pytest
from gunicorn.http.errors import InvalidRequestLine, LimitRequestHeaders, LimitRequestLine

from worker.errors import has_trap_word
from worker.front.threads import refusal


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestLine("inf"), b"400"),
        (LimitRequestLine(9000, 4094), b"414"),
        (LimitRequestHeaders("nan"), b"431"),
    ],
)
def test_an_unreadable_head_is_answered_in_the_shape_of_all_errors(error, status):
    head, _, body = refusal(error).partition(b"\r\n\r\n")

    answer = json.loads(body)
    assert head.split()[1] == status
    assert f"Content-Length: {len(body)}".encode() in head
    assert sorted(answer) == ["error", "error_code", "request_id", "success"]
    assert answer["success"] is False
    assert not has_trap_word(body.decode())
