from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from attrs import define

from fluxloop.persist.seen import Same, seen


@define
class Point:
    x: float


class Calls:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("thing", "change"),
    [
        ([1, [2.0]], lambda thing: thing[1].append(3)),
        ({"a": {"b": 1}}, lambda thing: thing["a"].update(b=2)),
        ({1, 2}, lambda thing: thing.add(3)),
        (SimpleNamespace(value=1), lambda thing: setattr(thing, "value", 2)),
        (Point(1.0), lambda thing: setattr(thing, "x", 2.0)),
        (partial(int, base=2), lambda thing: thing.keywords.update(base=8)),
        (Calls(3), lambda thing: setattr(thing, "size", 4)),
        (Calls(3).__call__, lambda thing: setattr(thing.__self__, "size", 4)),
        (numpy.zeros(3), lambda thing: thing.fill(1)),
    ],
    ids=["list", "dict", "set", "object", "attrs", "partial", "called", "method", "array"],
)
def test_a_change_is_seen_and_no_change_is_none(thing: Any, change: Any) -> None:
    before = seen(thing)
    assert seen(thing) == before
    change(thing)
    assert seen(thing) != before


def test_numbers_of_different_types_differ_and_nan_is_nan() -> None:
    assert seen(1) != seen(True)
    assert seen(1.0) != seen(1)
    assert seen(float("nan")) == seen(float("nan"))


def test_tensors_and_functions_are_told_apart_by_who_they_are() -> None:
    tensor = torch.zeros(2)
    assert seen(tensor) == seen(tensor)
    assert seen(tensor) != seen(torch.zeros(2))
    assert seen(len) != seen(max)
    assert len({Same(tensor), Same(tensor), Same(torch.zeros(2))}) == 2


def test_what_contains_itself_comes_to_an_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert seen(loop) == seen(loop)
