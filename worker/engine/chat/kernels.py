"""Builds and loads the operators of kernels.cpp, where the machine has a compiler.

Building takes 15 s on two cores, once for a machine and a version of torch; the result is kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.chat.cache import BLOCK_TOKENS

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
BUILD_TIMEOUT_S = 300.0
HEAD_SIZES = range(16, 257, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 1e-5  # of the check, in float32, for values of about one

_loading = threading.Lock()
_loaded = threading.Event()


def can_decode(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `verbatim::decode` is there, and for keys and values like these."""
    return _loaded.is_set() and device.type == "cpu" and head_size in HEAD_SIZES and dtype in DTYPES


def load(cache: Path) -> None:
    """Build what is not in `cache`, load it and check it; again does nothing.

    Raises OSError (no compiler, no room), subprocess.SubprocessError (it did not build) or
    ArithmeticError (it computes something else than the library).
    """
    if sys.platform != "linux":
        return  # OpenMP lies elsewhere, and nobody serves there
    with _loading:
        if _loaded.is_set():
            return
        torch.ops.load_library(str(_built(cache)))  # type: ignore[no-untyped-call]
        _check()
        _loaded.set()


def _built(cache: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler {compiler}")
    made_of = (SOURCE.read_text(), *FLAGS, torch.__version__, _said(compiler), _processor())
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    target = cache / f"kernels-{name}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch_home = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            command = [compiler, *FLAGS, "-I", str(torch_home / "include"), str(SOURCE)]
            command += ["-o", str(built), "-L", str(torch_home / "lib"), "-ltorch_cpu", "-lc10"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                raise subprocess.SubprocessError(
                    f"{compiler} did not build the C++ of {SOURCE.name}: {done.stderr[:400]}"
                )
            built.replace(target)
    return target


def _said(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=10, check=True
    ).stdout


def _processor() -> str:
    """What `-march=native` depends on: a state directory may move to another machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return ""


@torch.inference_mode()
def _check() -> None:
    """Raises ArithmeticError unless decoding two rows gives what the library's attention gives."""
    heads, size, blocks, end = 2, 32, 20, 7 * BLOCK_TOKENS + 3
    made = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, heads, blocks, BLOCK_TOKENS, size, generator=made)
    query = torch.randn(1, 2 * heads, 2, size, generator=made)
    key, value = torch.randn(2, 1, heads, 2, size, generator=made)
    tables = torch.stack([torch.arange(8), torch.arange(8)]).int()
    tables[1, 4:] += 8  # the first four are both rows'
    slots = tables[:, 7].long() * BLOCK_TOKENS + 2
    found = torch.empty(1, 2, 2 * heads, size)
    torch.ops.verbatim.decode(
        query, key, value, keys, values, slots, tables, torch.tensor([end, end]).int(), 4,
        size**-0.5, found,
    )  # fmt: skip
    for row, table in enumerate(tables):
        right = scaled_dot_product_attention(
            query[0, :, row : row + 1].double(),
            keys[:, table].view(heads, -1, size)[:, :end].double(),
            values[:, table].view(heads, -1, size)[:, :end].double(),
            enable_gqa=True,
        )
        off = float((right[:, 0] - found[0, row]).abs().max())
        if not off <= TOLERANCE:
            raise ArithmeticError(f"the decoding kernel is off by {off:.2g}")
