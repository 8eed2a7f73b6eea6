"""What `orchestrator.py --check` says: the plan of a profile and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from worker.catalog import Catalog, ModelSpec, chat_catalog, media_catalog, preload_ids
from worker.config import KEY_NAMES, Settings, check_exposure
from worker.modelfiles import Problem, check_files, weight_bytes, weight_files
from worker.vram.probe import Card, host_memory


@dataclass(frozen=True, slots=True)
class Finding:
    """One served model, looked at."""

    spec: ModelSpec
    weight_bytes: int
    preloaded: bool
    problems: tuple[Problem, ...]


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


def look(settings: Settings, chat: Catalog, media: Catalog, console: Console) -> list[Finding]:
    """Check every file of every served model, contents included."""
    preloaded = {
        *preload_ids(chat, settings.chat.preload),
        *preload_ids(media, settings.media.preload),
    }
    findings = []
    columns = (TextColumn("checking {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for spec in (*chat.specs, *media.specs):
            whole = not check_files(spec)
            total = sum(file.stat().st_size for file in weight_files(spec)) if whole else 0
            task = progress.add_task(spec.id, total=total)
            problems = check_files(spec, full=True, progress=partial(progress.advance, task))
            findings.append(
                Finding(
                    spec,
                    weight_bytes(spec) if whole else 0,
                    spec.id in preloaded,
                    tuple(problems),
                )
            )
    return findings


def show_plan(
    settings: Settings,
    findings: Sequence[Finding],
    keys: Sequence[str],
    card: Card | None,
    console: Console,
) -> None:
    """Print what would be started."""
    server = settings.server
    console.print(f"profile  {settings.profile_name} ({settings.profile_path})", soft_wrap=True)
    console.print(f"models   {settings.models_dir}", soft_wrap=True)
    console.print(f"state    {settings.state_dir}", soft_wrap=True)
    console.print(
        f"ports    chat http://{server.host}:{server.chat_port}, "
        f"image and video http://{server.host}:{server.media_port}"
    )
    inference = "needs no key" if settings.access.keyless_inference or not keys else "needs a key"
    console.print(f"access   {len(keys)} of {len(KEY_NAMES)} keys set; inference {inference}")
    if card is not None and settings.daemon.device != "cpu":
        console.print(f"device   {card.name}, {gib(card.total_bytes)}")
    else:
        console.print(f"device   cpu, {gib(host_memory().total_bytes)} of memory")
    shown = Table()
    for column in ("model", "kind", "dtype", "weights", "at start", "path", "files"):
        shown.add_column(column, overflow="fold")
    for one in findings:
        shown.add_row(
            one.spec.id,
            one.spec.kind,
            one.spec.dtype,
            gib(one.weight_bytes) if one.weight_bytes else "?",
            "loaded" if one.preloaded else "on demand",
            one.spec.shown_path,
            "PROBLEM" if one.problems else "good",
        )
    console.print(shown)
    total = sum(one.weight_bytes for one in findings if one.preloaded)
    console.print(f"weights loaded at start: {gib(total)}")
    for one in findings:
        for problem in one.problems:
            console.print(str(problem), style="red", soft_wrap=True)


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"
