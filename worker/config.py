"""Every setting of the daemon: one TOML profile, the catalog, and a few environment overrides.

`load_settings` is the only reader. Profiles and the catalog refuse unknown keys and name the
nearest good one; the environment overrides only what differs between machines (paths, ports,
secrets). All settings are frozen: a process reads them once.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from worker.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"

# Every one of them is accepted as a Bearer key: existing clients hold different ones for the same
# worker (docs/http-api.md#keys).
KEY_NAMES = ("WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY", "SDXL_WORKER_API_KEY")

T = TypeVar("T", bound="Section")

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(value: object) -> int:
    """Bytes of a size such as "22GiB"; a number without a unit is refused."""
    match = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)", value) if type(value) is str else None
    )
    if not match:
        raise ValueError(f'{value!r} is not a size; write it with a unit, such as "512MiB"')
    return int(float(match[1]) * _UNITS[match[2]])


Size = Annotated[int, BeforeValidator(parse_size)]
Kind = Literal["chat", "sdxl", "wan"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """A table of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Server(Section):
    """[server]: where the two ports listen."""

    host: str = "127.0.0.1"
    chat_port: Port = 7861
    media_port: Port = 7860

    @model_validator(mode="after")
    def ports_differ(self) -> Self:
        if self.chat_port == self.media_port:
            raise ValueError(f"chat_port and media_port are both {self.chat_port}")
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Access(Section):
    """[access]: who may call."""

    keyless_inference: bool = False


class Limits(Section):
    """[limits]: what is refused before any work is done."""

    body_bytes: Size = 4 << 20
    messages: int = Field(512, ge=1)
    prompt_chars: int = Field(400_000, ge=1)
    images: int = Field(6, ge=1, le=64)
    image_pixels: int = Field(1536 * 1536, ge=64)
    video_pixels: int = Field(832 * 480, ge=64)
    frames: int = Field(81, ge=1)
    steps: int = Field(150, ge=1)


class Chat(Section):
    """[chat]: the chat engine and its port."""

    models: list[Name] = []
    default_model: Name | None = None
    preload: list[Name] | None = None
    max_running: int = Field(32, ge=1, le=256)
    max_waiting: int = Field(32, ge=0, le=512)
    kv_bytes: Size = 1 << 30
    deterministic: bool = False
    compile: bool = True
    pinned_system_prompts: list[str] = []
    deadline_s: float = Field(85.0, gt=0, le=3600)
    stream_deadline_s: float = Field(600.0, gt=0, le=3600)


class Media(Section):
    """[media]: the media engine, its port and its jobs."""

    models: list[Name] = []
    preload: list[Name] | None = None
    max_resident: int = Field(2, ge=1)
    exactness: Literal["bit", "close", "lossy"] = "bit"
    long_prompts: Literal["chunk", "refuse"] = "chunk"
    max_waiting: int = Field(64, ge=0)
    keep_finished: int = Field(200, ge=1)
    keep_bytes: Size = 10 << 30


class Jobs(Section):
    """[jobs]: what comes from lists, what is fetched for jobs and what is told about them."""

    lists: list[Name] = ["sdxl_queue", "wan_queue"]
    take_ahead: int = Field(4, ge=1)
    deliver_for_s: float = Field(259200.0, gt=0)
    trusted_origins: list[str] = []
    reference_bytes: Size = 25 << 20
    reference_pixels: int = Field(40_000_000, ge=64)
    reference_s: float = Field(30.0, gt=0)


class Residency(Section):
    """[residency.MODEL]: how a model holds its place on the device."""

    pinned: bool = False  # once there, its weights never leave for others
    keep_alive_s: float = Field(0.0, ge=0)  # they leave last for so long after a use
    # Whose wait counts more; None: 1 of a chat model, because a person waits for it, 0 of others.
    priority: int | None = Field(None, ge=-10, le=10)


class Daemon(Section):
    """[daemon]: the device and how processes are started and stopped."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_memory: Size | None = None
    threads: int = Field(0, ge=0, le=1024)
    grace_s: float = Field(60.0, ge=0)
    kill_after_s: float = Field(10.0, gt=0)


class Source(Section):
    """[models.source]: the Hugging Face repository where scripts/fetch_models.py gets the files."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = "main"  # a commit, where known: a fetch today equals a fetch tomorrow
    folder: str = ""  # of the repository; paths begin in it, here and in `files` and `sha256`
    files: list[str] = ["*"]  # glob patterns over paths; * also matches /
    sha256: dict[str, Sha256] = {}  # by path, of files that are known; any others are refused


class ModelEntry(Section):
    """[[models]]: one model, in configs/models.toml or in a profile."""

    id: Name
    kind: Kind
    path: str | list[str]  # relative to the models folder, or absolute; the first that exists
    aliases: list[Name] = []
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    chat_template: str | None = None  # kind chat only; "chatml" when absent
    config_path: str | None = None  # sdxl as a single file: the folder with its configs
    path_env: str | None = None  # environment variable that overrides `path`
    display_name: str | None = None  # what clients are shown; the id when absent
    default_size: str | None = Field(None, pattern=r"^\d+x\d+$")  # width x height, pixels
    default_frames: int | None = Field(None, ge=1)  # wan
    shipped: bool = False  # its files are in this program's own models folder
    source: Source | None = None
    config_source: Source | None = None

    @model_validator(mode="after")
    def fits_its_kind(self) -> Self:
        if self.kind != "chat" and self.chat_template is not None:
            raise ValueError(f"model {self.id}: chat_template belongs to kind chat only")
        if not self.path:
            raise ValueError(f"model {self.id}: path is empty")
        return self


class AdapterEntry(Section):
    """[[adapters]]: weights that change what an image model does, asked for job by job."""

    id: Name
    kind: Literal["lora", "ip_adapter", "vace"]
    model: Name  # id of the model that it belongs to
    # A .safetensors file, of vace the folder of its transformer; relative to the models folder, or
    # absolute.
    path: str
    # ip_adapter: folder of the CLIP vision model (config.json, model.safetensors) that reads the
    # picture.
    image_encoder: str | None = None
    source: Source | None = None
    image_encoder_source: Source | None = None

    @model_validator(mode="after")
    def has_what_its_kind_needs(self) -> Self:
        if (self.kind == "ip_adapter") != (self.image_encoder is not None):
            raise ValueError(
                f"adapter {self.id}: image_encoder belongs to kind ip_adapter, which needs it"
            )
        is_fetched = self.source is not None and self.image_encoder is not None
        if is_fetched != (self.image_encoder_source is not None):
            raise ValueError(
                f"adapter {self.id}: source and image_encoder_source of an ip_adapter go together"
            )
        return self


class GatewayPlace(BaseModel):
    """[gateway]: the prompt gateway is started beside the worker. It is a program of its own, which
    reads and checks its other settings itself; here is only what its supervisor needs."""

    model_config = ConfigDict(frozen=True, extra="allow")

    host: str = "127.0.0.1"
    port: Port = 7862


class Profile(Section):
    """A whole profile file."""

    server: Server = Server()
    access: Access = Access()
    limits: Limits = Limits()
    chat: Chat = Chat()
    media: Media = Media()
    jobs: Jobs = Jobs()
    daemon: Daemon = Daemon()
    gateway: GatewayPlace | None = None
    residency: dict[Name, Residency] = {}  # by model id
    models: list[ModelEntry] = []
    adapters: list[AdapterEntry] = []


class CatalogFile(Section):
    """configs/models.toml."""

    models: list[ModelEntry] = []
    adapters: list[AdapterEntry] = []


class Settings(BaseModel):
    """Everything a process needs to know, resolved. Holds no secrets: see `read_keys`."""

    model_config = ConfigDict(frozen=True)

    profile_name: str
    profile_path: Path
    models_dir: Path
    state_dir: Path
    server: Server
    access: Access
    limits: Limits
    chat: Chat
    media: Media
    jobs: Jobs = Jobs()
    daemon: Daemon
    gateway: GatewayPlace | None = None  # None: it is not started
    residency: dict[str, Residency] = {}
    models: tuple[ModelEntry, ...]  # catalog and profile together; the profile's come last
    declared_ids: tuple[str, ...]  # those of `models` that the profile itself declares
    adapters: tuple[AdapterEntry, ...] = ()  # catalog and profile together


def load_settings(profile: str, env: Mapping[str, str], configs: Path = CONFIGS) -> Settings:
    """Read a profile by name (a file of `configs`) or by path, the catalog, and the overrides.

    Raises ConfigError with the file, the key and what to write instead.
    """
    path = find_profile(profile, configs)
    loaded = _parse(Profile, _read_toml(path), path)
    catalog_path = configs / "models.toml"
    catalog = _parse(CatalogFile, _read_toml(catalog_path), catalog_path)
    server = _override_ports(loaded.server, env)
    by_id = {entry.id: entry for entry in catalog.models}
    _refuse_twice(catalog.models, catalog_path)
    _refuse_twice(loaded.models, path)
    for entry in loaded.models:
        by_id.pop(entry.id, None)  # so that the profile's come last, and in its own order
        by_id[entry.id] = entry
    for name in loaded.residency:
        if name not in by_id:
            near = difflib.get_close_matches(name, by_id, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: residency.{name}: there is no model with this id{hint}")
    models = [_override_path(entry, env) for entry in by_id.values()]
    adapters = {entry.id: entry for entry in (*catalog.adapters, *loaded.adapters)}
    for adapter in adapters.values():
        if adapter.model not in by_id:
            raise ConfigError(
                f"{path}: adapter {adapter.id}: there is no model {adapter.model}; "
                f"known: {', '.join(by_id)}"
            )
        kind = by_id[adapter.model].kind
        if adapter.kind == "vace" and kind != "wan":
            raise ConfigError(
                f"{path}: adapter {adapter.id}: kind vace belongs to a model of kind wan, "
                f"and {adapter.model} is of kind {kind}"
            )
    return Settings(
        profile_name=path.stem,
        profile_path=path.resolve(),
        models_dir=_folder(env, "VERBATIM_MODELS_DIR", REPOSITORY / "models"),
        state_dir=state_dir(env),
        server=server,
        access=loaded.access,
        limits=loaded.limits,
        chat=loaded.chat,
        media=loaded.media,
        jobs=loaded.jobs,
        daemon=loaded.daemon,
        gateway=_gateway(loaded.gateway, server, env),
        residency=loaded.residency,
        models=tuple(models),
        declared_ids=tuple(entry.id for entry in loaded.models),
        adapters=tuple(adapters.values()),
    )


def state_dir(env: Mapping[str, str]) -> Path:
    """The folder of logs, results and caches; also what names the daemon's sockets."""
    return _folder(env, "VERBATIM_STATE_DIR", REPOSITORY / "state")


def read_keys(env: Mapping[str, str]) -> tuple[str, ...]:
    """The configured Bearer keys, of the variables in KEY_NAMES that are set and not blank.

    Without the white space around them: a secret read from a file often ends with a newline, and
    no header can carry one.
    """
    keys = (env.get(name, "").strip() for name in KEY_NAMES)
    return tuple(dict.fromkeys(key for key in keys if key))


def check_exposure(settings: Settings, keys: Sequence[str]) -> None:
    """Refuse to listen beyond this machine while anybody could call.

    Raises ConfigError when the host is not loopback and no key is configured.
    """
    if not keys and not settings.server.is_loopback:
        raise ConfigError(
            f"[server] host is {settings.server.host}, which others can reach, and no key is set; "
            f"set one of {', '.join(KEY_NAMES)}, or use host 127.0.0.1"
        )


def find_profile(profile: str, configs: Path = CONFIGS) -> Path:
    """The file of a profile given by name or by path."""
    if "/" in profile or profile.endswith(".toml"):
        path = Path(profile)
        if not path.is_file():
            raise ConfigError(f"there is no profile file {profile}")
        return path
    path = configs / f"{profile}.toml"
    names = profile_names(configs)
    if profile not in names:
        near = difflib.get_close_matches(profile, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no profile {profile}; known: {', '.join(names)}{hint}")
    return path


def profile_names(configs: Path = CONFIGS) -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in configs.glob("*.toml") if path.stem != "models")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _parse(model: type[T], data: dict[str, Any], path: Path) -> T:
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        lines = [f"{path}: {line}" for line in _explain(model, exc)]
        raise ConfigError("\n".join(lines)) from exc


def _explain(model: type[Section], exc: ValidationError) -> Iterator[str]:
    for error in exc.errors():
        where = [str(part) for part in error["loc"]]
        shown = ".".join(where)
        if error["type"] == "extra_forbidden":
            known = _known_keys(model, error["loc"][:-1])
            near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            yield f"{shown} is not a key; {hint}"
        else:
            given = error["input"]
            value = f" (given: {given!r})" if isinstance(given, str | int | float) else ""
            yield f"{shown}: {error['msg'].removeprefix('Value error, ')}{value}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the table at `location`, found by walking the models' annotations."""
    current: type[BaseModel] = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        current = next(kind for kind in _models_in(annotation))
    return list(current.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def _refuse_twice(entries: Sequence[ModelEntry], path: Path) -> None:
    seen = set()
    for entry in entries:
        if entry.id in seen:
            raise ConfigError(f"{path}: model id {entry.id} is declared twice")
        seen.add(entry.id)


def _override_ports(server: Server, env: Mapping[str, str]) -> Server:
    values = server.model_dump()
    for key in ("chat_port", "media_port"):
        values[key] = _port(f"VERBATIM_{key.upper()}", env) or values[key]
    if values["chat_port"] == values["media_port"]:
        raise ConfigError(
            f"with VERBATIM_CHAT_PORT and VERBATIM_MEDIA_PORT as they are set, chat_port and "
            f"media_port are both {values['chat_port']}"
        )
    return Server.model_validate(values)


def _gateway(
    place: GatewayPlace | None, server: Server, env: Mapping[str, str]
) -> GatewayPlace | None:
    """The gateway's place with GATEWAY_PORT, which it reads, too."""
    if place is None:
        return None
    port = _port("GATEWAY_PORT", env) or place.port
    if port in (server.chat_port, server.media_port):
        raise ConfigError(f"[gateway] port {port} is a port of [server], too; give it another one")
    return place.model_copy(update={"port": port})


def _port(name: str, env: Mapping[str, str]) -> int | None:
    raw = env.get(name)
    if not raw:
        return None
    if not raw.isdecimal() or not 1 <= int(raw) <= 65535:
        raise ConfigError(f"{name}={raw!r} is not a port (1 to 65535)")
    return int(raw)


def _override_path(entry: ModelEntry, env: Mapping[str, str]) -> ModelEntry:
    override = env.get(entry.path_env or "", "")
    return entry.model_copy(update={"path": override}) if override else entry


def _folder(env: Mapping[str, str], variable: str, default: Path) -> Path:
    return Path(env[variable]).resolve() if env.get(variable) else default
