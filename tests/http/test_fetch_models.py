"""scripts/fetch_models.py against a hub that runs here, with the faults that networks have.

The hub answers as huggingface.co does: a paginated tree; LFS files by a redirect to another host
(here: another port), all others by a relative redirect on its own host.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from scripts import fetch_models
from worker.catalog import AdapterSpec, adapter_spec, chat_catalog, media_catalog
from worker.config import REPOSITORY, load_settings
from worker.modelfiles import check_adapter, check_files

PROFILE = """
[chat]
models = ["tiny"]
[media]
models = ["paint"]

[[models]]
id = "tiny"
kind = "chat"
path = ["tiny", "cache/tiny"]
[models.source]
repository = "org/tiny"
revision = "refs/pr/1"
files = ["*.json", "*.safetensors"]

[[models]]
id = "paint"
kind = "sdxl"
path = "paint/paint.safetensors"
config_path = "paint-config"
[models.source]
repository = "org/paint"
files = ["paint.safetensors"]
[models.config_source]
repository = "org/base"
files = ["*.json"]

[[models]]
id = "demo-chat"
kind = "chat"
path = "demo-chat"
"""


def weights(payload: bytes) -> bytes:
    """A safetensors file with one tensor."""
    tensor = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    header = json.dumps({"w": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + payload


BIG = weights(bytes(range(256)) * 4096)
HALF = len(BIG) // 2
TINY = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "extra folder/notes.json": b"[1]",
    "manifest.json": b"the repository's own, which is in the way of the record",
    "README.md": b"not asked for",
    "model.safetensors": BIG,
}
REPOSITORIES = {
    "org/tiny": TINY,
    "org/paint": {"paint.safetensors": weights(b"paint")},
    "org/base": {
        "model_index.json": b"{}",
        "scheduler/scheduler_config.json": b"{}",
        "text_encoder/config.json": b"{}",
        "text_encoder_2/config.json": b"{}",
        "tokenizer/tokenizer.json": b"{}",
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer_2/tokenizer.json": b"{}",
        "tokenizer_2/tokenizer_config.json": b"{}",
        "unet/config.json": b'{"a": 1}',
        "vae/config.json": b"{}",
    },
}


@dataclass(frozen=True)
class Seen:
    """A request that the hub or its storage got."""

    host: str
    path: str  # as sent, quoted
    range: str | None
    token: str | None


# Answers a request in a wrong way: gets the handler, the file's content and the first byte asked.
Fault = Callable[["Handler", bytes, int], None]


@dataclass
class FakeHub:
    repositories: dict[str, dict[str, bytes]]
    seen: list[Seen] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # by path; each is used once
    announced: dict[str, Any] = field(default_factory=dict)  # instead of what is true of each file
    page_size: int = 2
    hub: str = ""
    storage: str = ""
    next_page: str = ""  # the host of the following page, where it is not the hub

    def asked(self, word: str, host: str = "hub") -> list[Seen]:
        return [one for one in self.seen if one.host == host and word in one.path]

    def tree(self, repository: str) -> list[dict[str, Any]]:
        folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "extra folder"}
        files = self.repositories[repository].items()
        return [folder] + [tree_entry(path, content) | self.announced for path, content in files]


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith(".safetensors"):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "oid": oid, "size": len(content), "path": path}
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return {"type": "file", "oid": "1" * 40, "size": len(content), "path": path, "lfs": lfs}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; without this 40 ms lie between
    fake: FakeHub
    host: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert self.headers["Accept-Encoding"] == "identity"
        url = urlsplit(self.path)
        wanted, token = self.headers["Range"], self.headers["Authorization"]
        self.fake.seen.append(Seen(self.host, url.path, wanted, token))
        _, owner, name, verb, *rest = url.path.removeprefix("/api/models").split("/")
        repository, place = f"{owner}/{name}", "/".join(rest[1:])
        if verb == "tree":
            self.answer_tree(repository, parse_qs(url.query))
        elif verb == "resolve":
            base = self.fake.storage if place.endswith(".safetensors") else "/"
            self.answer(302, b"", {"Location": f"{base}{repository}/cached/x/{place}"})
        else:
            content = self.fake.repositories[repository][unquote(place)]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if not self.fault(unquote(place), content, start):
                self.answer_from(content, start)

    def answer_tree(self, repository: str, query: dict[str, list[str]]) -> None:
        assert query["recursive"] == ["true"]
        start = int(query.get("cursor", ["0"])[0])
        if self.fault("tree", b"", start):
            return
        entries = self.fake.tree(repository)
        end = start + self.fake.page_size
        following = f"{self.fake.next_page or self.fake.hub}{urlsplit(self.path).path}"
        link = f'<{following}?recursive=true&cursor={end}>; rel="next"'
        headers = {"Link": link} if end < len(entries) else {}
        self.answer(200, json.dumps(entries[start:end]).encode(), headers)

    def fault(self, name: str, content: bytes, start: int) -> bool:
        due = self.fake.faults.get(name)
        if not due:
            return False
        due.pop(0)(self, content, start)
        return True

    def answer_from(self, content: bytes, start: int) -> None:
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], {"Content-Range": span})
        else:
            self.answer(200, content)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _content, _start: handler.answer(code, b"no", named)


def saying(body: bytes) -> Fault:
    return lambda handler, _content, _start: handler.answer(200, body)


def cut(handler: Handler, content: bytes, start: int) -> None:
    """The connection ends in the middle of what is left."""
    handler.answer(
        200 if not start else 206,
        content[start : (start + len(content)) // 2],
        {
            "Content-Length": str(len(content) - start),
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        },
    )
    handler.close_connection = True


def short(handler: Handler, content: bytes, start: int) -> None:
    """Less than the whole file, and the answer claims to be complete."""
    assert not start
    handler.answer(200, content[:HALF])


def whole(handler: Handler, content: bytes, _start: int) -> None:
    handler.answer(200, content)


def elsewhere(handler: Handler, content: bytes, start: int) -> None:
    """A range, but not the one that was asked for."""
    span = f"bytes {start + 1}-{len(content) - 1}/{len(content)}"
    handler.answer(206, content[start + 1 :], {"Content-Range": span})


def wrong(handler: Handler, content: bytes, _start: int) -> None:
    handler.answer(200, flipped(content))


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "*")
    hub = FakeHub({name: dict(files) for name, files in REPOSITORIES.items()})
    servers = []
    for host in ("hub", "storage"):
        handler = type("Bound", (Handler,), {"fake": hub, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        servers.append(server)
    hub.hub, hub.storage = (f"http://127.0.0.1:{one.server_port}" for one in servers)
    hub.storage += "/"
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


@dataclass
class Script:
    """The script, with a models folder and a profile of the test's own."""

    fake: FakeHub
    folder: Path
    profile: Path
    slept: list[float] = field(default_factory=list)
    free: int = 1 << 40
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *argv: str) -> int:
        env = {"HF_ENDPOINT": self.fake.hub, "VERBATIM_MODELS_DIR": str(self.folder), **self.env}
        arguments = ["--profile", str(self.profile), *argv]
        return fetch_models.main(arguments, env, self.slept.append, lambda _path: self.free)

    def problems(self, model: str) -> list[str]:
        """What the daemon finds wrong with a model."""
        settings = load_settings(str(self.profile), {"VERBATIM_MODELS_DIR": str(self.folder)})
        specs = (*chat_catalog(settings).specs, *media_catalog(settings).specs)
        [spec] = [one for one in specs if one.id == model]
        return [str(one) for one in check_files(spec, full=spec.path.is_dir())]

    def files(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in found)


@pytest.fixture
def script(fake: FakeHub, tmp_path: Path) -> Script:
    profile = tmp_path / "test.toml"
    profile.write_text(PROFILE)
    return Script(fake, tmp_path / "models", profile)


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return content


# --- a fetch without trouble ------------------------------------------------------------------


def test_a_folder_is_fetched_whole_and_recorded(script: Script, fake: FakeHub) -> None:
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    unwanted = ("README.md", "manifest.json")
    wanted = {name: content for name, content in TINY.items() if name not in unwanted}
    assert script.files() == sorted(f"tiny/{name}" for name in [*wanted, "manifest.json"])
    assert manifest(script.folder / "tiny") == {
        "source": {"repository": "org/tiny", "revision": "refs/pr/1"},
        "files": {
            name: {"size": len(content), "sha256": sha256(content)}
            for name, content in wanted.items()
        },
    }
    assert len(fake.asked("/api/models/org/tiny/tree/refs%2Fpr%2F1")) == 4
    assert fake.asked("/org/tiny/resolve/refs%2Fpr%2F1/extra%20folder/notes.json")


def test_a_single_file_and_its_configs_are_fetched(script: Script) -> None:
    assert script("paint") == 0
    assert script.problems("paint") == []
    assert script.files() == [
        "paint-config/manifest.json",
        "paint-config/model_index.json",
        "paint-config/scheduler/scheduler_config.json",
        "paint-config/text_encoder/config.json",
        "paint-config/text_encoder_2/config.json",
        "paint-config/tokenizer/tokenizer.json",
        "paint-config/tokenizer/tokenizer_config.json",
        "paint-config/tokenizer_2/tokenizer.json",
        "paint-config/tokenizer_2/tokenizer_config.json",
        "paint-config/unet/config.json",
        "paint-config/vae/config.json",
        "paint/manifest.json",
        "paint/paint.safetensors",
    ]


def test_a_record_keeps_other_files_that_are_still_there(script: Script) -> None:
    folder = script.folder / "paint"
    folder.mkdir(parents=True)
    (folder / "other.safetensors").write_bytes(b"12")
    other = {"size": 2, "sha256": sha256(b"12")}
    records = {"other.safetensors": other, "gone.safetensors": other}
    (folder / "manifest.json").write_text(json.dumps({"files": records}))
    assert script("paint") == 0
    files = manifest(folder)["files"]
    assert sorted(files) == ["other.safetensors", "paint.safetensors"]
    assert files["other.safetensors"] == other


def test_a_log_has_a_line_at_the_start_and_the_end_of_a_file(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_models, "BLOCK", 1 << 16)  # a file is big from here on
    assert script("tiny") == 0
    lines = capsys.readouterr().out.splitlines()
    about = [line for line in lines if line.startswith("model.safetensors: ")]
    assert about[0] == "model.safetensors: 1.0 MiB"
    assert "model.safetensors: 50 %" in about
    assert len(about) <= 11
    assert "done" in about[-1]
    assert lines[-1] == f"tiny: complete in {script.folder / 'tiny'}"


def test_a_terminal_gets_bars(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert script("paint", "tiny") == 0
    last = terminal.getvalue().rpartition("model.safetensors")[2]
    assert re.search(r"total .*━.*1\.0/1\.0 MiB", last)


# --- what is here already ---------------------------------------------------------------------


def test_what_is_complete_is_not_asked_for_again(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script() == 0
    fake.seen.clear()
    capsys.readouterr()
    written = (script.folder / "tiny" / "manifest.json").stat()
    assert script() == 0
    assert (script.folder / "tiny" / "manifest.json").stat().st_ino == written.st_ino
    assert not fake.asked("/resolve/")
    assert not fake.asked("", host="storage")
    # The record vouches for the big file; a small one has no sha256 to compare with.
    assert "checking model.safetensors" not in capsys.readouterr().out


def test_files_without_a_record_are_hashed_and_kept(script: Script, fake: FakeHub) -> None:
    assert script("tiny") == 0
    (script.folder / "tiny" / "manifest.json").unlink()
    fake.seen.clear()
    assert script("tiny") == 0
    assert not fake.asked("/resolve/")
    assert script.problems("tiny") == []


def test_naming_a_model_mends_a_damaged_file(script: Script, fake: FakeHub) -> None:
    assert script("tiny") == 0
    (script.folder / "tiny" / "model.safetensors").write_bytes(flipped(BIG))
    assert "is damaged" in script.problems("tiny")[0]
    fake.seen.clear()
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    assert [one.path.rsplit("/")[-1] for one in fake.asked("/resolve/")] == ["model.safetensors"]


def test_a_served_model_that_is_complete_in_another_folder_is_left_there(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script() == 0
    (script.folder / "cache").mkdir()
    (script.folder / "tiny").rename(script.folder / "cache" / "tiny")
    fake.seen.clear()
    assert script() == 0
    assert not fake.asked("org/tiny")
    assert "tiny: skipped, it is complete in" in capsys.readouterr().out


def test_a_model_without_a_source_is_skipped_in_a_line(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("demo-chat") == 0
    assert "demo-chat: skipped" in (out := capsys.readouterr().out)
    assert "it has no source" in out
    assert not fake.seen


def test_a_demo_model_is_skipped_because_it_is_there(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--profile", "demo"]

    assert fetch_models.main(arguments, {"HF_ENDPOINT": fake.hub}, script.slept.append) == 0

    out = capsys.readouterr().out
    for name in ("demo-chat", "demo-image", "demo-video"):
        assert f"{name}: skipped, it comes with this program" in out
    assert not fake.seen


def test_verify_accepts_what_was_fetched_without_any_request(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script() == 0
    fake.seen.clear()
    assert script("--verify") == 0
    assert f"{script.folder / 'paint' / 'paint.safetensors'}: ok" in capsys.readouterr().out
    assert not fake.seen


def test_verify_finds_a_flipped_byte(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("tiny") == 0
    path = script.folder / "tiny" / "model.safetensors"
    path.write_bytes(flipped(BIG))
    assert script("tiny", "--verify") == 1
    out = capsys.readouterr().out
    assert f"{path}: DAMAGED: sha256 {sha256(flipped(BIG))} is not the recorded" in out
    assert f"{path.with_name('config.json')}: ok" in out
    assert "run python scripts/fetch_models.py tiny" in out


def test_verify_finds_missing_short_and_unrecorded_files(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script() == 0
    (script.folder / "tiny" / "config.json").unlink()
    (script.folder / "tiny" / "tokenizer.json").write_bytes(b"{}")
    (script.folder / "paint" / "manifest.json").write_text("{")
    assert script("--verify") == 1
    out = capsys.readouterr().out
    assert "config.json: MISSING" in out
    assert "tokenizer.json: DAMAGED: 2 bytes instead of the recorded 13" in out
    assert "paint.safetensors: NOT VERIFIED" in out


def test_the_table_tells_what_is_complete(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("tiny") == 0
    fake.seen.clear()
    capsys.readouterr()
    assert script("--list") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["tiny"] == ["chat", "org/tiny", "yes", "1.0", "MiB"]
    assert rows["paint"] == ["sdxl", "org/paint", "no", "0", "B"]
    assert rows["demo-chat"] == ["chat", "-", "no", "0", "B"]
    assert "qwen_instruct" in rows
    assert not fake.seen


# --- faults of the network and the hub --------------------------------------------------------


def test_a_cut_download_goes_on_where_it_ended(script: Script, fake: FakeHub) -> None:
    fake.faults["model.safetensors"] = [cut]
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    ranges = [one.range for one in fake.asked("model.safetensors", host="storage")]
    assert ranges == [None, f"bytes={HALF}-"]
    assert script.slept == [2.0]


def test_an_interrupted_fetch_is_resumed_by_the_next_run(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupt(list[float]):
        def append(self, _seconds: float) -> None:
            raise KeyboardInterrupt

    fake.faults["model.safetensors"] = [cut]
    script.slept = Interrupt()
    assert script("tiny") == 130
    assert capsys.readouterr().err.count("\n") == 1
    part = script.folder / "tiny" / "model.safetensors.part"
    assert part.read_bytes() == BIG[:HALF]
    fake.seen.clear()
    assert script("tiny") == 0
    assert [one.range for one in fake.asked("", host="storage")] == [f"bytes={HALF}-"]
    assert script.problems("tiny") == []
    assert not part.exists()


def test_a_complete_part_needs_no_request(script: Script, fake: FakeHub) -> None:
    for name, content in TINY.items():
        part = script.folder / "tiny" / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
    assert script("tiny") == 0
    assert not fake.asked("/resolve/")
    assert not fake.asked("", host="storage")
    assert script.problems("tiny") == []


def test_a_part_of_something_else_is_thrown_away(script: Script) -> None:
    folder = script.folder / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"x" * HALF)
    (folder / "config.json.part").write_bytes(b"longer than the file")
    assert script("tiny") == 0
    assert script.problems("tiny") == []


@pytest.mark.parametrize("answer", [whole, elsewhere, status(416)])
def test_a_server_that_does_not_resume_sends_all_of_it(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str], answer: Fault
) -> None:
    fake.faults["model.safetensors"] = [cut, answer]
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    assert "is not the announced" not in capsys.readouterr().out
    ranges = [one.range for one in fake.asked("", host="storage")]
    assert ranges == [None, f"bytes={HALF}-", None][: 2 if answer is whole else 3]


def test_a_download_is_never_given_up_while_it_goes_on(script: Script, fake: FakeHub) -> None:
    fake.faults["model.safetensors"] = [cut] * (fetch_models.TRIES + 2)
    assert script("tiny") == 0
    assert script.problems("tiny") == []


def test_no_more_is_read_than_was_announced(script: Script, fake: FakeHub) -> None:
    sent = []

    def endless(handler: Handler, content: bytes, _start: int) -> None:
        handler.answer(200, b"", {"Content-Length": str(len(content) * 64)})
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                handler.wfile.write(content)
                sent.append(len(content))
        handler.close_connection = True

    fake.faults["model.safetensors"] = [endless]
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    assert len(sent) < 32  # what the sockets hold may be sent


def test_a_body_that_ends_early_is_completed(script: Script, fake: FakeHub) -> None:
    fake.faults["model.safetensors"] = [short]
    assert script("tiny") == 0
    assert script.problems("tiny") == []
    assert fake.asked("", host="storage")[1].range == f"bytes={HALF}-"


def test_a_server_that_always_ends_early_is_given_up(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.faults["model.safetensors"] = [short, *[status(416), short] * 9]
    assert script("tiny") == 1
    err = capsys.readouterr().err
    assert "6 times in a row" in err
    assert "run the same command again" in err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_content_is_fetched_twice_and_never_kept(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fake.faults[name] = [wrong, wrong]
    assert script("tiny") == 1
    assert fake.faults[name] == []
    assert not [path for path in script.files() if name in path or "manifest" in path]
    entry, other = tree_entry(name, TINY[name]), tree_entry(name, flipped(TINY[name]))
    err = capsys.readouterr().err
    assert entry.get("lfs", entry)["oid"] in err
    assert other.get("lfs", other)["oid"] in err
    assert name in err


def test_content_that_is_wrong_once_is_fetched_again(script: Script, fake: FakeHub) -> None:
    fake.faults["model.safetensors"] = [wrong]
    assert script("tiny") == 0
    assert script.problems("tiny") == []


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (status(429, Retry_After="7"), 7.0),
        (status(429, RateLimit='"resolvers";r=0;t=55'), 55.0),
        (status(429, Retry_After="9999"), 300.0),
        (status(503), 2.0),
    ],
)
@pytest.mark.parametrize("place", ["tree", "model.safetensors"])
def test_a_busy_server_is_asked_again_after_the_time_it_names(
    script: Script, fake: FakeHub, fault: Fault, waits: float, place: str
) -> None:
    fake.faults[place] = [fault]
    assert script("tiny") == 0
    assert script.slept == [waits]


def test_a_server_that_stays_down_is_given_up_with_longer_and_longer_waits(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.faults["tree"] = [status(500)] * 6
    assert script("tiny") == 1
    assert script.slept == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert "answers 500, 6 times in a row" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.env = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    assert script("tiny") == 1
    err = capsys.readouterr().err
    assert "ConnectError" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, ["HF_TOKEN", "licence"]),
        (403, ["HF_TOKEN", "licence"]),
        (404, ["revision"]),
        (302, []),
    ],
)
@pytest.mark.parametrize("place", ["tree", "model.safetensors"])
def test_a_refusal_says_what_to_set(
    script: Script,
    fake: FakeHub,
    capsys: pytest.CaptureFixture[str],
    code: int,
    words: list[str],
    place: str,
) -> None:
    fake.faults[place] = [status(code)]
    assert script("tiny") == 1
    err = capsys.readouterr().err
    for word in (*words, f"answers {code}", "org/tiny" if place == "tree" else place):
        assert word in err
    assert script.slept == []


def test_an_answer_that_is_no_file_list_is_told(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for body in (b"<html>", b"[1]", b'[{"type": "file", "path": "a.json", "size": 1, "oid": "x"}]'):
        fake.faults["tree"] = [saying(body)]
        assert script("tiny") == 1
        assert "did not answer as a hub does; check HF_ENDPOINT" in capsys.readouterr().err


def test_a_model_that_fails_does_not_stop_the_others(script: Script, fake: FakeHub) -> None:
    fake.faults["model.safetensors"] = [status(404)]
    assert script("tiny", "paint") == 1
    assert script.problems("paint") == []


def test_files_that_make_no_model_are_a_failure(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    del fake.repositories["org/tiny"]["tokenizer.json"]
    assert script("tiny") == 1
    assert "tokenizer.json: is missing" in capsys.readouterr().err


def test_patterns_that_match_nothing_are_a_failure(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.repositories["org/tiny"] = {"README.md": b""}
    assert script("tiny") == 1
    assert "0 files of org/tiny at refs/pr/1 match" in capsys.readouterr().err


def test_a_single_file_takes_one_file_of_the_repository(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.repositories["org/paint"]["second.safetensors"] = b""
    script.profile.write_text(PROFILE.replace('["paint.safetensors"]', '["*.safetensors"]'))
    assert script("paint") == 1
    assert "2 files of org/paint at main match" in capsys.readouterr().err


def test_a_cache_folder_is_not_written_to(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    script.profile.write_text(PROFILE.replace('"cache/tiny"', "").replace('"tiny",', '"models--t"'))
    assert script("tiny") == 1
    assert "is a Hugging Face cache" in capsys.readouterr().err
    assert not fake.seen


# --- what must never happen -------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["../out.json", "/out.json", "a/../../out.json", "..\\out.json", "a//b.json", "", "a\0b"],
)
def test_a_path_outside_the_folder_is_refused_before_anything_is_fetched(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    fake.announced = {"path": path}
    assert script("tiny") == 1
    assert "outside its folder" in capsys.readouterr().err
    assert not fake.asked("/resolve/")
    assert script.files() == []


def test_the_token_goes_to_the_hub_alone_and_is_never_printed(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    script.env = {"HF_TOKEN": "hf_secret\n"}
    fake.faults["model.safetensors"] = [status(503), status(403)]
    assert script("tiny") == 1
    assert {one.token for one in fake.asked("")} == {"Bearer hf_secret"}
    assert {one.token for one in fake.asked("", host="storage")} == {None}
    assert "secret" not in "".join(capsys.readouterr())


def test_the_token_does_not_follow_a_page_on_another_host(script: Script, fake: FakeHub) -> None:
    script.env = {"HF_TOKEN": "hf_secret"}
    fake.next_page = fake.storage.rstrip("/")
    assert script("tiny") == 0
    assert {one.token for one in fake.asked("/tree/", host="storage")} == {None}


@pytest.mark.parametrize("name", ["HF_TOKEN", "HF_ENDPOINT"])
def test_a_setting_that_cannot_be_one_is_refused(
    script: Script, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    script.env = {name: "no good\u00e9"}
    assert script("tiny") == 2
    assert name in (err := capsys.readouterr().err)
    assert name != "HF_TOKEN" or "good" not in err


def test_a_full_disk_is_told_before_anything_is_fetched(
    script: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    script.free = 1000
    assert script("tiny") == 1
    err = capsys.readouterr().err
    assert "needs 1.0 MiB" in err
    assert "1000 B free" in err
    assert not fake.asked("/resolve/")


def test_a_part_needs_only_the_room_of_the_rest(script: Script) -> None:
    part = script.folder / "tiny" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BIG[:-10])
    script.free = 1000
    assert script("tiny") == 0


def test_a_folder_that_cannot_be_made_is_told(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.folder.write_text("a file")
    assert script("tiny") == 1
    assert "cannot be made" in (err := capsys.readouterr().err)
    assert "--models-dir" in err


# --- the command line -------------------------------------------------------------------------


def test_an_unknown_model_is_a_usage_error_that_names_the_nearest(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("tinny") == 2
    assert "did you mean tiny?" in capsys.readouterr().err


def test_an_unknown_profile_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_models.main(["--profile", "nowhere"], {}) == 2
    assert "there is no profile nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["tiny", "--all"], ["--list", "--verify"], ["--nope"]])
def test_options_that_do_not_go_together_are_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fetch_models.main(argv, {})
    assert caught.value.code == 2


def test_the_models_folder_can_be_given(script: Script, tmp_path: Path) -> None:
    assert script("tiny", "--models-dir", str(tmp_path / "other")) == 0
    assert (tmp_path / "other" / "tiny" / "manifest.json").is_file()
    assert not script.folder.exists()


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    path = REPOSITORY / "scripts" / "fetch_models.py"
    done = subprocess.run(
        [sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "--verify" in done.stdout


# --- adapters ---------------------------------------------------------------------------------

VACE = {
    "config.json": b"{}",
    "diffusion_pytorch_model-00001-of-00002.safetensors": weights(b"first"),
    "diffusion_pytorch_model-00002-of-00002.safetensors": weights(b"second"),
    "diffusion_pytorch_model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
                "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
}
READER = {"config.json": b"{}", "model.safetensors": weights(b"reader")}
ADAPTERS = f"""
[[models]]
id = "film"
kind = "wan"
path = "film"

[[adapters]]
id = "style"
kind = "ip_adapter"
model = "paint"
path = "style/style.safetensors"
image_encoder = "style/reader"
[adapters.source]
repository = "org/style"
folder = "large"
files = ["style.safetensors"]
[adapters.source.sha256]
"style.safetensors" = "{sha256(weights(b"style"))}"
[adapters.image_encoder_source]
repository = "org/style"
folder = "models/reader"
files = ["config.json", "model.safetensors"]

[[adapters]]
id = "frames"
kind = "vace"
model = "film"
path = "vace/transformer"
[adapters.source]
repository = "org/vace"
folder = "transformer"
files = ["config.json", "diffusion_pytorch_model*"]

[[adapters]]
id = "grain"
kind = "lora"
model = "paint"
path = "loras/grain.safetensors"
"""


@pytest.fixture
def with_adapters(script: Script, fake: FakeHub) -> Script:
    script.profile.write_text(PROFILE.replace('["paint"]', '["paint", "film"]') + ADAPTERS)
    fake.repositories["org/vace"] = {
        "model_index.json": b"{}",
        "text_encoder/config.json": b"{}",
        **{f"transformer/{name}": content for name, content in VACE.items()},
    }
    fake.repositories["org/style"] = {
        "README.md": b"",
        "large/style.bin": b"a pickle",
        "large/style.safetensors": weights(b"style"),
        "models/style.safetensors": weights(b"another"),
        **{f"models/reader/{name}": content for name, content in READER.items()},
        "models/reader/pytorch_model.bin": b"a pickle",
    }
    return script


def adapter(script: Script, name: str) -> AdapterSpec:
    settings = load_settings(str(script.profile), {"VERBATIM_MODELS_DIR": str(script.folder)})
    [entry] = [one for one in settings.adapters if one.id == name]
    return adapter_spec(entry, settings.models_dir)


def test_an_adapter_is_fetched_from_a_folder_of_its_repository(
    with_adapters: Script, fake: FakeHub
) -> None:
    assert with_adapters("frames") == 0

    names = [f"vace/transformer/{name}" for name in ("manifest.json", *VACE)]
    assert with_adapters.files() == sorted(names)
    assert check_adapter(adapter(with_adapters, "frames"), full=True) == []
    assert with_adapters("--verify", "frames") == 0
    assert all("/transformer/" in one.path for one in fake.asked("/resolve/"))


def test_an_ip_adapter_is_fetched_with_the_model_that_reads_its_pictures(
    with_adapters: Script,
) -> None:
    assert adapter(with_adapters, "style").cure == "run python scripts/fetch_models.py style"

    assert with_adapters("style") == 0

    assert with_adapters.files() == [
        "style/manifest.json",
        "style/reader/config.json",
        "style/reader/manifest.json",
        "style/reader/model.safetensors",
        "style/style.safetensors",
    ]
    assert check_adapter(adapter(with_adapters, "style"), full=True) == []


def test_adapters_are_fetched_when_they_are_asked_for(
    with_adapters: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_adapters() == 0
    assert not fake.asked("org/style") and not fake.asked("org/vace")

    assert with_adapters("style", "grain") == 0
    assert fake.asked("org/style") and not fake.asked("org/vace")
    assert "grain: skipped, it has no source" in capsys.readouterr().out

    assert with_adapters("--list") == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["style"][1:4] == ["ip_adapter", "org/style", "yes"]
    assert rows["grain"][1:4] == ["lora", "-", "no"]
    settings = load_settings(str(with_adapters.profile), {})
    every = fetch_models.choose(fetch_models.parse_arguments(["--all"]), settings)
    assert {"style", "frames", "grain", "paint"} <= {one.id for one in every}


def test_adapters_that_are_there_are_verified_with_what_is_served(
    with_adapters: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_adapters("style", "paint", "tiny") == 0
    assert with_adapters("--verify", "style", "paint", "tiny") == 0
    capsys.readouterr()
    reader = with_adapters.folder / "style/reader/model.safetensors"
    reader.write_bytes(flipped(reader.read_bytes()))

    assert with_adapters("--verify") == 1
    out = capsys.readouterr().out
    assert f"{reader}: DAMAGED: sha256" in out
    assert "style: 1 not good; to mend it, run python scripts/fetch_models.py style" in out
    assert "frames" not in out


def test_content_that_the_catalog_does_not_know_is_refused_before_anything_is_fetched(
    with_adapters: Script, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.repositories["org/style"]["large/style.safetensors"] = weights(b"other")

    assert with_adapters("style") == 1

    assert not fake.asked("/resolve/")
    err = capsys.readouterr().err
    assert f"the catalog has its sha256 {sha256(weights(b'style'))}" in err
    assert f"announces {sha256(weights(b'other'))}" in err


# As the hub's own pages list them.
PUBLISHED = {
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": (
        ".gitattributes", "LICENSE.txt", "README.md", "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors.index.json",
        *(f"text_encoder/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "tokenizer/special_tokens_map.json", "tokenizer/spiece.model", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json",
        *(f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ),
    "h94/IP-Adapter": (
        ".gitattributes", "README.md",
        "models/image_encoder/config.json", "models/image_encoder/model.safetensors",
        "models/image_encoder/pytorch_model.bin", "models/ip-adapter_sd15.safetensors",
        "sdxl_models/image_encoder/config.json", "sdxl_models/image_encoder/model.safetensors",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", "sdxl_models/ip-adapter_sdxl.bin",
        "sdxl_models/ip-adapter_sdxl.safetensors", "sdxl_models/ip-adapter_sdxl_vit-h.bin",
        "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
    ),
}  # fmt: skip


def test_of_the_published_repositories_exactly_what_a_loader_reads_is_fetched() -> None:
    settings = load_settings("gpu-24gb", {})
    got = {}
    for entry in (*settings.models, *settings.adapters):
        if entry.source is None or entry.source.repository not in PUBLISHED:
            continue
        for folder in fetch_models.folders_of(entry, entry.source, Path("/m")):
            listed = PUBLISHED[folder.source.repository]
            remote = [fetch_models.RemoteFile(path, 1, "0" * 64, True) for path in listed]
            chosen = fetch_models.select(remote, folder)
            got[str(folder.path)] = sorted(chosen)
            known = {fetch_models.inside(folder.source, one) for one in folder.source.sha256}
            assert known <= {file.path for file in chosen.values()}

    whole = PUBLISHED["Wan-AI/Wan2.1-VACE-1.3B-diffusers"]
    beside = [path for path in whole if path.startswith("transformer/")]
    assert got == {
        "/m/wan2.1-vace-1.3b-diffusers": sorted(
            path for path in whole if path.endswith((".json", ".safetensors", ".model"))
        ),
        "/m/wan2.1-vace-1.3b-diffusers/transformer": sorted(
            path.removeprefix("transformer/") for path in beside
        ),
        "/m/ip-adapter": ["ip-adapter_sdxl_vit-h.safetensors"],
        "/m/ip-adapter/image_encoder": ["config.json", "model.safetensors"],
    }
