"""The torch device of an engine, and what its errors mean."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from worker.errors import ConfigError, DiskFull, OutOfDeviceMemory, WorkerError

log = logging.getLogger(__name__)

# Exit status after an error that leaves the process without a usable device; the supervisor
# starts a new one. 70 is EX_SOFTWARE of sysexits.h.
EXIT_DEVICE_LOST = 70


def open_device(wanted: str, threads: int) -> torch.device:
    """The device of a profile's [daemon] table.

    wanted: auto | cpu | cuda; threads: CPU threads of torch, 0 for torch's own choice.
    Raises ConfigError for "cuda" on a machine without a usable card.
    """
    if threads:
        torch.set_num_threads(threads)
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError('[daemon] device is "cuda" and torch finds no usable NVIDIA card')
    on_card = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_card else "cpu")


def compute_alone() -> None:
    """Have torch compute in this thread without helpers, and in all others as before.

    Each thread that computes has helpers of its own. OpenMP lets none of them wait actively once
    there are more than processors, and the passes of the other threads then take longer.
    """
    torch.get_num_threads()  # gives a new thread its number, which would come after ours otherwise
    # torch.set_num_threads would change what later threads have. Where torch does not use this
    # OpenMP, the thread keeps its helpers, which costs some time and nothing else.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_set_num_threads(1)


def release_cache(device: torch.device) -> None:
    """Give memory that nothing uses back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def translated() -> Iterator[None]:
    """Turn what libraries raise into WorkerErrors, so that one request fails alone.

    The traceback is logged and dropped here, because a live one keeps tensors alive. A device
    that is lost for good ends the process: no later request could succeed.
    """
    problem: WorkerError | None = None
    try:
        yield
        return
    except WorkerError:
        raise
    except torch.OutOfMemoryError as exc:
        log.error("out of device memory: %s", exc)
        problem = OutOfDeviceMemory("the device ran out of memory on this request", retry_after_s=5)
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            log.error("no room for the files of this request: %s", exc)
            raise DiskFull("there is no room for the files of this job", retry_after_s=10) from None
        log.exception("unexpected error in the engine")
        if is_fatal(exc):
            log.critical("the device is lost; this process ends so that a new one can start")
            logging.shutdown()
            os._exit(EXIT_DEVICE_LOST)
        problem = WorkerError("unexpected error in the engine; its log has the details")
    raise problem


def is_fatal(exc: BaseException) -> bool:
    """Whether the CUDA context is gone: after such an error every later call fails too."""
    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(exc, accelerator_error) or (
        isinstance(exc, RuntimeError) and "CUDA error" in str(exc)
    )
