"""What the tests of compiled steps get: graphs that run as they were traced, in no time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from compiled_training import WITH_COMPILER

import fluxloop.compile.graphs


@pytest.fixture(scope="module")
def imported() -> None:
    """Import what tracing needs, and keep it out of each later look through the process's objects."""
    import torch._inductor
    import torch.fx.experimental.proxy_tensor  # noqa: F401 - takes seconds

    gc.collect()  # what is garbage now would stay for ever
    gc.freeze()


@pytest.fixture(scope="module")
def all_known() -> Iterator[None]:
    """Have the garbage collector know all objects again: generators of a module's own were there before it froze."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the graphs as they were traced, without a compiler: the same operations, in no time.

    Without gradients, as a compiled graph is run. With the compiler, where it was asked for, operations
    draw random numbers as they do in eager steps.
    """
    if WITH_COMPILER:
        from torch._inductor import config

        with config.patch(fallback_random=True):
            yield
    else:
        monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
        yield


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the graphs as they were traced in any case: what is tested is the trace."""
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
