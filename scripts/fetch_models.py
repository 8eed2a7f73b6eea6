"""Fetch the files of the catalog's models from their Hugging Face repositories, and verify them.

    python scripts/fetch_models.py --profile NAME    the models that this profile serves
    python scripts/fetch_models.py ID ...            these models and adapters; what is there is
                                                     hashed again
    python scripts/fetch_models.py --list            what is known, and what of it is here
    python scripts/fetch_models.py --verify          hash what is here, without any network

An interrupted fetch is resumed by the same command. HF_ENDPOINT names another hub; HF_TOKEN is
sent to the hub's own host only. Exit codes: 0 all good, 1 something could not be fetched or is
damaged, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote

import httpx
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker.catalog import AdapterSpec, ModelSpec, adapter_spec, chat_catalog, media_catalog
from worker.config import AdapterEntry, Chat, Media, ModelEntry, Settings, Source, load_settings
from worker.errors import ConfigError
from worker.modelfiles import MANIFEST, check_adapter, check_files

HUB = "https://huggingface.co"
AGAIN = "run the same command again, it resumes"
ELSEWHERE = "choose another folder with --models-dir or VERBATIM_MODELS_DIR"
TRIES = 6  # in a row without one new byte
LONGEST_WAIT_S = 300.0  # the hub counts requests in windows of five minutes
BLOCK = 8 << 20

T = TypeVar("T")
Entry = ModelEntry | AdapterEntry


class FetchError(Exception):
    """A fetch that cannot go on; the message says what happened and what to do."""


class Transient(Exception):
    """An attempt that failed where the next may succeed."""

    def __init__(self, message: str, wait_s: float | None = None):
        super().__init__(message)
        self.wait_s = wait_s  # None: the server did not say


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository, as the hub announces it."""

    path: str
    size: int
    digest: str  # hex: sha256 of an LFS file, git's blob sha1 of any other
    is_lfs: bool


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the files of one source go."""

    source: Source
    path: Path  # holds the manifest
    only: str | None = None  # the file's name, of what is one file


@dataclass(frozen=True, slots=True)
class Plan:
    """What a folder shall hold, and what of it is there."""

    folder: Folder
    files: dict[str, RemoteFile]  # by path relative to the folder
    here: dict[str, str]  # sha256 of those that are complete

    @property
    def missing(self) -> dict[str, RemoteFile]:
        return {name: file for name, file in self.files.items() if name not in self.here}


def main(
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] = os.environ,
    sleep: Callable[[float], None] = time.sleep,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> int:
    """Run the command line; returns the exit code."""
    args = parse_arguments(argv)
    if args.models_dir:
        env = {**env, "VERBATIM_MODELS_DIR": args.models_dir}
    try:
        settings = load_settings(args.profile, env)
        entries = choose(args, settings)
        if args.list:
            print_table(entries, settings)
            return 0
        with Bars() if sys.stdout.isatty() else Lines() as report:
            if args.verify:
                good = [verify(entry, settings, report) for entry in entries]
                return 0 if all(good) else 1
            with httpx.Client(follow_redirects=True, timeout=60.0) as client:
                hub = Hub(client, env, sleep, report)
                return 0 if fetch(entries, settings, hub, bool(args.models), free_bytes) else 1
    except (ConfigError, FetchError, OSError) as exc:
        print(f"fetch_models: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        print(f"fetch_models: interrupted; {AGAIN}", file=sys.stderr)
        return 130


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fetch_models.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="ID", help="default: the models served")
    parser.add_argument(
        "--all", action="store_true", help="every model and adapter of catalog and profile"
    )
    parser.add_argument("--profile", default="demo", metavar="NAME|PATH", help="default: demo")
    parser.add_argument("--models-dir", metavar="DIR", help="instead of VERBATIM_MODELS_DIR")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print a table, fetch nothing")
    mode.add_argument("--verify", action="store_true", help="hash what is here, fetch nothing")
    args = parser.parse_args(argv)
    if args.models and args.all:
        parser.error("give model ids or --all, not both")
    return args


def choose(args: argparse.Namespace, settings: Settings) -> list[Entry]:
    """The entries that the command line asks for. Raises ConfigError for an unknown id."""
    by_id: dict[str, Entry] = {entry.id: entry for entry in (*settings.adapters, *settings.models)}
    for name in args.models:
        if name not in by_id:
            near = difflib.get_close_matches(name, by_id, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(sorted(by_id))
            raise ConfigError(f"there is no model or adapter {name}; known: {known}{hint}")
    if args.models:
        return [by_id[name] for name in dict.fromkeys(args.models)]
    if args.all or args.list:
        return [*settings.models, *settings.adapters]
    served = (*chat_catalog(settings).specs, *media_catalog(settings).specs)
    # Adapters are not needed, and some are large.
    here = [one for spec in served for one in spec.adapters if args.verify and one.path.exists()]
    return [by_id[spec.id] for spec in (*served, *here)]


def spec_of(entry: Entry, settings: Settings) -> ModelSpec | AdapterSpec:
    """The entry as the daemon sees it; looked up alone, as aliases may clash across profiles."""
    if isinstance(entry, AdapterEntry):
        return adapter_spec(entry, settings.models_dir)
    alone = {"chat": Chat(models=[entry.id]), "media": Media(models=[entry.id])}
    catalog = chat_catalog if entry.kind == "chat" else media_catalog
    return catalog(settings.model_copy(update=alone)).specs[0]


# --- what is here -----------------------------------------------------------------------------


def print_table(entries: Iterable[Entry], settings: Settings) -> None:
    rows = [("ID", "KIND", "REPOSITORY", "COMPLETE", "ON DISK")]
    for entry in entries:
        spec = spec_of(entry, settings)
        repository = entry.source.repository if entry.source else "-"
        size = sum(size_on_disk(path) for path in (spec.path, second_path(spec)) if path)
        complete = "no" if first_problem(spec) else "yes"
        rows.append((entry.id, entry.kind, repository, complete, shown(size)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def size_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def second_path(spec: ModelSpec | AdapterSpec) -> Path | None:
    """Where the rest of its files is."""
    return spec.image_encoder if isinstance(spec, AdapterSpec) else spec.config_path


def first_problem(spec: ModelSpec | AdapterSpec) -> str | None:
    try:
        found = check_adapter(spec) if isinstance(spec, AdapterSpec) else check_files(spec)
        return next((f"{one.path}: {one.what}" for one in found), None)
    except (ValueError, KeyError, TypeError, AttributeError):  # only the manifest is read unchecked
        return f"{MANIFEST} cannot be read"


def verify(entry: Entry, settings: Settings, report: Lines) -> bool:
    """Hash the files of an entry and compare them with its manifests; says a line for each."""
    spec = spec_of(entry, settings)
    only = spec.path.name if spec.path.suffix == ".safetensors" else None
    problems = 0
    first = spec.path.parent if only else spec.path
    for folder, name in ((first, only), (second_path(spec), None)):
        if folder is None:
            continue
        records = {key: one for key, one in read_manifest(folder).items() if name in (None, key)}
        if not records:
            print(f"{folder / (name or '')}: NOT VERIFIED: no record in {folder / MANIFEST}")
            problems += 1
        for key, record in records.items():
            problem = file_problem(folder / key, record, report)
            print(f"{folder / key}: {problem or 'ok'}", flush=True)
            problems += problem is not None
    if problems:
        print(f"{entry.id}: {problems} not good; to mend it, {spec.cure}")
    return problems == 0


def file_problem(path: Path, record: Mapping[str, Any], report: Lines) -> str | None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "MISSING"
    if size != record["size"]:
        return f"DAMAGED: {size} bytes instead of the recorded {record['size']}"
    sha256 = hash_file(path, Digest(), report).sha256
    if sha256 != record["sha256"]:
        return f"DAMAGED: sha256 {sha256} is not the recorded {record['sha256']}"
    return None


class Digest:
    """Hashes of the bytes of one file, taken in one pass: sha256, and git's where it is wanted."""

    def __init__(self, remote: RemoteFile | None = None):
        self._hashes = [hashlib.sha256()]
        if remote and not remote.is_lfs:
            self._hashes.append(hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False))

    def update(self, block: bytes) -> None:
        for one in self._hashes:
            one.update(block)

    @property
    def sha256(self) -> str:
        return self._hashes[0].hexdigest()

    @property
    def announced(self) -> str:
        """The hash that the hub announces for such a file."""
        return self._hashes[-1].hexdigest()


def hash_file(path: Path, digest: Digest, report: Lines) -> Digest:
    report.start(f"checking {path.name}", path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            report.at(file.tell())
    report.finish()
    return digest


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What is recorded about a folder's files; nothing when the record is absent or damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        return {
            name: {"size": int(one["size"]), "sha256": str(one["sha256"])}
            for name, one in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


# --- what to fetch, and fetching it -----------------------------------------------------------


def fetch(
    entries: Iterable[Entry],
    settings: Settings,
    hub: Hub,
    named: bool,
    free_bytes: Callable[[Path], int],
) -> bool:
    """Fetch what is missing of every entry; whether all of them are complete in the end.

    named: they were asked for by id, as messages about damaged files advise. Records are
    not trusted then, and a copy in another folder does not count.
    """
    failed: list[str] = []
    plans: list[tuple[Entry, list[Plan]]] = []
    for entry in entries:
        with keep_going(entry, failed):
            plans.append((entry, plan_entry(entry, settings, hub, named)))
    every = [plan for _, of_model in plans for plan in of_model]
    check_space(every, free_bytes)
    hub.report.total(sum(file.size for plan in every for file in plan.missing.values()))
    for entry, of_model in plans:
        with keep_going(entry, failed):
            for plan in of_model:
                fetch_folder(plan, hub)
            if of_model and (problem := first_problem(spec_of(entry, settings))):
                raise FetchError(f"every file is fetched, but {problem}; check its catalog entry")
            if of_model:
                print(f"{entry.id}: complete in {of_model[0].folder.path}", flush=True)
    return not failed


@contextmanager
def keep_going(entry: Entry, failed: list[str]) -> Iterator[None]:
    """Report a failure of one entry and note it, so that the others are still fetched."""
    try:
        yield
    except (FetchError, OSError) as exc:
        failed.append(entry.id)
        how = "" if isinstance(exc, FetchError) else f"; when that is mended, {AGAIN}"
        print(f"fetch_models: {entry.id}: {exc}{how}", file=sys.stderr)


def plan_entry(entry: Entry, settings: Settings, hub: Hub, named: bool) -> list[Plan]:
    """What to do for one entry; nothing, said in a line, when there is nothing to do."""
    if entry.source is None:
        shipped = isinstance(entry, ModelEntry) and entry.shipped
        why = "it comes with this program" if shipped else "it has no source"
        print(f"{entry.id}: skipped, {why}")
        return []
    folders = folders_of(entry, entry.source, settings.models_dir)
    spec = spec_of(entry, settings)
    if not named and not spec.path.is_relative_to(folders[0].path) and not first_problem(spec):
        print(f"{entry.id}: skipped, it is complete in {spec.path}")
        return []
    return [plan_folder(folder, hub, trust=not named) for folder in folders]


def folders_of(entry: Entry, source: Source, models_dir: Path) -> list[Folder]:
    path = models_dir / (entry.path if isinstance(entry.path, str) else entry.path[0])
    if path.name.startswith("models--"):
        raise FetchError(f"{path} is a Hugging Face cache; set its path to a folder of its own")
    alone = path.suffix == ".safetensors"
    folders = [Folder(source, path.parent, path.name) if alone else Folder(source, path)]
    if isinstance(entry, AdapterEntry):
        second, path_of_second = entry.image_encoder_source, entry.image_encoder
    else:
        second, path_of_second = entry.config_source, entry.config_path
    if second and path_of_second:
        folders.append(Folder(second, models_dir / path_of_second))
    return folders


def plan_folder(folder: Folder, hub: Hub, trust: bool) -> Plan:
    """Compare a folder with its repository. `trust`: believe the record about big files."""
    files = select(hub.tree(folder.source), folder)
    require_known(files, folder.source)
    records = read_manifest(folder.path)
    here = {}
    for name, remote in files.items():
        path = folder.path / name
        if not path.is_file() or path.stat().st_size != remote.size:
            continue
        record = {"size": remote.size, "sha256": remote.digest}
        if trust and remote.is_lfs and records.get(name) == record:
            here[name] = remote.digest
            continue
        digest = hash_file(path, Digest(remote), hub.report)
        if digest.announced == remote.digest:
            here[name] = digest.sha256
    return Plan(folder, files, here)


def select(files: Iterable[RemoteFile], folder: Folder) -> dict[str, RemoteFile]:
    """The files that the source's patterns name, by where they go in the folder."""
    source = folder.source
    before = inside(source, "")
    wanted = {
        name: file
        for file in files
        if file.path.startswith(before)
        for name in [file.path.removeprefix(before)]
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in source.files)
    }
    wanted.pop(MANIFEST, None)  # the name of our own record
    if not wanted or (folder.only and len(wanted) > 1):
        raise FetchError(
            f"{len(wanted)} files of {source.repository} at {source.revision} match "
            f"{source.files}, not {'one' if folder.only else 'any'}; check them in the catalog"
        )
    if folder.only:
        [file] = wanted.values()
        return {folder.only: file}
    return wanted


def inside(source: Source, path: str) -> str:
    """A path of a source as its repository has it."""
    return f"{source.folder}/{path}" if source.folder else path


def require_known(files: Mapping[str, RemoteFile], source: Source) -> None:
    """Raises FetchError when the hub announces another content than the catalog knows, before
    anything is downloaded."""
    by_path = {file.path: file for file in files.values()}
    for path, sha256 in source.sha256.items():
        name = inside(source, path)
        if name not in by_path or by_path[name].digest != sha256:
            found = by_path[name].digest if name in by_path else "nothing"
            raise FetchError(
                f"{name} of {source.repository} at {source.revision}: the catalog has its sha256 "
                f"{sha256} and the hub announces {found}; check HF_ENDPOINT and the catalog"
            )


def check_space(plans: Iterable[Plan], free_bytes: Callable[[Path], int]) -> None:
    """Make the folders that are written to; raises FetchError when their disks lack room."""
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for plan in plans:
        if not plan.missing:
            continue
        folder = plan.folder.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise FetchError(f"{folder} cannot be made: {exc.strerror}; {ELSEWHERE}") from exc
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FetchError(f"{folder} cannot be written to; {ELSEWHERE}")
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        for name, file in plan.missing.items():
            part = part_of(folder / name)
            needed[device] += max(0, file.size - (part.stat().st_size if part.exists() else 0))
    for device, size in needed.items():
        free = free_bytes(folders[device])
        if size > free:
            raise FetchError(
                f"the fetch needs {shown(size)} and the disk of {folders[device]} has "
                f"{shown(free)} free; make room, or {ELSEWHERE}"
            )


def fetch_folder(plan: Plan, hub: Hub) -> None:
    """Fetch what a folder lacks; write its record once every file is there."""
    digests = dict(plan.here)
    for name, remote in plan.missing.items():
        digests[name] = fetch_file(plan.folder, remote, plan.folder.path / name, hub)
    write_manifest(plan, digests)


def fetch_file(folder: Folder, remote: RemoteFile, target: Path, hub: Hub) -> str:
    """Fetch one file, check it and put it in place; returns its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    for last in (False, True):
        digest = hub.download(folder.source, remote, part)
        if digest.announced == remote.digest:
            part.replace(target)
            hub.report.finish()
            return digest.sha256
        part.unlink()
        kind = "sha256" if remote.is_lfs else "git sha1"
        what = f"{target.name}: {kind} {digest.announced} is not the announced {remote.digest}"
        if not last:
            print(f"{what}; fetching it once more", flush=True)
    raise FetchError(f"{what}, twice; nothing of it is kept. Later, {AGAIN}")


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def write_manifest(plan: Plan, digests: Mapping[str, str]) -> None:
    """Record the files of a plan, and go on recording the others that are still there."""
    folder, source = plan.folder.path, plan.folder.source
    files = {
        name: record
        for name, record in read_manifest(folder).items()
        if (folder / name).is_file() and (folder / name).stat().st_size == record["size"]
    }
    for name, remote in plan.files.items():
        files[name] = {"size": remote.size, "sha256": digests[name]}
    origin = {"repository": source.repository, "revision": source.revision}
    text = json.dumps({"source": origin, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    path = folder / MANIFEST
    if path.is_file() and path.read_text("utf-8", "replace") == text:
        return  # a folder that may only be read is complete too
    part = part_of(path)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# --- the hub ----------------------------------------------------------------------------------


class Hub:
    """A Hugging Face hub, asked over HTTP."""

    def __init__(
        self,
        client: httpx.Client,
        env: Mapping[str, str],
        sleep: Callable[[float], None],
        report: Lines,
    ):
        """Raises ConfigError for an HF_ENDPOINT or HF_TOKEN that cannot be one."""
        self.report = report
        self._client = client
        self._sleep = sleep
        self._endpoint = (env.get("HF_ENDPOINT") or HUB).rstrip("/")
        self._token = env.get("HF_TOKEN", "").strip()
        if not re.match(r"https?://[^/@]+(/|$)", self._endpoint):
            raise ConfigError(f"HF_ENDPOINT is not an address such as {HUB}")
        if not re.fullmatch(r"[!-~]*", self._token):  # an error of httpx would quote it
            raise ConfigError("HF_TOKEN holds a space or another character that no token has")

    def tree(self, source: Source) -> list[RemoteFile]:
        """Every file of a repository. Raises FetchError, also for a path that is not safe."""
        what = f"file list of {source.repository} at {source.revision}"
        revision = quote(source.revision, safe="")
        tree = f"{self._endpoint}/api/models/{source.repository}/tree/{revision}"
        url: str | None = f"{tree}?recursive=true"
        files: list[RemoteFile] = []
        seen: set[str] = set()
        while url and url not in seen:
            seen.add(url)
            page, url = self._retrying(partial(self._page, url, what))
            files += page
        return files

    def _page(self, url: str, what: str) -> tuple[list[RemoteFile], str | None]:
        with self._open(url, what) as response:
            response.read()
            try:
                files = [parse_file(one) for one in response.json() if one["type"] == "file"]
                following = response.links.get("next", {}).get("url")
                return files, str(response.url.join(following)) if following else None
            except (ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL) as exc:
                reason = f"{response.url.host} did not answer as a hub does"
                raise FetchError(f"{what}: {reason}; check HF_ENDPOINT and the network") from exc

    def download(self, source: Source, remote: RemoteFile, part: Path) -> Digest:
        """Bring `part` to the announced size, going on where it ends; returns its hashes."""
        place = f"{quote(source.revision, safe='')}/{quote(remote.path)}"
        url = f"{self._endpoint}/{source.repository}/resolve/{place}"
        return self._retrying(
            lambda: self._resume(url, remote, part),
            reached=lambda: part.stat().st_size if part.exists() else 0,
        )

    def _resume(self, url: str, remote: RemoteFile, part: Path) -> Digest:
        digest = Digest(remote)
        with part.open("a+b") as file:
            file.seek(0)
            while block := file.read(BLOCK):
                digest.update(block)
            self.report.start(remote.path, remote.size, file.tell())
            if file.tell() < remote.size:
                digest = self._receive(url, remote, file, digest)
            file.flush()
            os.fsync(file.fileno())
        return digest

    def _receive(self, url: str, remote: RemoteFile, file: IO[bytes], digest: Digest) -> Digest:
        """Append the rest of a file, or all of it when the server sends all of it."""
        have = file.tell()
        with self._open(url, remote.path, have) as response:
            starts = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if response.status_code == 200:
                if have:
                    file.truncate(0)
                    have, digest = 0, Digest(remote)
            elif not starts or int(starts[1]) != have:
                file.truncate(0)
                raise Transient(f"{remote.path}: the server does not resume at byte {have}")
            for block in response.iter_bytes():
                file.write(block)
                digest.update(block)
                have += len(block)
                self.report.at(have)
                if have > remote.size:
                    break  # the hash cannot be right any more
        if have < remote.size:
            raise Transient(f"{remote.path}: the answer ended at byte {have} of {remote.size}")
        return digest

    @contextmanager
    def _open(self, url: str, what: str, have: int = 0) -> Iterator[httpx.Response]:
        """A streamed answer that is 200, 206 or 416; Transient or FetchError for any other."""
        headers = {"Accept-Encoding": "identity"}  # a size and a range are those of the file itself
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            # httpx takes the header off again when a redirect leads to another host or port.
            if self._token and url.startswith(f"{self._endpoint}/"):
                headers["Authorization"] = f"Bearer {self._token}"
            with self._client.stream("GET", url, headers=headers) as response:
                check_status(response, what)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise Transient(f"{what}: {type(exc).__name__}: {exc}") from exc

    def _retrying(self, attempt: Callable[[], T], reached: Callable[[], int] = lambda: 0) -> T:
        """Repeat an attempt while it fails and may succeed; `reached` tells its new bytes."""
        furthest, tries = reached(), 0
        while True:
            try:
                return attempt()
            except Transient as exc:
                position = reached()
                tries = 1 if position > furthest else tries + 1
                furthest = max(furthest, position)
                if tries == TRIES:
                    raise FetchError(f"{exc}, {TRIES} times in a row; {AGAIN}") from exc
                wait_s = min(2.0**tries if exc.wait_s is None else exc.wait_s, LONGEST_WAIT_S)
                print(f"{exc}; going on in {wait_s:.0f} s", flush=True)
                self._sleep(wait_s)


def parse_file(entry: Mapping[str, Any]) -> RemoteFile:
    """Raises ValueError and the like for what no hub sends, FetchError for a path outside."""
    path = str(entry["path"])
    if re.search(r"[\\\x00-\x1f]", path) or any(one in ("", ".", "..") for one in path.split("/")):
        raise FetchError(f"the hub lists a file {path!r}, outside its folder; nothing is fetched")
    lfs = entry.get("lfs")
    size = (lfs or entry)["size"]
    digest = str((lfs or entry)["oid"])
    if type(size) is not int or not re.fullmatch(f"[0-9a-f]{{{64 if lfs else 40}}}", digest):
        raise ValueError(path)
    return RemoteFile(path, size, digest, is_lfs=bool(lfs))


def check_status(response: httpx.Response, what: str) -> None:
    status, host = response.status_code, response.url.host  # not the URL: it may be a signed one
    said = f"{what}: {host} answers {status}"
    if status in (408, 429) or status >= 500:
        raise Transient(said, asked_wait(response.headers))
    if status in (401, 403):
        raise FetchError(
            f"{said}; set HF_TOKEN to a token that may read it. The repository may need its "
            "licence accepted on its page first, and one that does not exist is answered alike"
        )
    if status == 404:
        raise FetchError(f"{said}; check repository, revision and path in the catalog")
    if status not in (200, 206, 416):
        raise FetchError(f"{said}, which is no answer to a download; {AGAIN}")


def asked_wait(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks for, in the standard header or in the hub's own."""
    if re.fullmatch(r"\d{1,6}", headers.get("Retry-After", "")):
        return float(headers["Retry-After"])
    window = re.search(r"\bt=(\d{1,6})", headers.get("RateLimit", ""))
    return float(window[1]) if window else None


# --- progress ---------------------------------------------------------------------------------


class Lines:
    """Progress for a log: a line when a file starts, at each tenth of a big one, at its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def total(self, size: int) -> None:
        """Told once, before the first download: bytes of all files that are fetched."""
        print(f"to fetch: {shown(size)}", flush=True)

    def start(self, label: str, size: int, position: int = 0) -> None:
        self._label, self._size, self._tenth = label, size, position * 10 // max(1, size)
        self._begun, self._first = time.monotonic(), position
        resumed = f", from byte {position}" if position else ""
        print(f"{label}: {shown(size)}{resumed}", flush=True)

    def at(self, position: int) -> None:
        tenth = position * 10 // max(1, self._size)
        if tenth > self._tenth and position < self._size and self._size > BLOCK:
            print(f"{self._label}: {tenth}0 %", flush=True)
        self._tenth = tenth

    def finish(self) -> None:
        took = time.monotonic() - self._begun
        speed = shown(int((self._size - self._first) / max(took, 1e-3)))
        print(f"{self._label}: done, {took:.1f} s, {speed}/s", flush=True)


class Bars(Lines):
    """Progress for a terminal: a bar for the file and one for all of them."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._file = self._bars.add_task("", visible=False)
        self._all = self._bars.add_task("total", visible=False)
        self._finished = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bars.stop()

    def total(self, size: int) -> None:
        self._finished = 0
        self._bars.reset(self._all, total=size, visible=size > 0)

    def start(self, label: str, size: int, position: int = 0) -> None:
        self._size = size
        self._bars.reset(
            self._file, total=size, completed=position, description=label, visible=True
        )

    def at(self, position: int) -> None:
        self._bars.update(self._file, completed=position)
        self._bars.update(self._all, completed=self._finished + position)

    def finish(self) -> None:
        self.at(self._size)
        self._finished += self._size


def shown(size: int) -> str:
    """A number of bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    sys.exit(main())
