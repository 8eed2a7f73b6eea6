"""snapshot.json: exact both ways, and never half a file."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.cache.last_good import LastGood
from gateway.cache.snapshot_json import Damaged, Saved, decode, encode, from_json, to_json
from gateway.values.rows import Rule, Snapshot
from tests.gateway.cache_parts import small_snapshot
from tests.gateway.snapshots import snapshots

SAVED = Saved(small_snapshot(7, 'über "quoted" \n 🙂'), 1_795_000_000.25)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=50)
@given(snapshots(), st.floats(0, 4e9))
def test_every_configuration_comes_back_equal(snapshot: Snapshot, verified_at: float) -> None:
    saved = Saved(snapshot, verified_at)

    found = decode(encode(saved))

    assert found == saved
    assert type(found.snapshot.templates) is tuple
    assert found.snapshot.template("sdxl", "image", "enhancement", "sfw") == snapshot.template(
        "sdxl", "image", "enhancement", "sfw"
    )


@given(JSON_VALUES)
def test_free_values_come_back_with_their_types(value: object) -> None:
    rule = Rule(id=1, name="r", rule_type="append", slot="user", body="b", match={"key": value})

    found = (
        decode(encode(Saved(Snapshot(revision=1, rules=(rule,)), 0.0)))
        .snapshot.rules[0]
        .match["key"]
    )

    assert repr(found) == repr(value)


def test_every_field_of_a_snapshot_is_written() -> None:
    written = to_json(SAVED.snapshot)

    assert set(written) == {one.name for one in fields(Snapshot) if one.init}


@settings(max_examples=200)
@given(st.data())
def test_a_file_with_one_other_byte_is_refused_or_means_the_same(data: st.DataObject) -> None:
    raw = encode(SAVED)
    place = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255))

    changed = raw[:place] + bytes([byte]) + raw[place + 1 :]

    try:
        assert decode(changed) == SAVED  # blanks between values have no meaning
    except Damaged:
        assert changed != raw


@given(st.integers(0, 5000))
def test_a_file_that_was_cut_off_is_refused(length: int) -> None:
    raw = encode(SAVED)

    with pytest.raises(Damaged):
        decode(raw[: min(length, len(raw) - 2)])


@pytest.mark.parametrize("format", [0, 2, "1", None])
def test_a_file_of_another_format_is_refused(format: object) -> None:
    document = json.loads(encode(SAVED))
    document["format"] = format

    with pytest.raises(Damaged, match="format"):
        decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"[]", b"null", b'{"format": 1}', b"[" * 100_000, b"1" * 5000]
)
def test_what_is_no_document_of_ours_is_refused(raw: bytes) -> None:
    with pytest.raises(Damaged):
        decode(raw)


@pytest.mark.parametrize(
    ("key", "value"), [("revision", "7"), ("templates", {}), ("rules", [{}]), ("more", 1)]
)
def test_rows_of_other_types_are_refused(key: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        from_json({**to_json(SAVED.snapshot), key: value})


# --- the file ---------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    last_good = LastGood(tmp_path / "not" / "yet")

    last_good.write(SAVED)

    assert last_good.read() == SAVED
    assert last_good.path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in last_good.path.parent.iterdir()] == ["snapshot.json"]


def test_no_file_is_no_error(tmp_path: Path) -> None:
    assert LastGood(tmp_path).read() is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_it(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_good = LastGood(tmp_path)
    last_good.write(SAVED)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space"):
            last_good.write(Saved(replace(SAVED.snapshot, revision=8), 0.0))

    assert last_good.read() == SAVED
    assert [one.name for one in tmp_path.iterdir()] == ["snapshot.json"]


def test_a_damaged_file_is_moved_aside_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last_good = LastGood(tmp_path)
    last_good.write(SAVED)
    raw = last_good.path.read_bytes().replace(b'"revision": 7', b'"revision": 9')
    last_good.path.write_bytes(raw)

    found = last_good.read()

    assert found is None
    assert (tmp_path / "snapshot.json.damaged").read_bytes() == raw
    assert not last_good.path.exists()
    assert "SHA-256" in caplog.text


def test_a_file_that_cannot_be_read_is_left_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last_good = LastGood(tmp_path)
    last_good.path.mkdir()

    assert last_good.read() is None
    assert last_good.path.exists()
    assert "cannot be read" in caplog.text
