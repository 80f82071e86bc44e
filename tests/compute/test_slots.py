from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    BackwardEnd,
    Callback,
    CancelStepException,
    Checkpointer,
    Learner,
    Recorder,
    StepEnd,
    TrainingPhase,
    UpdateBegin,
    on,
    runstep,
)
from small_models import (
    SGD,
)

# Gradients of several batches


class InWindows(TrainingPhase):
    """Updates after every `window` batches that were not cancelled; those of the numbers `vetoed` are, at `where`."""

    def __init__(self, window: int, vetoed: tuple[int, ...] = (), name: str | None = None, block: bool = False) -> None:
        super().__init__(name=name)
        self.window, self.vetoed, self.block = window, vetoed, block
        self.number = self.waiting = 0

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (handle, state):
            self.number += 1
            with learner.optimizing("G" if "G" in learner.models else None) if self.block else nullcontext():
                self.add_up(learner, handle, state)

    def add_up(self, learner: Learner, handle: Any, state: Any) -> None:
        model = learner.model.G if "G" in learner.models else learner.model
        for part in (state.xs * 0.25, state.xs * 0.75):
            learner.backward(model(part).sum())
        handle(BackwardEnd())
        if self.number in self.vetoed:
            raise CancelStepException
        self.waiting += 1
        if self.waiting == self.window:
            learner.update()
            self.waiting = 0


GRADIENTS = (4.0, 40.0, 400.0, 4000.0, 40000.0, 400000.0)


def summing(*callbacks: Any, several: bool = False, **options: Any) -> Learner:
    def zero() -> nn.Linear:
        linear = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    model: Any = {"G": zero(), "D": zero()} if several else zero()
    defaults = {"optimizer": partial(torch.optim.SGD, lr=1.0), "default_callbacks": False, "seed": 0}
    data = ([torch.tensor([[value]]) for value in GRADIENTS],)
    return Learner(model, callbacks=callbacks, **{"data": data, **defaults, **options})


def total(learner: Learner) -> float:
    return -learner.updates.slots[0].parameters[0].item()


@pytest.mark.slow(quick=13)
@pytest.mark.parametrize("vetoed", [(), (1,), (2,), (3,), (1, 2), (2, 3), (1, 3)])
@pytest.mark.parametrize(("block", "several"), [(False, False), (True, False), (True, True)])
def test_the_gradients_of_a_cancelled_batch_never_count(vetoed: tuple[int, ...], block: bool, several: bool) -> None:
    learner = summing(several=several)
    learner.fit(1, phases=[InWindows(3, vetoed, block=block)])
    counted = [gradient for number, gradient in enumerate(GRADIENTS, 1) if number not in vetoed]
    assert total(learner) == sum(counted[: len(counted) // 3 * 3])


@pytest.mark.parametrize("event", [BackwardEnd, UpdateBegin, StepEnd])
def test_a_callback_that_cancels_a_batch_takes_its_gradients_back(event: Any) -> None:
    class Veto(Callback):
        reads = ("step.xs",)

        @on(event)
        def veto(self, event: Any, phase: Any, learner: Any) -> None:
            if learner.step.xs.item() == 400.0:
                raise CancelStepException

    learner = summing(Veto())
    learner.fit(1, phases=[InWindows(3)])
    if event is BackwardEnd:
        assert total(learner) == 4.0 + 40.0 + 4000.0
    elif event is UpdateBegin:  # the two before it wait for the next one, whose number is not three
        assert total(learner) == 0.0
        assert learner.updates.slots[0].waiting[0].grad.item() == 444044.0  # type: ignore[union-attr]  # it waits
    else:  # the update has been made
        assert total(learner) == 444.0 + 444000.0


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
def test_gradients_that_are_added_up_have_the_bits_of_pytorchs_own() -> None:
    class Sum(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch) as (_, state):
                learner.backward(learner.model(state.xs).square().mean())
                self.count += 1
                if self.count % 4 == 0:
                    learner.update()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1)
    )
    model[2].register_parameter("unused", nn.Parameter(torch.ones(2)))
    hand = copy.deepcopy(model)
    seen: list[list[Tensor]] = [[], []]
    for each, found in zip((model, hand), seen, strict=True):
        each[4].weight.register_post_accumulate_grad_hook(lambda p, found=found: found.append(p.grad.clone()))
    batches = [torch.randint(50, (7, 3), generator=torch.Generator().manual_seed(n)) for n in range(12)]
    learner = Learner(model, data=(batches,), optimizer=SGD, default_callbacks=False)
    learner.fit(1, phases=[Sum()])
    optimizer = SGD(hand.parameters())
    for number, batch in enumerate(batches, 1):
        hand(batch).square().mean().backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_waiting_gradients_are_dropped_and_told_where_a_fit_begins() -> None:
    learner = summing()
    learner.fit(1, phases=[InWindows(4)])
    assert total(learner) == 4444.0
    with pytest.warns(UserWarning, match="gradients of 2 batches of InWindows .* a fit begins: they are dropped"):
        learner.fit(1, phases=[InWindows(4)])
    assert total(learner) == 2 * 4444.0


@pytest.mark.parametrize("loop", ["cycle", "epochs", "steps"])
def test_waiting_gradients_are_dropped_and_told_where_another_phase_computes_its_own(loop: str) -> None:
    learner, first, second = summing(), InWindows(4, name="first"), InWindows(6, name="second")

    def run() -> None:
        if loop == "cycle":
            learner.fit(1, phases=[first, second])
        for phase in (first, second):
            if loop == "epochs":
                learner.epoch(phase)
            elif loop == "steps":
                for batch in learner.data.training:
                    phase.step(learner, batch)

    with pytest.warns(UserWarning, match="gradients of 2 batches of first still wait .* second computes its own"):
        run()
    assert total(learner) == 4444.0 + sum(GRADIENTS)


def test_waiting_gradients_go_on_waiting_over_epochs_of_one_phase_and_of_others_with_other_optimizers() -> None:
    class OfD(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch) as (_, state), learner.optimizing("D") as block:
                block.loss = learner.model.D(state.xs).sum()

    learner, phase = summing(several=True), InWindows(4, block=True)
    learner.epoch(phase)
    learner.epoch(OfD())
    learner.epoch(phase)
    learner.epoch(phase)
    assert total(learner) == 3 * sum(GRADIENTS) - sum(GRADIENTS[4:])  # four updates of four, two wait


def test_a_resumed_fit_goes_on_with_the_gradients_that_wait(tmp_path: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(OSError, match="killed"):
        summing(Recorder(), Checkpointer(run, unit="step")).fit(2, phases=[Killed(4, at=8)], resume=run)
    learner = summing(Recorder(), Checkpointer(run, unit="step"))
    learner.fit(2, phases=[Killed(4, at=0)], resume=run)
    expected = summing()
    expected.fit(2, phases=[Killed(4, at=0)])
    assert total(learner) == total(expected) == 2 * 444444.0


class Killed(InWindows):
    """Raises an error in a step."""

    transient = ("at",)

    def __init__(self, window: int, at: int) -> None:
        super().__init__(window)
        self.at = at

    def add_up(self, learner: Learner, handle: Any, state: Any) -> None:
        if self.number == self.at:
            raise OSError("killed")
        super().add_up(learner, handle, state)
