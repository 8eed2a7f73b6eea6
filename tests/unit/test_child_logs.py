"""Logs of children: nothing that a process says is lost, and no log grows for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.supervisor.logs import ChildLogs

PATIENCE_S = 20.0
NAME = "engine chat"
# Lines of 101 bytes, each written at once, as logging does.
COUNTS = "import sys\nfor n in range({0}): sys.stderr.write(f'{{n:06}} {{\"x\" * 93}}\\n')"
HANGS = "import time; time.sleep(600)"


class Bench:
    """Logs in a folder, and processes that speak into them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.logs = ChildLogs(folder)
        self.processes: list[subprocess.Popen[bytes]] = []

    def keeps(self, max_bytes: int, kept: int) -> None:
        self.logs = ChildLogs(self.folder, max_bytes, kept)

    def speaks(self, code: str) -> subprocess.Popen[bytes]:
        output = self.logs.open(NAME)
        try:
            self.processes.append(
                subprocess.Popen([sys.executable, "-uc", code], stdout=output, stderr=output)
            )
        finally:
            os.close(output)
        return self.processes[-1]

    def has_spoken(self, code: str) -> None:
        self.speaks(code).wait(PATIENCE_S)
        self.logs.close()

    def until(self, is_so: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < ends
            time.sleep(0.01)

    def files(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.folder.iterdir(), key=_age, reverse=True)

    def text(self) -> str:
        return "".join(one.read_text() for one in self.files())


def _age(path: Path) -> int:
    return 0 if path.suffix == ".log" else int(path.suffix[1:])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for process in bench.processes:
        process.kill()
        process.wait()
    bench.until(lambda: not any(one.name.startswith("log ") for one in threading.enumerate()))


def lines(count: int) -> str:
    return "".join(f"{n:06} {'x' * 93}\n" for n in range(count))


def test_a_log_rotates_while_its_process_speaks_and_every_line_is_there_once(bench: Bench) -> None:
    bench.keeps(200_000, kept=20)

    bench.has_spoken(COUNTS.format(12_000))

    assert bench.text() == lines(12_000)
    assert len(bench.files()) >= 7
    for file in bench.files():
        content = file.read_text()
        assert len(content) <= 200_000
        assert content.endswith("\n")


def test_of_what_is_old_only_so_many_files_are_kept(bench: Bench) -> None:
    bench.keeps(200_000, kept=2)

    bench.has_spoken(COUNTS.format(12_000))

    assert [one.name for one in bench.files()] == [
        "engine-chat.log.2", "engine-chat.log.1", "engine-chat.log",
    ]  # fmt: skip
    assert lines(12_000).endswith(bench.text())


def test_lines_of_several_processes_with_one_output_are_whole_and_all_there(bench: Bench) -> None:
    """As of gunicorn and its worker."""
    bench.keeps(100_000, kept=20)

    bench.has_spoken(f"import os; who = os.fork()\n{COUNTS.format(3000)}\nif who: os.wait()")

    assert sorted(bench.text().splitlines()) == sorted(lines(3000).splitlines() * 2)


def test_what_is_said_can_be_read_while_the_process_runs(bench: Bench) -> None:
    bench.speaks(f"print('hello'); {HANGS}")

    bench.until(lambda: bool(bench.files()) and bench.text() == "hello\n")


def test_a_line_without_an_end_and_bytes_that_are_no_text_stay_as_they_are(bench: Bench) -> None:
    bench.has_spoken(r"import os; os.write(2, b'\xff\x00\r\n' + b'y' * 300_000)")

    (file,) = bench.files()
    assert file.read_bytes() == b"\xff\x00\r\n" + b"y" * 300_000


def test_a_line_stays_in_one_file_although_it_comes_in_two_pieces(bench: Bench) -> None:
    bench.keeps(100, kept=2)
    speaks = bench.logs.open(NAME)
    copied = bench.logs._outputs[NAME]

    for piece in (b"x" * 59 + b"\n", b"y" * 30, b"y" * 29 + b"\n"):
        os.write(speaks, piece)
        bench.until(lambda piece=piece: copied.tail.endswith(piece))  # type: ignore[misc]
    os.close(speaks)

    bench.until(lambda: len(bench.files()) == 2)
    assert [one.read_text() for one in bench.files()] == ["x" * 59 + "\n", "y" * 59 + "\n"]


def test_a_line_that_never_ends_is_not_kept_in_memory(bench: Bench) -> None:
    bench.speaks(f"import os; os.write(2, b'y' * 200_000); {HANGS}")

    bench.until(lambda: bool(bench.files()) and len(bench.text()) > 100_000)


def test_the_last_line_needs_no_end_and_nobody_who_asks(bench: Bench) -> None:
    bench.speaks("import os; os.write(2, b'bye')")

    bench.until(lambda: bool(bench.files()) and bench.text() == "bye")


def test_a_log_is_written_on_after_a_restart_of_everything(bench: Bench) -> None:
    bench.has_spoken("print('before')")
    bench.logs = ChildLogs(bench.folder)

    bench.has_spoken("print('after')")

    assert bench.text() == "before\nafter\n"


def test_a_log_that_somebody_removes_is_begun_anew(bench: Bench) -> None:
    bench.has_spoken("print('before')")
    bench.files()[0].unlink()

    bench.has_spoken("print('after')")

    assert bench.text() == "after\n"


def test_what_the_disk_does_not_take_is_told_when_it_does_again(bench: Bench) -> None:
    blocked = bench.logs.path(NAME)
    blocked.mkdir()
    bench.has_spoken("print('lost')")
    blocked.rmdir()

    bench.has_spoken("print('after')")

    assert bench.text() == "\n(up to 5 bytes could not be written here)\nafter\n"


# --- last words --------------------------------------------------------------------------------


def test_the_last_words_of_a_process_are_known_when_it_has_ended(bench: Bench) -> None:
    """However many there are before them, and at once: nobody waits for a thread."""
    for number in range(20):
        process = bench.speaks(f"{COUNTS.format(1000)}\nraise KeyError('{number}')")
        process.wait(PATIENCE_S)

        assert bench.logs.last_words(NAME) == f"KeyError: '{number}'"


def test_last_words_may_lack_the_end_of_their_line(bench: Bench) -> None:
    code = "import os; os.write(2, b'ValueError: no room'); os.kill(os.getpid(), 9)"
    bench.speaks(code).wait(PATIENCE_S)

    assert bench.logs.last_words(NAME) == "ValueError: no room"
    assert bench.text() == "ValueError: no room"


def test_last_words_are_known_although_somebody_else_still_has_the_output(bench: Bench) -> None:
    """As a worker of gunicorn has, for a moment after its master was killed."""
    speaks = bench.logs.open(NAME)
    os.write(speaks, b"KeyError: 'first'\n")

    words = bench.logs.last_words(NAME)

    os.close(speaks)
    assert words == "KeyError: 'first'"


def test_last_words_are_of_the_last_process_and_of_its_end(bench: Bench) -> None:
    bench.has_spoken("raise KeyError('the one before')")
    bench.has_spoken("print('KeyError: long ago'); print('x' * 9000)")

    assert bench.logs.last_words(NAME) == ""


def test_a_process_that_never_was_has_no_last_words(bench: Bench) -> None:
    assert bench.logs.last_words("front chat") == ""


# --- any sizes ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 60).map(lambda size: b"%0*d\n" % (size, size)), max_size=40),
    max_bytes=st.integers(1, 100),
)
def test_files_follow_one_another_without_a_gap(pieces: list[bytes], max_bytes: int) -> None:
    from worker.supervisor.logs import _LogFile

    with tempfile.TemporaryDirectory() as folder:
        file = _LogFile(Path(folder) / "x.log", max_bytes, kept=50)
        for piece in pieces:
            file.write(piece)
        files = sorted(Path(folder).iterdir(), key=_age, reverse=True)
        contents = [one.read_bytes() for one in files]

    assert b"".join(contents) == b"".join(pieces)
    assert all(len(one) <= max_bytes or one in pieces for one in contents)
