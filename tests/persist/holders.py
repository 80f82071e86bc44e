"""Small classes for the tests of what is kept of an object."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy
import torch

from fluxloop.persist.owners import nobody
from fluxloop.persist.watched import Watched


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return bool(a == b)


class Opaque:
    __slots__ = ()


class Own:
    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


class Mine:
    transient: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(self) -> None:
        self.every = 3
        self.n = 0
        self.items: list[int] = []
        self.table = numpy.zeros(2)
        self.total = torch.zeros(2)
        self.file: Any = 0
        self.thing: Any = Opaque()
        self.generator = torch.Generator().manual_seed(1)


def states(kept: Watched) -> dict[str, Any]:
    state, lost = kept.state(nobody)
    assert lost == []
    return dict(state or {})


class Pool:
    """Has the pair."""

    def __init__(self) -> None:
        self.items: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"items": self.items}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.items = state["items"]
