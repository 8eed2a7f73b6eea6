"""Weight files as tensors: the same as the library's, and untouched until their bytes were read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from worker.engine.chat import weights
from worker.engine.chat.linear import can_pack, pack
from worker.engine.chat.weights import WeightFiles

REPOSITORY = Path(__file__).resolve().parents[2]

# In a process of its own, which a touched page ends: all of the mapped file is made unreadable, and
# of what is read, the pages that it lies on readable.
GUARDED = """
import ctypes, dataclasses, mmap, sys
from pathlib import Path
import torch
from worker.catalog import chat_catalog
from worker.config import load_settings
from worker.engine.chat import model as chat_model
from worker.engine.chat.weights import WeightFiles

NONE, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
protect = ctypes.CDLL(None).mprotect
reads = 0


class Guarded(WeightFiles):
    def __init__(self, files):
        super().__init__(files)
        for address, (file, begin, end) in self._places.items():
            self._allow(address, end - begin, NONE)

    def _read(self, places):
        global reads
        places = list(places)
        super()._read(places)
        address_of = {place: address for address, place in self._places.items()}
        for place in places:
            reads += 1
            self._allow(address_of[place], place[2] - place[1], READ_WRITE)

    def _allow(self, address, size, what):
        first = address - address % mmap.PAGESIZE
        assert not protect(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), what)


chat_model.WeightFiles = Guarded
folder, dtype, parks = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "parks"
settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(folder / "state")})
spec = dataclasses.replace(chat_catalog(settings).specs[0], path=folder, dtype=dtype)
loaded = chat_model.LanguageModel(
    spec, torch.device("cpu"), folder, chat_model.PromptReader(spec), kv_bytes=1 << 24,
    max_running=2, parks=parks,
)
assert reads == int(sys.argv[4]), reads
print("loaded")
"""


def read_pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What is read from now on: the file's inode, begin and end of each piece."""
    seen = []
    real = os.preadv

    def reading(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = real(file, buffers, offset)
        seen.append((os.fstat(file).st_ino, offset, offset + got))
        return got

    monkeypatch.setattr(weights.os, "preadv", reading)
    return seen


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files with tensors of many types and shapes."""
    first = {
        "b.matrix": torch.randn(7, 9),
        "a.half": torch.randn(3, 2, 5).half(),
        "c.brain": torch.randn(11).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.empty(0, 3),
    }
    second = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "small": torch.arange(-3, 3, dtype=torch.int8),
        "long": torch.arange(4),
        "mask": torch.tensor([True, False, True]),
    }
    save_file(first, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "2.safetensors")
    return [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def test_the_tensors_are_those_that_the_library_reads(files: list[Path]) -> None:
    expected = {name: one for file in files for name, one in load_file(file).items()}

    found = WeightFiles(files).tensors

    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_nothing_is_read_but_headers_until_it_is_asked_for(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = read_pieces(monkeypatch)
    found = WeightFiles(files)
    assert not seen

    found.read(found.tensors["b.matrix"])
    [(_, begin, end)] = seen
    assert end - begin == 7 * 9 * 4
    assert files[0].read_bytes()[begin:end] == found.tensors["b.matrix"].numpy().tobytes()

    seen.clear()
    found.read(torch.randn(7, 9))  # not of these files
    found.read(None)
    found.read(found.tensors["nothing"])
    assert not seen


def test_all_of_it_is_read_in_the_order_in_which_it_lies_and_in_pieces(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 64)
    seen = read_pieces(monkeypatch)

    WeightFiles(files).read_all()

    expected = []
    for file in files:
        first = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        expected += [(file.stat().st_ino, at) for at in range(first, file.stat().st_size)]
    assert [(file, at) for file, begin, end in seen for at in range(begin, end)] == expected
    assert max(end - begin for _, begin, end in seen) == 64


def test_a_file_that_has_become_shorter_is_an_error_and_no_crash(files: list[Path]) -> None:
    found = WeightFiles(files)
    os.truncate(files[0], files[0].stat().st_size - 8)

    with pytest.raises(OSError, match=r"1\.safetensors has become shorter"):
        found.read_all()


def test_what_is_done_to_a_weight_stays_out_of_the_file(files: list[Path]) -> None:
    before = files[0].read_bytes()

    WeightFiles(files).tensors["b.matrix"].fill_(1)

    assert files[0].read_bytes() == before


def test_a_type_that_is_not_known_is_told(tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")

    with pytest.raises(ValueError, match=r"odd\.safetensors: w is of type F4"):
        WeightFiles([file])


@pytest.mark.skipif(not can_pack(torch.float32), reason="this processor packs nothing")
def test_weights_are_asked_for_before_they_are_packed_and_in_the_order_in_which_they_lie(
    tmp_path: Path,
) -> None:
    layers = {str(number): nn.Linear(16, 16, bias=number % 2 == 0) for number in range(12)}
    model = nn.ModuleDict(layers)
    x = torch.randn(3, 16)
    expected = [one(x) for one in model.values()]
    save_file(model.state_dict(), tmp_path / "w.safetensors")  # 1, 10, 11, 2 …
    found = WeightFiles([tmp_path / "w.safetensors"])
    for tensor in found.tensors.values():
        tensor.copy_(tensor.clone())  # a page that was written is the process's own
    model.load_state_dict(found.tensors, assign=True)
    contents = {name: one.clone() for name, one in found.tensors.items()}
    for tensor in found.tensors.values():
        tensor.zero_()  # until it is read
    at = {one.data_ptr(): name for name, one in found.tensors.items()}
    asked = []

    def read(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            asked.append(tensor.data_ptr())
            tensor.data.copy_(contents[at[tensor.data_ptr()]])

    pack(model, read)

    got = [one(x) for one in model.values()]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(got, expected, strict=True))
    matrices = [one for one in asked if at[one].endswith("weight")]
    assert matrices == sorted(matrices)
    assert len(asked) == len(contents)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages")
@pytest.mark.parametrize(
    ("dtype", "parks"), [("float32", ""), ("float32", "parks"), ("bfloat16", "")]
)
def test_a_model_loads_without_touching_a_weight_that_was_not_read(
    tmp_path: Path, dtype: str, parks: str
) -> None:
    """The libraries touch a mapped file with Python's lock held. On a slow volume the passes of
    other models stood still until the whole file had come."""
    source = REPOSITORY / "models" / "demo-chat"
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    tensors = {name: one.float() for name, one in load_file(source / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # The output layer is the embedding: what is not packed is asked for once more.
    packs = dtype == "float32" and not parks and can_pack(torch.float32)
    count = len(tensors) + (1 if packs else 0)

    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path), dtype, parks, str(count)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded\n")
