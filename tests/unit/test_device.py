"""The engine's device: threads that compute alone leave the others what they have."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from worker.engine.device import compute_alone
from worker.engine.residents import _Coming

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="torch's OpenMP"
)


def on_a_thread(work: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_thread_that_computes_alone_starts_no_helpers_and_changes_no_other(
    two_threads: None,
) -> None:
    """With three helpers on two processors OpenMP let none of them wait actively, and chat passes
    beside a load took longer for as long as it lasted."""
    large = torch.ones(2000, 2000)

    def helpers() -> int:
        before = set(os.listdir("/proc/self/task"))
        large.add(1)
        return len(set(os.listdir("/proc/self/task")) - before)

    def alone() -> None:
        compute_alone()
        assert torch.get_num_threads() == 1
        assert helpers() == 0

    def as_before() -> None:
        assert torch.get_num_threads() == 2
        assert helpers() == 1

    helpers()
    on_a_thread(as_before)
    on_a_thread(alone)
    on_a_thread(as_before)
    assert torch.get_num_threads() == 2


def test_a_model_is_loaded_by_a_thread_that_computes_alone(two_threads: None) -> None:
    coming, woken = _Coming("m", 0.0), threading.Event()

    on_a_thread(lambda: coming.run(torch.get_num_threads, woken.set))

    assert woken.is_set()
    assert coming.model == 1
    assert torch.get_num_threads() == 2
