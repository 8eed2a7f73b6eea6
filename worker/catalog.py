"""The models that a port serves, found by id or alias. No file is opened here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from worker.config import REPOSITORY, AdapterEntry, Kind, ModelEntry, Residency, Settings
from worker.errors import ConfigError, Unsupported

# Native sizes of the published models, used when a catalog entry names none:
# SDXL base 1024x1024 (its unet/config.json sample_size 128 x VAE factor 8); WAN 2.1 1.3B is
# trained for 480x832 and 81 frames at 16 fps (the model's own published defaults).
NATIVE_SIZE = {"sdxl": (1024, 1024), "wan": (480, 832), "chat": (0, 0)}
NATIVE_FRAMES = 81
# Those of worker/engine/chat/template.py, named here so that a wrong one is refused before torch
# is loaded.
CHAT_TEMPLATES = ("chatml",)
# Where models are that come with the program, whatever VERBATIM_MODELS_DIR says.
SHIPPED_MODELS = REPOSITORY / "models"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Weights that change what an image model does, with its paths resolved."""

    id: str
    kind: str  # lora | ip_adapter | vace
    path: Path  # a .safetensors file, of vace its transformer's folder; may not exist
    image_encoder: Path | None  # ip_adapter: folder of the model that reads the picture
    is_fetched: bool = False  # by scripts/fetch_models.py, for whoever wants it
    cure: str = "put its files there, or correct its paths in the catalog"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A served model, with its path resolved."""

    id: str
    kind: Kind
    path: Path  # a folder, or one .safetensors file; may not exist
    shown_path: str  # for messages: relative to the models folder where possible
    aliases: tuple[str, ...]
    dtype: str
    chat_template: str
    config_path: Path | None
    display_name: str
    default_size: tuple[int, int]  # width, height in pixels
    default_frames: int
    pinned: bool = False  # never leaves the device for others
    keep_alive_s: float = 0.0  # after a use it is taken to be needed again for so long
    priority: int = 0  # whose wait counts more; higher is more urgent
    cure: str = "put its files there, or correct its path"  # for messages about missing files
    adapters: tuple[AdapterSpec, ...] = ()

    def adapter(self, kind: str, name: str | None = None) -> AdapterSpec | None:
        """The adapter of this kind with this id in any casing, or the first; None without one."""
        of_kind = (one for one in self.adapters if one.kind == kind)
        return next(
            (one for one in of_kind if name is None or one.id.lower() == name.lower()), None
        )

    @property
    def ip_adapter(self) -> AdapterSpec | None:
        """The one that reads pictures; None without one, and while nobody has fetched it."""
        adapter = self.adapter("ip_adapter")
        if adapter is not None and adapter.is_fetched and not adapter.path.is_file():
            return None
        return adapter

    @property
    def ip_adapter_cure(self) -> str:
        """What to do where there is none."""
        known = self.adapter("ip_adapter")
        if known is not None:
            return f"to have {known.id}, {known.cure}"
        return "add one to the profile as [[adapters]] with kind, model, path and image_encoder"

    @property
    def vace_folder(self) -> Path | None:
        """The VACE transformer that lies beside a text-to-video model and works with its text
        encoder and VAE; None without one."""
        adapter = self.adapter("vace") if self.kind == "wan" else None
        return adapter.path if adapter is not None and adapter.path.is_dir() else None


class Catalog:
    """The models one port serves, in the profile's order. Immutable."""

    def __init__(self, specs: Sequence[ModelSpec], default_chat: str | None = None):
        """`default_chat` is the id or alias used by requests that name no model."""
        self.specs = tuple(specs)
        self._by_name: dict[str, ModelSpec] = {}
        for spec in self.specs:
            for name in (spec.id, *spec.aliases):
                other = self._by_name.setdefault(name.lower(), spec)
                if other is not spec:
                    raise ConfigError(f"models {other.id} and {spec.id} both answer to {name}")
        if default_chat is not None and default_chat.lower() not in self._by_name:
            raise ConfigError(f"[chat] default_model {default_chat} is not one of the chat models")
        self._default_chat = default_chat

    def find(self, name: str) -> ModelSpec:
        """The model with this id or alias, in any casing.

        Raises Unsupported for a name that is not served: answering with another model would be
        a silent change of what was asked.
        """
        spec = self._by_name.get(name.lower())
        if spec is None:
            raise Unsupported(f"this model is not served here; known: {', '.join(self.names())}")
        return spec

    def names(self) -> list[str]:
        """Every id and alias, sorted."""
        return sorted(name for spec in self.specs for name in (spec.id, *spec.aliases))

    def of_kind(self, kind: Kind) -> tuple[ModelSpec, ...]:
        return tuple(spec for spec in self.specs if spec.kind == kind)

    def default(self, kind: Kind) -> ModelSpec:
        """The model of requests that name none. Raises Unsupported when no model of `kind`."""
        if kind == "chat" and self._default_chat is not None:
            return self.find(self._default_chat)
        of_kind = self.of_kind(kind)
        if not of_kind:
            raise Unsupported(f"the profile serves no model of kind {kind}")
        return of_kind[0]


def chat_catalog(settings: Settings) -> Catalog:
    """The models of the chat port."""
    specs = _served(settings, settings.chat.models, ("chat",), "chat")
    default = settings.chat.default_model
    if default is None:
        # Clients that send no model mean qwen_instruct (docs/http-api.md#chat).
        named = {name.lower() for spec in specs for name in (spec.id, *spec.aliases)}
        default = "qwen_instruct" if "qwen_instruct" in named else None
    return Catalog(specs, default_chat=default)


def media_catalog(settings: Settings) -> Catalog:
    """The models of the image and video port."""
    return Catalog(_served(settings, settings.media.models, ("sdxl", "wan"), "media"))


def preload_ids(catalog: Catalog, preload: Sequence[str] | None) -> tuple[str, ...]:
    """Ids of the models to load at start: those named, or every default when none are named.

    Raises ConfigError for a name that is not served.
    """
    if preload is None:
        kinds = dict.fromkeys(spec.kind for spec in catalog.specs)
        return tuple(catalog.default(kind).id for kind in kinds)
    try:
        return tuple(catalog.find(name).id for name in preload)
    except Unsupported as exc:
        raise ConfigError(f"preload names a model that is not served: {exc}") from exc


def _served(
    settings: Settings, names: Sequence[str], kinds: tuple[Kind, ...], section: str
) -> list[ModelSpec]:
    """The entries that `names` lists; or the profile's own; or, with neither, the catalog's."""
    candidates = [entry for entry in settings.models if entry.kind in kinds]
    if names:
        by_id = {entry.id: entry for entry in candidates}
        missing = [name for name in names if name not in by_id]
        if missing:
            raise ConfigError(
                f"[{section}] models: {missing[0]} is not in the catalog with kind "
                f"{' or '.join(kinds)}; known ids: {', '.join(sorted(by_id)) or 'none'}"
            )
        entries: Iterable[ModelEntry] = [by_id[name] for name in names]
    else:
        # By kind, so that a profile that declares only a chat model still serves the catalog's
        # image and video models.
        entries = [
            entry
            for kind in kinds
            for entry in (
                [e for e in candidates if e.kind == kind and e.id in settings.declared_ids]
                or [e for e in candidates if e.kind == kind]
            )
        ]
    return [
        _spec(
            entry,
            settings.models_dir,
            settings.residency.get(entry.id, Residency()),
            [one for one in settings.adapters if one.model == entry.id],
        )
        for entry in entries
    ]


def _spec(
    entry: ModelEntry, models_dir: Path, residency: Residency, adapters: Sequence[AdapterEntry]
) -> ModelSpec:
    template = entry.chat_template or "chatml"
    if template not in CHAT_TEMPLATES:
        raise ConfigError(
            f"model {entry.id}: chat_template {template} is unknown; "
            f"known: {', '.join(CHAT_TEMPLATES)}"
        )
    adapter_specs = tuple(adapter_spec(one, models_dir) for one in adapters)
    if entry.shipped:
        models_dir = SHIPPED_MODELS
    path = _first_existing(entry.path, models_dir)
    size = entry.default_size
    return ModelSpec(
        id=entry.id,
        kind=entry.kind,
        path=path,
        shown_path=shown(path, models_dir),
        aliases=tuple(entry.aliases),
        dtype=entry.dtype,
        chat_template=template,
        config_path=_first_existing(entry.config_path, models_dir) if entry.config_path else None,
        display_name=entry.display_name or entry.id,
        default_size=_parse_pair(size) if size else NATIVE_SIZE[entry.kind],
        default_frames=entry.default_frames or NATIVE_FRAMES,
        pinned=residency.pinned,
        keep_alive_s=residency.keep_alive_s,
        priority=int(entry.kind == "chat") if residency.priority is None else residency.priority,
        cure=_cure(entry),
        adapters=adapter_specs,
    )


def adapter_spec(entry: AdapterEntry, models_dir: Path) -> AdapterSpec:
    """An adapter as the daemon sees it."""
    encoder = entry.image_encoder
    spec = AdapterSpec(
        id=entry.id,
        kind=entry.kind,
        path=models_dir / entry.path,
        image_encoder=models_dir / encoder if encoder is not None else None,
    )
    if entry.source is None:
        return spec
    return replace(spec, is_fetched=True, cure=f"run python scripts/fetch_models.py {entry.id}")


def _cure(entry: ModelEntry) -> str:
    """What to do about missing or damaged files of this model."""
    if entry.shipped:
        return f"restore this program's own models/{entry.id}: git checkout -- models"
    if entry.source is not None:
        return f"run python scripts/fetch_models.py {entry.id}"
    return "put its files there, or correct its path"


def shown(path: Path, models_dir: Path) -> str:
    """`path` as messages show it: without the machine's folders where that is possible."""
    for base, prefix in ((models_dir, "models/"), (REPOSITORY, "")):
        if path.is_relative_to(base):
            return prefix + str(path.relative_to(base))
    return str(path)


def _first_existing(path: str | list[str], models_dir: Path) -> Path:
    candidates = [models_dir / one for one in ([path] if isinstance(path, str) else path)]
    found = next((one for one in candidates if one.exists()), candidates[0])
    return _snapshot(found)


def _snapshot(path: Path) -> Path:
    """The one snapshot inside a Hugging Face cache folder `models--owner--name`, else `path`."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    return max(snapshots.iterdir(), default=path, key=lambda one: one.stat().st_mtime)


def _parse_pair(size: str) -> tuple[int, int]:
    width, height = size.split("x")
    return int(width), int(height)
