from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from fluxloop.persist.arguments import LONGEST, arguments_of, changed


def rate(step: int, total: int = 5, *, floor: float = 0.1) -> float:
    return max(floor, 1 - step / total)


def closing(total: int, name: str = "run-1") -> Callable[[int], float]:
    return lambda step: 1 - step / total + len(name)


class Schedule:
    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, step: int) -> float:
        return 1 - step / self.total

    def method(self, step: int, floor: float = 0.2) -> float:
        return floor


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (rate, {"f": "rate", "f.total": 5, "f.floor": 0.1}),
        (partial(rate, total=8), {"f": "rate", "f.floor": 0.1, "f.total": 8}),
        (partial(rate, 3, 8), {"f": "rate", "f.step": 3, "f.total": 8, "f.floor": 0.1}),
        (partial(partial(rate, total=8), total=9), {"f": "rate", "f.floor": 0.1, "f.total": 9}),
        (partial(rate, total=numpy.int64(8)), {"f": "rate", "f.floor": 0.1, "f.total": 8}),
        (partial(rate, total=torch.tensor(8)), {"f": "rate", "f.floor": 0.1, "f.total": 8}),
        (closing(8), {"f": "<lambda>", "f.total": 8}),
        (Schedule(8), {"f": "Schedule", "f.total": 8}),
        (Schedule(8).method, {"f": "method", "f.floor": 0.2}),
        (
            [closing(8), partial(rate, total=9)],
            {"f[0]": "<lambda>", "f[0].total": 8, "f[1]": "rate", "f[1].floor": 0.1},
        ),
        (partial(rate, total={"a": 3}), {"f.total['a']": 3}),
        (partial(rate, total="name"), {"f.total": "name"}),
        (Schedule, {"f": "Schedule"}),
        (max, {"f": "builtin_function_or_method"}),
        (nn.Linear(1, 1), {}),
        (list(range(LONGEST + 1)), {}),
    ],
)
def test_what_a_function_was_made_with_is_found(value: Any, expected: dict[str, Any]) -> None:
    found = arguments_of(value, "f")
    assert expected.items() <= found.items()
    assert bool(found) is bool(expected)


def test_texts_that_a_function_closes_over_are_no_arguments() -> None:
    assert arguments_of(closing(8, "run-1"), "f") == arguments_of(closing(8, "run-2"), "f")


def test_functions_that_hold_each_other_end() -> None:
    def first(step: int) -> float:
        return second(step)

    def second(step: int) -> float:
        return first(step)

    assert arguments_of(first, "f") == {"f": "first", "f.second": "second"}


def test_what_changed_is_told_with_both_values() -> None:
    before = arguments_of(partial(rate, total=8), "f")
    assert changed(before, arguments_of(partial(rate, total=8), "f")) == []
    assert changed(before, arguments_of(partial(rate, total=80), "f")) == ["f.total=8, now f.total=80"]
    assert changed(before, arguments_of(closing(8), "f")) == ["f='rate', now f='<lambda>'"]
    assert changed({}, before) == []  # an older file says nothing of functions
