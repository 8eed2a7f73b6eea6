"""Are a model's files there and whole, and what is in them: read from headers, nothing is loaded.

A folder may carry `manifest.json`, written by the script that made or fetched it:
`{"files": {"relative/path": {"size": bytes, "sha256": hex}}}`. Sizes are always compared with it;
content hashes are compared when they are computed anyway (`weights_sha256`, `check_files(full)`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from worker.catalog import AdapterSpec, ModelSpec
from worker.errors import ModelUnavailable

MANIFEST = "manifest.json"
# A header longer than this is not one: the largest published models stay below 10 MB.
MAX_HEADER_BYTES = 100 << 20

_DIFFUSERS_PARTS = {
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "wan": ("transformer", "vae", "text_encoder", "tokenizer"),
}
_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2")
ENCODER_WEIGHTS = "model.safetensors"  # of the model that reads an IP-Adapter's pictures


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a model's files, in words for the operator."""

    model: str
    path: str  # as messages show it
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.model}: {self.path}: {self.what}; {self.cure}"


def check_files(
    spec: ModelSpec, *, full: bool = False, progress: Callable[[int], None] = lambda _bytes: None
) -> list[Problem]:
    """Everything wrong with the files of one model; an empty list when it can be loaded.

    full: also hash every file that the manifest lists; `progress` is told the bytes as they
    are read.
    """
    found = list(_problems(spec))
    if not found and full:
        found = list(_hash_problems(spec.path, progress))
    return [Problem(spec.id, _shown(spec, path), what, _cure(spec, path)) for path, what in found]


def check_adapter(
    spec: AdapterSpec, *, full: bool = False, progress: Callable[[int], None] = lambda _bytes: None
) -> list[Problem]:
    """Everything wrong with the files of an adapter and of its image encoder; as `check_files`."""
    found = []
    for path in _adapter_places(spec):
        own = list(_adapter_problems(path))
        if path == spec.image_encoder:
            own += _weight_problems(path / ENCODER_WEIGHTS)
        if not own and full:
            own = list(_hash_problems(path, progress))
        found += own
    return [Problem(spec.id, str(path), what, spec.cure) for path, what in found]


def adapter_files(spec: AdapterSpec) -> list[Path]:
    """The safetensors files of an adapter and of its image encoder, those that are there."""
    found: set[Path] = set()
    for path in _adapter_places(spec):
        found |= _weights_of(path) if path.is_dir() else {path}
    return sorted(file for file in found if file.is_file())


def is_recorded(spec: ModelSpec | AdapterSpec) -> bool:
    """Whether there is a record to compare its files with. The files must be checked."""
    places = _adapter_places(spec) if isinstance(spec, AdapterSpec) else [spec.path]
    return all(_manifest(path) for path in places)


def require_files(spec: ModelSpec) -> None:
    """Raise ModelUnavailable with the first problem, if there is one."""
    problems = check_files(spec)
    if problems:
        raise ModelUnavailable(str(problems[0]))


def weight_files(spec: ModelSpec) -> list[Path]:
    """The safetensors files of a model, sorted by relative path, and those of the VACE transformer
    beside it. The files must be checked."""
    if spec.path.is_file():
        return [spec.path]
    if spec.kind == "chat":
        return sorted(_weights_of(spec.path))
    folders = [spec.path / part for part in _DIFFUSERS_PARTS[spec.kind]]
    beside = _weights_of(spec.vace_folder) if spec.vace_folder is not None else set()
    own = sorted(file for folder in folders for file in _weights_of(folder))
    return own + sorted(beside)


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensors of a model, from the headers."""
    return sum(
        end - begin
        for file in weight_files(spec)
        for name, entry in read_header(file).items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    )


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's size.

    Raises ValueError that says what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"no safetensors header in its {size} bytes")
        try:
            header = json.loads(file.read(length))
            ends = [
                int(entry["data_offsets"][1])
                for key, entry in header.items()
                if key != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as exc:
            raise ValueError("its safetensors header cannot be read") from exc
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{size} bytes, its header promises {expected}")
    result: dict[str, Any] = header
    return result


def weights_sha256(spec: ModelSpec, state_dir: Path) -> dict[str, str]:
    """SHA-256 (hex) per weight file, keyed by path relative to the model, of the VACE transformer
    beside it by "vace/" and its name.

    Read once per version of a file (size, modification time, inode) and remembered in
    `state_dir`. Raises ModelUnavailable when a hash differs from the folder's manifest.
    """
    cache_path = state_dir / "weights-sha256.json"
    cache = _read_cache(cache_path)
    fresh: dict[str, str] = {}
    result = {}
    for file in weight_files(spec):
        stat = file.stat()
        key = f"{file}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        digest = cache.get(key) or file_sha256(file)
        fresh[key] = digest
        relative = _name(spec, file)
        expected = _recorded_sha256(spec, file) or digest
        if digest != expected:
            what = f"sha256 {digest[:12]}… is not the recorded {expected[:12]}…"
            raise ModelUnavailable(f"{spec.id}: {_shown(spec, file)}: {what}; {spec.cure}")
        result[relative] = digest
    if not fresh.items() <= cache.items():
        _write_cache(cache_path, _read_cache(cache_path) | fresh)
    return result


def combined_sha256(files: dict[str, str]) -> str:
    """One SHA-256 (hex) over file hashes: of the lines `hash  path`, sorted by path."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _bytes: None) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(8 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _problems(spec: ModelSpec) -> Iterator[tuple[Path, str]]:
    if not spec.path.exists():
        yield spec.path, "is missing"
        return
    if spec.path.is_file():
        if spec.kind != "sdxl":
            yield spec.path, f"is one file; a model of kind {spec.kind} is a folder"
            return
        yield from _weight_problems(spec.path)
        if spec.config_path is None:
            yield spec.path, "is a single file and its catalog entry has no config_path"
        else:
            yield from _config_problems(spec.config_path, _DIFFUSERS_PARTS[spec.kind])
    elif spec.kind == "chat":
        yield from _chat_problems(spec.path)
    else:
        yield from _diffusers_problems(spec.path, _DIFFUSERS_PARTS[spec.kind])
        if spec.vace_folder is not None:
            yield from _json_problems(spec.vace_folder / "config.json")
            yield from _folder_weight_problems(spec.vace_folder)
            yield from _manifest_problems(spec.vace_folder)
    yield from _manifest_problems(spec.path)


def _adapter_places(spec: AdapterSpec) -> list[Path]:
    return [spec.path, *([spec.image_encoder] if spec.image_encoder is not None else [])]


def _adapter_problems(path: Path) -> Iterator[tuple[Path, str]]:
    """path: a file, or a folder of weights with their config.json."""
    if path.suffix == ".safetensors":
        yield from _weight_problems(path)
    elif not path.is_dir():
        yield path, "is missing"
    else:
        yield from _json_problems(path / "config.json")
        yield from _folder_weight_problems(path)
    yield from _manifest_problems(path)


def _manifest_problems(path: Path) -> Iterator[tuple[Path, str]]:
    folder = _folder(path)
    try:
        recorded = _manifest(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        yield folder / MANIFEST, "is damaged: not a list of files with sizes and hashes"
        return
    for relative, entry in recorded.items():
        file = folder / relative
        if not file.is_file():
            yield file, "is missing"
        elif file.stat().st_size != entry["size"]:
            yield file, f"{file.stat().st_size} bytes instead of {entry['size']}"


def _chat_problems(folder: Path) -> Iterator[tuple[Path, str]]:
    yield from _json_problems(folder / "config.json")
    yield from _json_problems(folder / "tokenizer.json")
    yield from _folder_weight_problems(folder)


def _diffusers_problems(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    yield from _json_problems(folder / "model_index.json")
    for part in parts:
        if not (folder / part).is_dir():
            yield folder / part, "is missing"
        elif part in _WITHOUT_WEIGHTS:
            if "transformer" in parts:  # WAN: read as it is, see worker/engine/media/wan.py
                yield from _json_problems(folder / part / "tokenizer.json")
            else:
                yield from _clip_tokenizer_problems(folder / part)
        else:
            yield from _json_problems(folder / part / "config.json")
            yield from _folder_weight_problems(folder / part)


def _config_problems(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    yield from _json_problems(folder / "model_index.json")
    if not folder.is_dir():
        return
    yield from _json_problems(folder / "scheduler" / "scheduler_config.json")
    for part in parts:
        if part in _WITHOUT_WEIGHTS:
            yield from _clip_tokenizer_problems(folder / part)
        else:
            yield from _json_problems(folder / part / "config.json")


def _clip_tokenizer_problems(folder: Path) -> Iterator[tuple[Path, str]]:
    """Without these the library makes an empty vocabulary, or one without a limit, silently."""
    yield from _json_problems(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        yield from _json_problems(folder / "vocab.json")
        if not (folder / "merges.txt").is_file():
            yield folder / "merges.txt", "is missing"


def _folder_weight_problems(folder: Path) -> Iterator[tuple[Path, str]]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        for problem in _json_problems(indexes[0]):
            yield problem
            return
    try:
        files = _weights_of(folder)
    except (ValueError, KeyError, TypeError, AttributeError):
        yield indexes[0], "is not a safetensors index"
        return
    if not files:
        yield folder, "has no .safetensors file"
    for file in sorted(files):
        yield from _weight_problems(file)


def _weights_of(folder: Path) -> set[Path]:
    """The weight files that a loader would read from this folder."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = json.loads(indexes[0].read_bytes())["weight_map"].values()
        return {folder / name for name in names}
    plain = [folder / "model.safetensors", folder / "diffusion_pytorch_model.safetensors"]
    return {file for file in plain if file.is_file()} or set(folder.glob("*.safetensors"))


def _weight_problems(file: Path) -> Iterator[tuple[Path, str]]:
    if not file.is_file():
        yield file, "is missing"
        return
    try:
        read_header(file)
    except (ValueError, OSError) as exc:
        yield file, f"is damaged: {exc}"


def _json_problems(file: Path) -> Iterator[tuple[Path, str]]:
    if not file.is_file():
        yield file, "is missing"
        return
    stat = file.stat()
    if not _is_json(file, stat.st_size, stat.st_mtime_ns, stat.st_ino):
        yield file, "is damaged: not JSON"


@lru_cache(maxsize=1024)
def _is_json(file: Path, *_version: int) -> bool:
    """Read once per version of a file: a large tokenizer takes a tenth of a second, with Python's
    lock held, and files are checked several times before each load."""
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _hash_problems(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[Path, str]]:
    for relative, entry in _manifest(path).items():
        file = _folder(path) / relative
        digest = file_sha256(file, progress)
        if digest != entry["sha256"]:
            yield (
                file,
                f"is damaged: sha256 {digest[:12]}… is not the recorded {entry['sha256'][:12]}…",
            )


def _folder(path: Path) -> Path:
    """The folder that holds the manifest of a folder, or of a file."""
    return path.parent if path.is_file() else path


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 per file of a folder, or of a file alone; empty without a manifest.

    Raises ValueError, KeyError, TypeError or AttributeError when it is damaged.
    """
    folder = _folder(path)
    manifest, before = folder / MANIFEST, ""
    if not manifest.is_file():  # it may be a part of a model that was fetched whole
        manifest, before = folder.parent / MANIFEST, f"{folder.name}/"
    if not manifest.is_file():
        return {}
    files = json.loads(manifest.read_bytes())["files"]
    recorded = {
        name.removeprefix(before): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
        for name, entry in files.items()
        if name.startswith(before)
    }
    return {name: one for name, one in recorded.items() if not path.is_file() or name == path.name}


def _recorded_sha256(spec: ModelSpec, file: Path) -> str | None:
    """Of a weight file, in the manifest of its model, or of the VACE transformer beside it."""
    beside = spec.vace_folder
    for place in (spec.path, *([beside] if beside is not None else [])):
        if file.is_relative_to(place):
            recorded = _manifest(place).get(str(file.relative_to(_folder(place))))
            if recorded is not None:
                return str(recorded["sha256"])
    return None


def _name(spec: ModelSpec, file: Path) -> str:
    if spec.path.is_file():
        return file.name
    if file.is_relative_to(spec.path):
        return str(file.relative_to(spec.path))
    return f"vace/{file.name}"


def _cure(spec: ModelSpec, path: Path) -> str:
    beside = spec.vace_folder
    if beside is not None and path.is_relative_to(beside) and not path.is_relative_to(spec.path):
        adapter = spec.adapter("vace")
        assert adapter is not None, "it has a folder"
        return f"{adapter.cure}, or move its folder away"
    return spec.cure


def _shown(spec: ModelSpec, path: Path) -> str:
    if path.is_relative_to(spec.path):
        relative = path.relative_to(spec.path)
        return spec.shown_path if relative == Path() else f"{spec.shown_path}/{relative}"
    return str(path)


def _read_cache(path: Path) -> dict[str, str]:
    try:
        cache: dict[str, str] = json.loads(path.read_bytes())
    except (OSError, ValueError):  # never written, or cut short: the hashes are computed again
        return {}
    return cache


def _write_cache(path: Path, cache: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(cache, indent=1))
    partial.replace(path)
