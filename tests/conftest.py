"""What every test gets: one thread, seeded generators, and nothing left behind; and which tests are slow."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fluxloop.randomness import start_generators


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among the thousands of tests, while they are found and from then on.

    They are found in two thirds of the time, and each gc.collect() in a test has less to look through.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the mark from the first cases of a test that is marked ``@pytest.mark.slow(quick=2)``."""
    seen: Counter[str] = Counter()
    for item in items:
        for mark in item.iter_markers("slow"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] <= mark.kwargs.get("quick", 0):
                item.own_markers.remove(mark)
            break


@pytest.fixture(autouse=True)
def clean_surroundings() -> Iterator[None]:
    torch.set_num_threads(1)
    start_generators(0)  # as seed_everything, which notes a traceback for each GPU to come, as torch does: 0.8 ms
    interrupt = signal.getsignal(signal.SIGINT)
    bits = np.random.get_bit_generator()
    yield
    assert torch.is_grad_enabled(), "a test left gradients off"
    assert signal.getsignal(signal.SIGINT) is interrupt, "a test left a signal handler"
    assert np.random.get_bit_generator() is bits, "a test left another bit generator to NumPy"
    for child in multiprocessing.active_children():
        child.join(5)  # a worker that its loader has told to terminate is there for a moment more
    assert not multiprocessing.active_children(), "a test left a process"
