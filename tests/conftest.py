"""What every test gets: one thread, seeded generators, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import pytest
import torch

from fluxloop import seed_everything


@pytest.fixture(autouse=True)
def clean_surroundings() -> Iterator[None]:
    torch.set_num_threads(1)
    seed_everything(0)
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    assert torch.is_grad_enabled(), "a test left gradients off"
    assert signal.getsignal(signal.SIGINT) is interrupt, "a test left a signal handler"
    assert not multiprocessing.active_children(), "a test left a process"
