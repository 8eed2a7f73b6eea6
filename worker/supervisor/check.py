"""What `orchestrator.py --check` says: the plan of a profile and what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from worker.catalog import (
    AdapterSpec,
    Catalog,
    ModelSpec,
    chat_catalog,
    media_catalog,
    preload_ids,
    shown,
)
from worker.config import KEY_NAMES, REPOSITORY, Settings, check_exposure
from worker.errors import Unsupported
from worker.modelfiles import (
    Problem,
    adapter_files,
    check_adapter,
    check_files,
    is_recorded,
    weight_bytes,
    weight_files,
)
from worker.supervisor.spawn import child_environment, guest_environment
from worker.vram.adapters import adapter_size, lora_size
from worker.vram.probe import Card, host_memory

GATEWAY_S = 60.0  # that the gateway's own check may take; a database that does not answer takes 10


@dataclass(frozen=True, slots=True)
class Finding:
    """A served model or one of its adapters, looked at."""

    id: str
    kind: str
    dtype: str
    weight_bytes: int  # 0: not known
    use: str  # loaded | on demand | for MODEL
    path: str
    files: str  # good | no record | absent | PROBLEM
    problems: tuple[Problem, ...]
    note: str = ""  # of one that is absent: how to have it
    hashed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GatewayFinding:
    """What the gateway's own check said."""

    code: int | None  # its exit code; None: it took too long
    lines: tuple[str, ...]
    command: str  # that says it again

    @property
    def is_good(self) -> bool:
        return self.code == 0


def choose_profile(card: Card | None) -> str:
    """The shipped profile that fits the machine. Pure."""
    gib = 0 if card is None else card.total_bytes >> 30
    for least, name in ((70, "gpu-80gb"), (44, "gpu-48gb"), (22, "gpu-24gb")):
        if gib >= least:
            return name
    return "demo"


def validate(settings: Settings, keys: Sequence[str]) -> tuple[Catalog, Catalog]:
    """The two catalogs of a profile that may be started. Raises ConfigError."""
    check_exposure(settings, keys)
    chat, media = chat_catalog(settings), media_catalog(settings)
    preload_ids(chat, settings.chat.preload)
    preload_ids(media, settings.media.preload)
    return chat, media


# --- looking --------------------------------------------------------------------------------------


def look(settings: Settings, chat: Catalog, media: Catalog, console: Console) -> list[Finding]:
    """Check every file of every served model and of its adapters, contents included."""
    preloaded = {
        *preload_ids(chat, settings.chat.preload),
        *preload_ids(media, settings.media.preload),
    }
    findings = []
    columns = (TextColumn("checking {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def task(name: str, files: Sequence[Path]) -> Callable[[int], None]:
            total = sum(file.stat().st_size for file in files)
            return partial(progress.advance, progress.add_task(name, total=total))

        for spec in (*chat.specs, *media.specs):
            findings.append(_model(spec, spec.id in preloaded, task))
        for spec in media.specs:
            findings += [_adapter(one, spec, settings, task) for one in spec.adapters]
    return findings


Task = Callable[[str, Sequence[Path]], Callable[[int], None]]


def _model(spec: ModelSpec, is_preloaded: bool, task: Task) -> Finding:
    whole = not check_files(spec)
    hashed = _Counted(task(spec.id, weight_files(spec) if whole else ()))
    problems = check_files(spec, full=True, progress=hashed)
    return Finding(
        spec.id,
        spec.kind,
        spec.dtype,
        weight_bytes(spec) if whole else 0,
        "loaded" if is_preloaded else "on demand",
        spec.shown_path,
        _word(spec, problems),
        tuple(problems),
        hashed_bytes=hashed.bytes,
    )


def _adapter(spec: AdapterSpec, model: ModelSpec, settings: Settings, task: Task) -> Finding:
    places = [spec.path, *([spec.image_encoder] if spec.image_encoder is not None else [])]
    is_absent = spec.is_fetched and not any(place.exists() for place in places)
    files = adapter_files(spec) if not check_adapter(spec) else []
    hashed = _Counted(task(spec.id, files))
    problems = [] if is_absent else check_adapter(spec, full=True, progress=hashed)
    if not is_absent and not problems:
        problems = _kind_problems(spec)
    return Finding(
        spec.id,
        spec.kind,
        "",
        sum(file.stat().st_size for file in files),
        f"for {model.id}",
        shown(spec.path, settings.models_dir),
        "absent" if is_absent else _word(spec, problems),
        tuple(problems),
        note=f"{spec.id}: absent, and not used; to have it, {spec.cure}" if is_absent else "",
        hashed_bytes=hashed.bytes,
    )


def _kind_problems(spec: AdapterSpec) -> list[Problem]:
    """Of whole files: whether they are of a kind that can be used at all."""
    look_at = {"lora": lora_size, "ip_adapter": adapter_size}.get(spec.kind)
    try:
        if look_at is not None:
            look_at(spec)
    except Unsupported as exc:
        return [Problem(spec.id, str(spec.path), str(exc), "take another, or its entry out")]
    return []


def _word(spec: ModelSpec | AdapterSpec, problems: Sequence[Problem]) -> str:
    if problems:
        return "PROBLEM"
    return "good" if is_recorded(spec) else "no record"


class _Counted:
    """Progress that is told on, and counted."""

    def __init__(self, told: Callable[[int], None]):
        self.bytes = 0
        self._told = told

    def __call__(self, count: int) -> None:
        self.bytes += count
        self._told(count)


def ask_gateway(settings: Settings, environment: Mapping[str, str]) -> GatewayFinding | None:
    """Let the gateway check itself, as a program of its own with the environment that it would be
    started with; None where the profile has none."""
    if settings.gateway is None:
        return None
    arguments = ["-m", "gateway", "--profile", str(settings.profile_path), "check"]
    known = {
        **guest_environment(settings),
        **environment,
        "VERBATIM_MODELS_DIR": str(settings.models_dir),
        "VERBATIM_STATE_DIR": str(settings.state_dir),
    }
    command = " ".join(["python", *arguments])
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=child_environment(known, is_engine=False),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=GATEWAY_S,
        )
    except subprocess.TimeoutExpired:
        return GatewayFinding(None, (f"no answer within {GATEWAY_S:.0f} s",), command)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return GatewayFinding(done.returncode, tuple(lines), command)


# --- telling --------------------------------------------------------------------------------------


def show_plan(
    settings: Settings,
    findings: Sequence[Finding],
    gateway: GatewayFinding | None,
    keys: Sequence[str],
    card: Card | None,
    console: Console,
) -> None:
    """Print what would be started, and what is wrong with it."""
    server = settings.server
    console.print(f"profile  {settings.profile_name} ({settings.profile_path})", soft_wrap=True)
    console.print(f"models   {settings.models_dir}", soft_wrap=True)
    console.print(f"state    {settings.state_dir}", soft_wrap=True)
    console.print(
        f"ports    chat http://{server.host}:{server.chat_port}, "
        f"image and video http://{server.host}:{server.media_port}"
    )
    if settings.gateway is not None:
        console.print(f"gateway  http://{settings.gateway.host}:{settings.gateway.port}")
    inference = "needs no key" if settings.access.keyless_inference or not keys else "needs a key"
    console.print(f"access   {len(keys)} of {len(KEY_NAMES)} keys set; inference {inference}")
    if card is not None and settings.daemon.device != "cpu":
        console.print(f"device   {card.name}, {gib(card.total_bytes)}")
    else:
        console.print(f"device   cpu, {gib(host_memory().total_bytes)} of memory")
    table = Table()
    for column in ("model", "kind", "dtype", "weights", "at start", "path", "files"):
        table.add_column(column, overflow="fold")
    for one in findings:
        size = gib(one.weight_bytes) if one.weight_bytes else "-" if one.note else "?"
        table.add_row(one.id, one.kind, one.dtype, size, one.use, one.path, one.files)
    console.print(table)
    total = sum(one.weight_bytes for one in findings if one.use == "loaded")
    console.print(f"weights loaded at start: {gib(total)}")
    console.print(_counts(findings), soft_wrap=True)
    for one in findings:
        if one.note:
            console.print(one.note, markup=False, soft_wrap=True)
        for problem in one.problems:
            console.print(str(problem), style="red", markup=False, soft_wrap=True)
    if gateway is not None:
        _show_gateway(gateway, console)


def _counts(findings: Sequence[Finding]) -> str:
    words = ("good", "no record", "absent", "PROBLEM")
    counts = {word: sum(one.files == word for one in findings) for word in words}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    hashed = sum(one.hashed_bytes for one in findings)
    why = "; without a record only headers can be checked" if counts["no record"] else ""
    return f"files: {said}; {gib(hashed)} hashed{why}"


def _show_gateway(gateway: GatewayFinding, console: Console) -> None:
    style = None if gateway.is_good else "red"
    for line in gateway.lines:
        console.print(f"gateway: {line}", style=style, markup=False, soft_wrap=True)
    if gateway.is_good:
        console.print("gateway: good")
        return
    ended = "was ended" if gateway.code is None else f"ended with {gateway.code}"
    console.print(
        f"gateway: its check {ended}; correct what it names, and look again with: "
        f"{gateway.command}",
        style="red",
        markup=False,
        soft_wrap=True,
    )


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"
