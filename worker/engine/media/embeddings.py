"""What text encoders made of texts, kept: a repeated prompt needs no encoder on the device.

Kept by everything that decides the result: weights, tokenizer, text, type, device and the versions
of the libraries. So what is found is what would be computed, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from worker.versions import computing

log = logging.getLogger(__name__)

# Of WAN's 512 positions 4 MiB a text, of SDXL's pair 1.3 MB.
RAM_BYTES = 64 << 20
DISK_BYTES = 1 << 30

Tensors = dict[str, torch.Tensor]


class EmbeddingCache:
    """Embeddings by key, in memory and in a folder; the least recently used go first.

    Engine thread only. Files are content: another process may delete any of them at any time.
    """

    def __init__(self, folder: Path, ram_bytes: int = RAM_BYTES, disk_bytes: int = DISK_BYTES):
        self._folder = folder
        self._ram_bytes = ram_bytes
        self._disk_bytes = disk_bytes
        self._held: OrderedDict[str, Tensors] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> Tensors | None:
        """On the CPU. None where it is not known, or its file cannot be read."""
        found = self._held.get(key)
        if found is None:
            path = self._path(key)
            try:
                found = load_file(path)
                os.utime(path)  # for the order in which files go
            except FileNotFoundError:
                found = None
            except (OSError, SafetensorError) as exc:
                log.warning("%s cannot be read (%s); computed again", path.name, exc)
                path.unlink(missing_ok=True)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._hold(key, found)
        return found

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep it. A full disk costs the file, not the job."""
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self._hold(key, kept)
        partial = self._path(key).with_suffix(f".{os.getpid()}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, partial)
            partial.replace(self._path(key))
            self._trim()
        except OSError as exc:
            log.warning("embeddings are not kept on disk: %s", exc)
            partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _hold(self, key: str, tensors: Tensors) -> None:
        self._held[key] = tensors
        self._held.move_to_end(key)
        while len(self._held) > 1 and sum(map(_size, self._held.values())) > self._ram_bytes:
            self._held.popitem(last=False)

    def _trim(self) -> None:
        for left_over in self._folder.glob("*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        files = [(path.stat(), path) for path in self._folder.glob("*.safetensors")]
        left = sum(info.st_size for info, _ in files)
        for info, path in sorted(files, key=lambda one: one[0].st_mtime):
            if left <= self._disk_bytes:
                return
            path.unlink(missing_ok=True)
            left -= info.st_size


def computed_on(device: torch.device) -> dict[str, object]:
    """What of the device decides how sums are rounded."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def embedding_key(**decides: object) -> str:
    """A name for embeddings. decides: everything that the result depends on, as JSON values."""
    body = json.dumps({**decides, "versions": computing()}, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
