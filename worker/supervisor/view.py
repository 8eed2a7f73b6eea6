"""What a person at the terminal sees: a live table, or one line per change without a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker.config import KEY_NAMES, Settings
from worker.protocol.messages import ChildReport, StatusReport

_STYLES = {
    "ready": "green",
    "failed": "bold red",
    "waiting": "red",
    "draining": "yellow",
    "stopped": "dim",
}


def table(children: Sequence[ChildReport]) -> Table:
    """The children as a table."""
    shown = Table(title="Verbatim", title_justify="left")
    for column in ("process", "status", "port", "pid", "models", "memory", "note"):
        shown.add_column(column, overflow="fold")
    for child in children:
        shown.add_row(
            child.name,
            Text(child.status, style=_STYLES.get(child.status, "cyan")),
            str(child.port or ""),
            str(child.pid or ""),
            "\n".join(child.models),
            f"{child.rss_bytes / (1 << 20):.0f} MiB" if child.rss_bytes else "",
            _note(child),
        )
    return shown


def curl_lines(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """Commands to try, right for this profile."""
    host = "127.0.0.1" if settings.server.host in ("0.0.0.0", "::") else settings.server.host
    name = next((one for one in KEY_NAMES if environment.get(one)), None)
    needs_key = name is not None and not settings.access.keyless_inference
    key = f' -H "Authorization: Bearer ${name}"' if needs_key else ""
    header = "-H 'Content-Type: application/json'"
    return [
        *_gateway_lines(settings, header),
        f"curl -s http://{host}:{settings.server.chat_port}/enhance {header}{key} \\",
        """  -d '{"messages": [{"role": "user", "content": "a red circle"}], "max_tokens": 62}'""",
        f"curl -s http://{host}:{settings.server.media_port}/generate {header}{key} \\",
        """  -H 'Prefer: wait=60' -d '{"type": "sdxl_image_fast", "prompt": "a red circle"}'""",
    ]


def _gateway_lines(settings: Settings, header: str) -> list[str]:
    """What to try of the prompt gateway, whose first key is in a file."""
    if settings.gateway is None:
        return []
    host = settings.gateway.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    key = settings.state_dir / "gateway" / "admin-key"
    prompt = '{"prompt": "a green star"}'
    return [
        f"curl -s http://{host}:{settings.gateway.port}/functions/v1/enhance-prompt {header} \\",
        f"""  -H "Authorization: Bearer $(cat {key})" -d '{prompt}'""",
    ]


class LiveView:
    """A table that is drawn anew in place. Orchestrator thread only."""

    def __init__(self, lines: Sequence[str]):
        self._lines = lines
        self._live = Live(console=Console(), auto_refresh=False, transient=False)
        self._live.start()

    def show(self, report: StatusReport) -> None:
        parts: list[Table | Text] = [table(report.children)]
        if report.status in ("ready", "degraded"):
            parts.append(Text("Try it:"))
            parts += [Text(line) for line in self._lines]
            parts.append(Text("Ctrl-C drains and stops.", style="dim"))
        elif report.status == "draining":
            parts.append(Text("Draining; Ctrl-C again stops at once.", style="yellow"))
        self._live.update(Group(*parts), refresh=True)

    def close(self) -> None:
        self._live.stop()


class PlainView:
    """One line per change, for logs and pipes. Orchestrator thread only."""

    def __init__(self, lines: Sequence[str]):
        self._lines = lines
        self._told: dict[str, str] = {}
        self._was_ready = False

    def show(self, report: StatusReport) -> None:
        for child in report.children:
            if self._told.get(child.name) != child.status:
                self._told[child.name] = child.status
                note = _note(child)
                port = f" on port {child.port}" if child.port else ""
                self._say(f"{child.name}{port}: {child.status}{f' ({note})' if note else ''}")
        if report.status in ("ready", "degraded") and not self._was_ready:
            self._was_ready = True
            Console(file=sys.stdout, width=120).print(table(report.children))
            self._say("Try it:")
            for line in self._lines:
                self._say(line)

    def close(self) -> None:
        self._say("stopped")

    def _say(self, line: str) -> None:
        print(line, flush=True)


class QuietView:
    """Shows nothing: what took the output has gone."""

    def show(self, report: StatusReport) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_view(lines: Sequence[str]) -> LiveView | PlainView:
    """The view that fits standard output."""
    return (
        LiveView(lines)
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        else PlainView(lines)
    )


def _note(child: ChildReport) -> str:
    if child.next_try_s is not None and child.cause:
        return f"{child.cause}; next try in {child.next_try_s:.0f} s"
    if child.pid is None:
        return child.cause or ""
    return ""
