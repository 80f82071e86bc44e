from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from fluxloop import CustomCallback, GarbageCollect, StepEnd, TrainingPhase
from fluxloop.testing import assert_observer, toy_learner


@pytest.mark.parametrize(("every", "collections"), [(1, 32), (4, 8), (5, 6), (16, 2), (33, 0)])
def test_garbage_is_collected_every_so_many_steps_of_any_phase(
    monkeypatch: pytest.MonkeyPatch, every: int, collections: int
) -> None:
    calls: list[int] = []
    learner = toy_learner(GarbageCollect(every=every))
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    learner.fit(1)
    assert len(calls) == collections


def test_steps_go_on_counting_from_epoch_to_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    learner = toy_learner(GarbageCollect(), num_batches=30)
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    learner.fit(10, phases=[TrainingPhase()])
    assert len(calls) == 3


@pytest.mark.slow
def test_a_cycle_is_gone_after_its_step() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    nodes: list[weakref.ref[Node]] = []

    def leave_a_cycle(learner: Any) -> None:
        nodes.append(weakref.ref(Node()))

    learner = toy_learner(GarbageCollect(every=1), CustomCallback(leave_a_cycle, StepEnd), num_batches=4)
    gc.disable()  # so that nobody else collects
    try:
        learner.fit(1, phases=[TrainingPhase()])
        assert [node() is None for node in nodes] == [True, True, True, False]
    finally:
        gc.enable()


@pytest.mark.parametrize("every", [0, -5])
def test_a_number_of_steps_below_one_is_refused(every: int) -> None:
    with pytest.raises(
        ValueError, match=rf"GarbageCollect\(every={every}\) was given; expected a whole number, 1 or more"
    ):
        GarbageCollect(every=every)


@pytest.mark.slow
def test_collecting_changes_nothing() -> None:
    assert_observer(GarbageCollect(every=25), toy_learner)
