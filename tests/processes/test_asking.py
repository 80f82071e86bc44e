from __future__ import annotations

from threading import local
from typing import Any

import pytest

from fluxloop.processes import asking
from fluxloop.processes.asking import NowAndThen
from processes.pretended import Threaded, together


def test_all_hear_of_it_at_the_same_moment_and_are_not_asked_at_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = local()
    monkeypatch.setattr(asking, "monotonic", lambda: getattr(clock, "now", 0.0))

    def train(group: Threaded) -> Any:
        asks, heard = NowAndThen(group), []
        asked = []
        reduce = group.all_reduce
        group.all_reduce = lambda *given: (asked.append(step), reduce(*given))[1]  # type: ignore[method-assign]  # to count
        for step in range(1000):
            clock.now = step / 100
            if asks.any_of(group.rank == 1 and step >= 500 and not heard):
                heard.append(step)
        return heard, asked

    (first, asked), (second, also) = together(2, train)
    assert first == second
    assert 500 <= first[0] <= 700
    assert asked == also
    assert 8 <= len(asked) <= 30  # ten seconds: more often at first, then once a second


def test_at_once_asks_in_any_case() -> None:
    def train(group: Threaded) -> Any:
        asks = NowAndThen(group, seconds=1000)
        return [asks.any_of(group.rank == 0, at_once=step in (0, 50)) for step in range(100)]

    first, second = together(2, train)
    assert first == second
    assert first[0]
    assert first[50]
