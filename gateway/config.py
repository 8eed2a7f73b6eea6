"""Settings: the [gateway] table of a profile, and what the environment holds. Read once, frozen.

Secrets and places are in the environment; everything else is in the profile. The profile's other
tables belong to the worker and are not looked at.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]

MODEL_KEY = "qwen_instruct"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Logs(Section):
    """[gateway.logs]"""

    # Whether prompts and answers are kept, beside the numbers. Without them nothing is replayed.
    bodies: bool = True
    body_days: float = Field(7.0, ge=0)
    row_days: float = Field(90.0, ge=0)
    max_rows: int = Field(5_000_000, ge=1000)  # the oldest above it go


class GatewaySection(Section):
    """[gateway] in a profile."""

    host: str = "127.0.0.1"
    port: int = Field(7862, ge=1, le=65535)  # override: GATEWAY_PORT
    # Where workers reach us with their callbacks; None: http://host:port.
    public_url: str | None = None
    # Base URLs of workers that are always known, beside those that register; tried in this order.
    # Overrides: GATEWAY_CHAT_WORKERS, GATEWAY_MEDIA_WORKERS, comma-separated.
    chat_workers: tuple[str, ...] = ()
    media_workers: tuple[str, ...] = ()
    # Whether workers, and providers of models, may have private and loopback addresses and plain
    # http.
    private_workers: bool = False
    # Folders or files of tokenizers by name (clip, umt5, qwen); relative to the models folder.
    tokenizers: dict[str, str] = Field(default_factory=dict)
    default_model: str = MODEL_KEY  # the enhancement default of a database that is seeded
    max_unverified_s: float = Field(86400.0, gt=0)  # older snapshots are flagged and alarm
    deadline_s: float = Field(85.0, gt=0, le=90.0)  # of a request; a pod's proxy cuts at 100
    body_bytes: int = Field(1 << 20, ge=1024)
    prompt_chars: int = Field(20_000, ge=100)
    # What a worker whose receipt does not match is met with: refuse its answer, or flag it.
    on_mismatch: Literal["refuse", "flag"] = "refuse"
    queues: bool = True  # push jobs to Redis where the environment names one; else over HTTP
    refresh_every_s: float = Field(86400.0, ge=0)  # of the model catalogue; 0: only when asked
    logs: Logs = Logs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a process of the gateway is told from outside."""

    section: GatewaySection
    state_dir: Path
    models_dir: Path
    # SQLAlchemy URL; the default is SQLite in the state folder.
    database_url: str = field(repr=False)
    # All of the environment, for secrets by name (Provider.secret_ref); never logged or shown.
    environment: Mapping[str, str] = field(repr=False)

    @property
    def public_url(self) -> str:
        host = f"[{self.section.host}]" if ":" in self.section.host else self.section.host
        return (self.section.public_url or f"http://{host}:{self.section.port}").rstrip("/")

    def secret(self, *names: str) -> str | None:
        """The first of these variables that is set; an empty one counts as not set."""
        return next((value for name in names if (value := self.environment.get(name))), None)


def read_settings(profile: Path | None, environment: Mapping[str, str]) -> Settings:
    """Settings of a profile's file (None: all defaults) and the environment. Raises ConfigError."""
    values: dict[str, Any] = {}
    if profile is not None:
        try:
            values = tomllib.loads(profile.read_text("utf-8")).get("gateway", {})
        except OSError as exc:
            raise ConfigError(f"{profile} cannot be read: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{profile} is not TOML: {exc}") from exc
    values = {**values, **_overrides(environment)}
    try:
        section = GatewaySection.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(f"{profile or 'environment'}: {_explain(exc)}") from exc
    state_dir = _state_dir(environment)
    return Settings(
        section=section,
        state_dir=state_dir,
        models_dir=Path(environment.get("VERBATIM_MODELS_DIR") or REPOSITORY / "models").resolve(),
        database_url=environment.get("GATEWAY_DATABASE_URL")
        or f"sqlite:///{state_dir / 'gateway.sqlite3'}",
        environment=dict(environment),
    )


def _state_dir(environment: Mapping[str, str]) -> Path:
    if own := environment.get("GATEWAY_STATE_DIR"):
        return Path(own).resolve()
    return Path(environment.get("VERBATIM_STATE_DIR") or REPOSITORY / "state").resolve() / "gateway"


def _overrides(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if raw := environment.get("GATEWAY_PORT"):
        if not raw.isdecimal():
            raise ConfigError(f"GATEWAY_PORT={raw!r} is not a port (1 to 65535)")
        found["port"] = int(raw)
    for key in ("chat_workers", "media_workers"):
        if raw := environment.get(f"GATEWAY_{key.upper()}"):
            found[key] = tuple(one.strip() for one in raw.split(",") if one.strip())
    return found


def _explain(error: ValidationError) -> str:
    lines = []
    for one in error.errors():
        where = ".".join(str(part) for part in ("gateway", *one["loc"]))
        if one["type"] == "extra_forbidden":
            known = (*GatewaySection.model_fields, *Logs.model_fields)
            near = difflib.get_close_matches(str(one["loc"][-1]), known, n=1, cutoff=0.5)
            lines.append(f"{where} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            lines.append(f"{where}: {one['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
