from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop import (
    Callback,
    CancelEpochException,
    CancelFittingException,
    EpochEnd,
    Learner,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    on,
)
from fluxloop.compute.host import HostQueue
from fluxloop.testing import EventRecorder, toy_learner

CUDA, ELSEWHERE = torch.device("cuda", 0), torch.device("xla", 0)


class Remote:
    """Stands for a scalar tensor on a device; it may only be copied together with others."""

    def __init__(self, value: float, device: torch.device = CUDA) -> None:
        self.value = value
        self.device = device

    def detach(self) -> Remote:
        return self

    def reshape(self, *shape: Any) -> Remote:
        return self

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(self.value, dtype=dtype)

    def item(self) -> float:
        raise AssertionError("item() waits for the device")


class FakeEvent:
    """Stands for torch.cuda.Event: whether a copy has arrived is for the test to say."""

    made: list[FakeEvent]

    def __init__(self) -> None:
        self.recorded = self.arrived = self.waited = False
        self.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waited = self.arrived = True


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """The copies that were started, one event each."""
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return FakeEvent.made


# On the CPU


@pytest.mark.parametrize("device", [torch.device("cpu"), CUDA])
def test_a_number_on_the_cpu_is_delivered_at_once_and_exactly(device):
    queue = HostQueue(device)
    got: list[Any] = []
    for number in (torch.tensor(0.1, dtype=torch.float64), torch.tensor(2**40), torch.tensor([3.0])):
        queue.request(number, got.append)
        assert not queue.busy
    assert got == [0.1, 2**40, 3.0]


def test_a_handler_has_its_number_in_the_same_step_on_the_cpu():
    got: list[tuple[float, float]] = []

    class Look(Callback):
        reads = ("step.loss",)
        draws = False

        @on(StepEnd, TrainingPhase)
        def look(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
            learner.host(learner.step.loss, lambda number: got.append((number, learner.step.loss.item())))
            assert got

    toy_learner(Look(), num_batches=3).fit(1)
    assert len(got) == 3
    assert all(number == loss for number, loss in got)


def test_a_number_that_requires_gradients_is_delivered():
    got: list[float] = []
    HostQueue(torch.device("cpu")).request(torch.ones((), requires_grad=True), got.append)
    assert got == [1.0]


# On a device


def test_what_one_step_asks_for_travels_in_one_copy_and_waits_for_nothing(copies):
    queue = HostQueue(CUDA)
    got: list[tuple[str, float]] = []
    queue.request(Remote(1.0), lambda number: got.append(("a", number)))
    queue.request(Remote(2.0), lambda number: got.append(("b", number)))
    assert queue.busy
    assert copies == []
    queue.send()
    assert len(copies) == 1
    assert copies[0].recorded
    assert not copies[0].waited
    assert got == []
    assert queue.busy


def test_a_later_step_delivers_what_has_arrived_in_the_order_in_which_it_was_asked_for(copies):
    queue = HostQueue(CUDA)
    got: list[float] = []
    for number in (1.0, 2.0, 3.0):
        queue.request(Remote(number), got.append)
        queue.send()
    assert len(copies) == 3
    copies[1].arrived = True
    queue.send()
    assert got == [], "the first one is still on its way"
    copies[0].arrived = True
    queue.send()
    assert got == [1.0, 2.0]
    assert queue.busy
    copies[2].arrived = True
    queue.send()
    assert got == [1.0, 2.0, 3.0]
    assert not queue.busy
    assert len(copies) == 3, "without a request there is no copy"
    assert not any(copy.waited for copy in copies)


def test_flush_waits_for_everything_and_sends_what_was_not_sent(copies):
    queue = HostQueue(CUDA)
    got: list[float] = []
    queue.request(Remote(1.0), got.append)
    queue.send()
    queue.request(Remote(2.0), got.append)
    queue.flush()
    assert got == [1.0, 2.0]
    assert [copy.waited for copy in copies] == [True, True]
    assert not queue.busy


def test_drop_forgets_what_was_asked_for(copies):
    queue = HostQueue(CUDA)
    got: list[float] = []
    queue.request(Remote(1.0), got.append)
    queue.send()
    queue.request(Remote(2.0), got.append)
    queue.drop()
    assert not queue.busy
    queue.flush()
    assert got == []


def test_a_device_without_events_is_delivered_at_the_flush():
    queue = HostQueue(ELSEWHERE)
    got: list[float] = []
    queue.request(Remote(1.0, ELSEWHERE), got.append)
    queue.send()
    assert got == []
    queue.flush()
    assert got == [1.0]


def test_what_is_asked_for_while_numbers_are_delivered_is_delivered_next(copies):
    queue = HostQueue(CUDA)
    got: list[float] = []

    def again(number: float) -> None:
        got.append(number)
        if number < 3:
            queue.request(Remote(number + 1), again)

    queue.request(Remote(1.0), again)
    queue.flush()
    queue.flush()
    queue.flush()
    assert got == [1.0, 2.0, 3.0]
    assert not queue.busy


def test_a_cancel_by_one_who_gets_a_number_keeps_no_other_from_getting_theirs(copies):
    queue = HostQueue(CUDA)
    got: list[float] = []

    def cancel(number: float) -> None:
        raise CancelFittingException("enough")

    queue.request(Remote(1.0), cancel)
    queue.request(Remote(2.0), got.append)
    with pytest.raises(CancelFittingException, match="enough"):
        queue.flush()
    assert got == [2.0]
    assert not queue.busy


# In an epoch


class Ask(Callback):
    """Ask for a number on a device at the end of each training step."""

    draws = False

    def __init__(self, recorder: EventRecorder, then: Any = None) -> None:
        super().__init__()
        self.recorder = recorder
        self.then = then
        self.count = 0
        self.got: list[tuple[float, int]] = []
        """Each number, and how many training steps had ended when it came."""

    @on(StepEnd, TrainingPhase)
    def ask(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
        self.count += 1
        learner.host(Remote(float(self.count)), self.receive)

    def receive(self, number: float) -> None:
        self.got.append((number, self.recorder.trace.count(("StepEnd", "TrainingPhase"))))
        if self.then is not None:
            raise self.then

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Any, learner: Any) -> None:
        self.got.append((-1.0, 0))


def asking(then: Any = None) -> tuple[Learner, Ask, EventRecorder]:
    recorder = EventRecorder()
    ask = Ask(recorder, then)
    learner = toy_learner(ask, recorder, num_batches=3)
    learner._host_queue = HostQueue(CUDA)
    return learner, ask, recorder


def test_an_epoch_delivers_every_number_before_its_end(copies):
    learner, ask, _ = asking()
    learner.epoch(TrainingPhase())
    assert ask.got == [(1.0, 3), (2.0, 3), (3.0, 3), (-1.0, 0)]
    assert len(copies) == 3


def test_a_number_that_has_arrived_comes_at_the_end_of_the_next_step(copies, monkeypatch):
    monkeypatch.setattr(FakeEvent, "record", lambda self: setattr(self, "age", 0))

    def query(self: Any) -> bool:
        self.age += 1
        return self.age > 1

    monkeypatch.setattr(FakeEvent, "query", query)
    learner, ask, _ = asking()
    learner.epoch(TrainingPhase())
    assert ask.got == [(1.0, 2), (2.0, 3), (3.0, 3), (-1.0, 0)]


def test_a_fit_that_fails_delivers_nothing_to_the_next_one(copies):
    class Fails(Callback):
        draws = False
        left = 2

        @on(StepEnd, TrainingPhase)
        def fail(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise ValueError("broken")

    learner, ask, _ = asking()
    learner.add_callback(Fails())
    with pytest.raises(ValueError, match="broken"):
        learner.fit(1, phases=[TrainingPhase()])
    assert ask.got == []
    learner.fit(1, phases=[TrainingPhase()])
    assert [number for number, _ in ask.got] == [3.0, 4.0, 5.0, -1.0]


@pytest.mark.parametrize("fails", [False, True], ids=["evaluates", "evaluates and fails"])
def test_numbers_of_the_training_come_in_the_training_although_a_handler_evaluates_meanwhile(copies, fails):
    class AskAndEvaluate(UnsafeCallback):
        def __init__(self) -> None:
            super().__init__()
            self.got: list[tuple[float, bool]] = []

        @on(StepEnd, TrainingPhase)
        def ask(self, event: StepEnd, phase: TrainingPhase, learner: Learner) -> None:
            history = learner.history
            learner.host(Remote(1.0), lambda number: self.got.append((number, learner.history is history)))
            try:
                learner.evaluate([(None, None)] if fails else None)
            except TypeError:
                assert fails

    ask = AskAndEvaluate()
    learner = toy_learner(ask, num_batches=2)
    learner._host_queue = HostQueue(CUDA)
    learner.epoch(TrainingPhase())
    assert ask.got == [(1.0, True)] * 2


def test_who_gets_a_number_may_end_the_fit(copies):
    learner, _, recorder = asking(CancelFittingException("the loss became nan"))
    assert learner.fit(2).stop_reason == "the loss became nan"
    assert recorder.events[-2:] == ["StepEnd", "FitEnd"]
    assert learner.scope is None


def test_who_gets_a_number_may_end_the_epoch_which_still_ends_once(copies):
    learner, _, recorder = asking(CancelEpochException())
    learner.fit(1, phases=[TrainingPhase()])
    assert recorder.events[-3:] == ["EpochEnd", "CycleEnd", "FitEnd"]
    assert recorder.events.count("EpochEnd") == 1
