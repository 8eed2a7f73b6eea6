"""Files of finished jobs: there with all their bytes under their hash, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.job_parts import sha256, stage
from worker.errors import DiskFull, JournalUnavailable, has_trap_word
from worker.jobs.results import DamagedResult, Results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "jobs" / "results")


def stored(tmp_path: Path) -> dict[str, bytes]:
    """Every published file, by its name."""
    root = tmp_path / "jobs" / "results"
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_published_files_lie_under_their_hashes(results: Results, tmp_path: Path) -> None:
    assets = stage(tmp_path / "staging", b"one", b"two", thumbnail=b"small")

    published = results.publish(tmp_path / "staging", assets)

    assert stored(tmp_path) == {sha256(content): content for content in (b"one", b"two", b"small")}
    assert results.path(sha256(b"one")).read_bytes() == b"one"
    assert published == tuple(
        msgspec.structs.replace(one, thumbnail_sha256=sha256(b"small"), thumbnail_bytes=5)
        for one in assets
    )


def test_the_same_file_of_two_jobs_is_one_file(results: Results, tmp_path: Path) -> None:
    first = results.publish(tmp_path / "a", stage(tmp_path / "a", b"same"))

    second = results.publish(tmp_path / "b", stage(tmp_path / "b", b"same"))

    assert second == first
    assert set(stored(tmp_path)) == {sha256(b"same"), sha256(b"small")}


def test_the_same_picture_twice_in_one_job_is_published(results: Results, tmp_path: Path) -> None:
    assets = stage(tmp_path / "a", b"same", b"same")

    published = results.publish(tmp_path / "a", assets)

    assert [one.sha256 for one in published] == [sha256(b"same")] * 2
    assert set(stored(tmp_path)) == {sha256(b"same"), sha256(b"small")}


def test_publishing_what_is_published_says_the_same_again(results: Results, tmp_path: Path) -> None:
    """The journal could not take it, and the runner tries both once more."""
    assets = stage(tmp_path / "a", b"one", b"two")
    first = results.publish(tmp_path / "a", assets)

    again = results.publish(tmp_path / "a", assets)

    assert again == first
    assert len(stored(tmp_path)) == 3


def test_a_file_that_is_not_what_its_engine_said_is_refused_before_any_is_published(
    results: Results, tmp_path: Path
) -> None:
    assets = stage(tmp_path / "a", b"one", b"two")
    (tmp_path / "a" / "1.png").write_bytes(b"twp")

    for _ in range(2):
        with pytest.raises(DamagedResult, match=r"1\.png"):
            results.publish(tmp_path / "a", assets)

    assert stored(tmp_path) == {}
    assert (tmp_path / "a" / "0.png").read_bytes() == b"one"


@pytest.mark.parametrize("missing", ["1.png", "1.thumb.webp"])
def test_a_file_that_its_engine_has_not_staged_is_refused_before_any_is_published(
    results: Results, tmp_path: Path, missing: str
) -> None:
    assets = stage(tmp_path / "a", b"one", b"two")
    (tmp_path / "a" / missing).unlink()

    with pytest.raises(FileNotFoundError):
        results.publish(tmp_path / "a", assets)

    assert stored(tmp_path) == {}


def test_a_job_without_files_is_refused(results: Results, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    with pytest.raises(DamagedResult, match="no file"):
        results.publish(tmp_path / "a", ())


class Failing:
    """Calls that fail as a disk does, from call number `at` on until they are mended."""

    def __init__(self, at: int, number: int, real: Callable[..., Any]):
        self.at = at
        self.number = number
        self.real = real
        self.calls = 0
        self.mended = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if not self.mended and self.calls > self.at:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


FULL = (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize("number", [*FULL, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_bytes")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_disk_that_takes_no_more_loses_nothing(
    results: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    at: int,
    number: int,
) -> None:
    """At every step: the files are where they were or where they belong, and a try that comes
    when there is room again publishes them all."""
    contents = [b"one", b"two"]
    assets = stage(tmp_path / "a", *contents, thumbnail=b"small")
    failing = Failing(at, number, getattr(owner, name))
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))

    try:
        results.publish(tmp_path / "a", assets)
        assert failing.calls <= at, "it went on after a failure"
    except (DiskFull, JournalUnavailable) as exc:
        assert isinstance(exc, DiskFull) == (number in FULL)
        assert not has_trap_word(str(exc)) and str(tmp_path) not in str(exc)
    failing.mended = True
    left = {file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert {b"one", b"two", b"small"} <= left | set(stored(tmp_path).values())

    published = results.publish(tmp_path / "a", assets)

    assert stored(tmp_path) == {sha256(content): content for content in (*contents, b"small")}
    assert [one.thumbnail_sha256 for one in published] == [sha256(b"small")] * 2


def test_another_trouble_of_the_disk_is_told_as_it_is(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = stage(tmp_path / "a", b"one")
    monkeypatch.setattr(os, "fsync", Failing(0, errno.EIO, os.fsync))

    with pytest.raises(OSError, match="Input/output error"):
        results.publish(tmp_path / "a", assets)


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_end(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def move(path: Path, target: Path) -> Path:
        steps.append(f"{path.name} becomes {target.name}")
        return rename(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not say which file a descriptor is of")
    assets = stage(tmp_path / "a", b"one")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", move)

    results.publish(tmp_path / "a", assets)

    name = sha256(b"one")
    at = steps.index(f"0.png becomes {name}")
    assert steps[at - 1] == "sync 0.png"
    assert steps[at + 1] == f"sync {name[:2]}"
    assert "sync results" in steps[: at - 1]


def test_removed_files_are_gone_and_unknown_ones_no_harm(results: Results, tmp_path: Path) -> None:
    results.publish(tmp_path / "a", stage(tmp_path / "a", b"one", b"two"))

    results.remove([sha256(b"one"), sha256(b"never published")])
    results.remove([sha256(b"one")])

    assert set(stored(tmp_path)) == {sha256(b"two"), sha256(b"small")}


def test_files_that_were_published_and_never_written_down_go(
    results: Results, tmp_path: Path
) -> None:
    results.publish(tmp_path / "a", stage(tmp_path / "a", b"one", b"two"))

    removed = results.remove_others({sha256(b"two"), sha256(b"of a job without its file")})

    assert removed == 2
    assert set(stored(tmp_path)) == {sha256(b"two")}


def test_there_is_nothing_to_remove_before_anything_was_published(results: Results) -> None:
    assert results.remove_others(set()) == 0
