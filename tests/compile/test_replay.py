from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled_training import learner, rows
from torch import Tensor

import fluxloop.compile.graphs
from fluxloop import TrainingPhase

pytestmark = pytest.mark.usefixtures("imported")


class Recording:
    def replay(self) -> None:
        results = self.compiled(*self.inputs)  # type: ignore[attr-defined]  # set when it is recorded
        for kept, new in zip(self.outputs, results, strict=True):  # type: ignore[attr-defined]  # as above
            kept.copy_(new)


def test_a_replayed_graph_gets_what_moves_and_gives_what_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    weight, queue = torch.zeros(3), torch.zeros(3)

    def compiled(*inputs: Tensor) -> list[Tensor]:
        if not hasattr(recording, "replaying") and replayed._calls > replayed.WARM_UP:
            recording.compiled, recording.inputs, recording.replaying = step, replayed._inputs, True  # type: ignore[attr-defined]  # a recording runs nothing
            recording.outputs = [torch.zeros(())]  # type: ignore[attr-defined]  # as above
            return recording.outputs  # type: ignore[attr-defined, no-any-return]  # as above
        return step(*inputs)

    def step(weight: Tensor, xs: Tensor, queue: Tensor) -> list[Tensor]:
        weight += xs
        queue += 2 * xs
        return [weight.sum().clone()]

    replayed = fluxloop.compile.replay.Replayed(compiled, num_fixed=1, changed=[1])
    given = [replayed(weight, torch.full((3,), float(number)), queue)[0] for number in range(1, 7)]
    assert [each.item() for each in given] == [3.0, 9.0, 18.0, 30.0, 45.0, 63.0]
    assert torch.equal(weight, torch.full((3,), 21.0))
    assert torch.equal(queue, torch.full((3,), 42.0))  # what moves and is changed in place is the caller's too


class Averages(TrainingPhase):
    """Keeps an average of its predictions."""

    def __init__(self) -> None:
        self.average = torch.zeros(4)

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        self.average = self.average.lerp(state.preds.detach().mean(0), 0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_replayed_graph_is_told_what_it_changes_besides_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []

    def replayed(call: Any, num_fixed: int, changed: list[int]) -> Any:
        told.append(changed)
        return call

    monkeypatch.setattr(fluxloop.compile.graphs, "can_replay", lambda inputs: True)
    monkeypatch.setattr(fluxloop.compile.graphs, "Replayed", replayed)
    for phase in (TrainingPhase(), Averages()):
        learner(data=(rows(),)).fit(1, phases=[phase])
    full, smaller, averages, averages_smaller = told
    assert full == smaller == []
    assert averages == averages_smaller == [2]  # the third of what moves: the first two are options of the optimizer


def test_a_step_is_replayed_only_where_all_of_it_is_on_the_device() -> None:
    on, off = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    assert fluxloop.compile.replay.can_replay([on, on])
    assert not fluxloop.compile.replay.can_replay([on, off])
