"""A model's weight files as tensors, and their bytes when they are asked for.

The libraries map the files, and then touch every tensor with Python's lock held. What is not in the
system's memory yet is read by that: on a slow volume everything else in the process, the passes of
other models too, would stand still until the whole file has come (scripts/bench_beside.py).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from worker.modelfiles import read_header

# Read at once: enough for the full speed of a volume; what has come is small change on a fast one.
READ_BYTES = 4 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class WeightFiles:
    """The tensors of some safetensors files. The thread that loads a model only.

    Nothing is read before `read` and `read_all`. They put bytes into the system's memory, where
    the tensors, which are the mapped files, then find them. The mapping is gone with the last
    tensor of it.
    """

    def __init__(self, files: Sequence[Path]):
        """files: checked (worker/modelfiles.py). Raises ValueError for a type that is not known,
        and OSError."""
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, tuple[Path, int, int]] = {}  # by address: file, begin, end
        self._buffer = bytearray(READ_BYTES)
        for file in files:
            self._map(file)

    def read(self, tensor: torch.Tensor | None) -> None:
        """Have the bytes of one of `tensors` in memory; of another one, nothing is done.

        Raises OSError.
        """
        place = None if tensor is None else self._places.get(tensor.data_ptr())
        if place is not None:
            self._read([place])

    def read_all(self) -> None:
        """As `read`, of all of them in the order in which they lie. Raises OSError."""
        self._read(self._places.values())

    def _map(self, file: Path) -> None:
        header = read_header(file)
        with file.open("rb") as opened:
            first = 8 + int.from_bytes(opened.read(8), "little")
            # Private, so that nothing which is done to a weight gets into the file.
            mapped = mmap.mmap(
                opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        entries = {name: one for name, one in header.items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (first + one for one in entry["data_offsets"])
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{file.name}: {name} is of type {entry['dtype']}")
            dtype = _DTYPES[entry["dtype"]]
            if begin == end:
                self.tensors[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
            self.tensors[name] = flat.view(entry["shape"])
            self._places[flat.data_ptr()] = file, begin, end

    def _read(self, places: Iterable[tuple[Path, int, int]]) -> None:
        with memoryview(self._buffer) as buffer:
            for file, begin, end in places:
                with file.open("rb", buffering=0) as opened:
                    while begin < end:
                        # Without Python's lock.
                        got = os.preadv(opened.fileno(), [buffer[: end - begin]], begin)
                        if not got:
                            raise OSError(f"{file.name} has become shorter")
                        begin += got
