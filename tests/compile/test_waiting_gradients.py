from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import ADAM, SGD, WITH_COMPILER, Every, both, full, gradients, graphs, learner, rows, weights
from torch import Tensor, nn

from fluxloop import (
    AbstractTrainingPhase,
    CancelStepException,
    CompileError,
    GradientClip,
    LossError,
    TrainingPhase,
    runepoch,
)
from fluxloop.testing import assert_resumes_exactly

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(torch.optim.SGD, lr=0.1)], ids=["SGD", "Adam", "plain SGD"])
def test_gradients_are_added_up_over_compiled_steps_and_used_by_a_later_one(optimizer: Any) -> None:
    # three batches an epoch, the last of them smaller, so that windows end in any of them and span epochs
    eager, made = both(8, lambda: [Every(4)], lambda: [GradientClip(0.1)], optimizer=optimizer, tolerance=1e-5)
    assert made.history[Every].updates == eager.history[Every].updates == {None: 6}
    assert graphs(made, Every) == 6  # begins, adds, updates: of full batches and of smaller ones
    made.fit(1, phases=[Every(4)])
    eager.fit(1, phases=[Every(4)])
    for a, b in zip(gradients(eager), gradients(made), strict=True):
        assert a is not None  # three batches wait
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_added_up_in_graphs_of_inductor_too() -> None:
    _, made = both(5, lambda: [Every(2)], data=(full(),), optimizer=ADAM, tolerance=1e-5)
    assert made.history[Every].updates == {None: 5}


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_window_that_is_open_resumes_to_the_bit_in_compiled_steps() -> None:
    make = lambda: learner(optimizer=ADAM, data=(rows(),))  # noqa: E731
    at = None if WITH_COMPILER else (1, 3, 7)  # one batch waits, three at the end of an epoch, three of a later window
    assert_resumes_exactly(make, epochs=3, phases=lambda: [Every(4)], at=at)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_what_waits_at_the_end_of_an_epoch_can_be_used_outside_of_a_step() -> None:
    class Flushed(Every):
        def epoch(self, learner: Any, data: Any) -> None:
            with runepoch(learner, self):
                for batch in data:
                    self.step(learner, batch)
                if self.batches % self.every:
                    learner.update()

    eager, made = both(3, lambda: [Flushed(2)], tolerance=1e-5)
    assert made.history[Flushed].updates == eager.history[Flushed].updates


class Halves(Every):
    """Adds up the gradients of the halves of a batch in one step."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        xs, ys = state.xs, state.ys
        for state.xs, state.ys in zip(xs.chunk(2), ys.chunk(2), strict=True):
            learner.backward(self.loss(learner, state) / (2 * self.every))
        state.xs, state.ys = xs, ys
        if self.updates:
            learner.update()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_of_parts_of_a_batch_are_added_up_in_one_graph(every: int) -> None:
    both(4, lambda: [Halves(every)], tolerance=1e-5)


class TurnByTurn(AbstractTrainingPhase):
    """Two optimizers whose windows are open at different times."""

    def __init__(self) -> None:
        self.batches, self.first, self.second = 0, False, False

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for name, updates in (("a", self.first), ("b", self.second)):
            with learner.optimizing(name) as block:
                learner.backward(learner.models[name](state.xs).square().mean())
                if updates:
                    learner.update()
            assert block.loss is None

    def finish(self, learner: Any, state: Any) -> None:
        self.batches += 1
        self.first, self.second = self.batches % 2 == 1, self.batches % 3 == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_each_optimizer_has_a_window_of_its_own_in_compiled_steps() -> None:
    model = lambda: {"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)}  # noqa: E731
    eager, made = both(5, lambda: [TurnByTurn()], model=model, loss_fn=None, data=(rows(),), tolerance=1e-5)
    assert made.history[TurnByTurn].updates == eager.history[TurnByTurn].updates == {"a": 7, "b": 5}
    assert len(made.updates.slots[0].waiting) == 2
    assert made.updates.slots[0].in_block


class Same(Every):
    """Its two parameters have one gradient, which is an entry of the batch."""

    def loss(self, learner: Any, state: Any) -> Tensor:
        first, second = learner.model.parameters()
        return ((first + second) * state.xs).sum()

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        learner.backward(self.loss(learner, state))
        if self.updates:
            learner.update()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_gradients_that_wait_share_no_memory(compiler: str, request: pytest.FixtureRequest) -> None:
    if compiler == "none":
        request.getfixturevalue("plain")
    data = [(torch.randn(4, generator=torch.Generator().manual_seed(n)), torch.zeros(1)) for n in range(4)]
    before = [xs.clone() for xs, _ in data]
    model = lambda: nn.ParameterList([torch.zeros(4), torch.zeros(4)])  # noqa: E731
    _, made = both(2, lambda: [Same(5)], model=model, data=(data,))
    assert all(torch.equal(xs, old) for (xs, _), old in zip(data, before, strict=True))
    a, b = gradients(made)
    assert a is not None
    assert b is not None
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_loss_that_is_not_finite_leaves_gradients_that_waited_as_they_are() -> None:
    xs, ys = rows()
    batches = [(xs[:8], ys[:8]), (xs[8:16], ys[8:16]), (xs[16:24] * float("nan"), ys[16:24])]
    found = []
    for compile in (False, "step"):
        made = learner(compile, data=(batches,))
        history = made.fit(1, phases=[Every(5)])
        assert history.stop_reason == "the loss became nan in Every(every=5), epoch 1, step 3 of the run"
        found.append(gradients(made))
    for a, b in zip(*found, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_gradient_that_is_new_in_a_step_whose_loss_is_not_finite_is_not_kept() -> None:
    class InTurn(Every):
        def loss(self, learner: Any, state: Any) -> Tensor:
            part = learner.model[0] if self.batches < 2 else learner.model[1]
            found: Tensor = part(state.xs).square().mean()
            return found

    xs = rows()[0]
    batches = [(xs[:8], 0), (xs[8:16], 0), (xs[16:24] * float("nan"), 0)]
    made = learner(data=(batches,), model=lambda: nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 2)]))
    assert (
        made.fit(1, phases=[InTurn(9)]).stop_reason
        == "the loss became nan in InTurn(every=9), epoch 1, step 3 of the run"
    )
    first, second = gradients(made)[0], gradients(made)[2]
    assert first is not None
    assert first.isfinite().all()
    assert second is None or not second.any()


@pytest.mark.usefixtures("plain")
def test_a_loss_of_nobody_knows_whom_is_the_same_error_with_and_without_a_graph() -> None:
    class Both(TurnByTurn):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            loss = learner.models["a"](state.xs).square().mean()
            if self.batches == 0:
                learner.backward(loss)
                return
            with learner.optimizing("a") as block:
                block.loss = loss

    for compile in (False, "step"):
        made = learner(compile, model=lambda: {"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)}, loss_fn=None)
        with pytest.raises(LossError, match="the block of optimizer 'a' would add to gradients"):
            made.fit(1, phases=[Both()])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_cancelled_step_takes_only_its_own_gradients_with_it() -> None:
    class CancelsAt(Every):
        def __init__(self, number: int) -> None:
            super().__init__(3)
            self.number = number

        def finish(self, learner: Any, state: Any) -> None:
            super().finish(learner, state)
            if self.batches == self.number:
                raise CancelStepException

    for number in (4, 5, 6):  # that begins, adds, updates
        both(3, lambda: [CancelsAt(number)], tolerance=1e-5)  # noqa: B023 - called at once


class Cancels(Every):
    """Cancels batches when the body has run."""

    def __init__(self, every: int, cancelled: tuple[int, ...]) -> None:
        super().__init__(every)
        self.cancelled = cancelled
        self.number = 0

    def finish(self, learner: Any, state: Any) -> None:
        self.number += 1
        if self.number in self.cancelled:
            raise CancelStepException
        super().finish(learner, state)


@pytest.mark.slow
@pytest.mark.parametrize("cancelled", [(4,), (5,), (4, 5)])
@pytest.mark.usefixtures("plain")
def test_gradients_of_a_compiled_step_that_is_cancelled_never_count(cancelled: tuple[int, ...]) -> None:
    xs, ys = rows()
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 64, 8)]
    both(1, lambda: [Cancels(3, cancelled)], data=(batches,))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_wait_are_dropped_where_another_compiled_phase_begins() -> None:
    class Other(TrainingPhase):
        pass

    xs, ys = rows()
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 40, 8)]
    found = []
    for compile in (False, "step"):
        made = learner(compile, data=(batches,))
        with pytest.warns(UserWarning, match="gradients of 2 batches of Every still wait"):
            made.fit(1, phases=[Every(3), Other()])
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class ByHand(Every):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if self.every == 1:
            learner.optimizer.zero_grad()
        (self.loss(learner, state) / self.every).backward()
        if self.updates:
            learner.optimizer.step()
            if self.every > 1:
                learner.optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_computed_by_hand_are_used_in_their_step_or_refused() -> None:
    _, made = both(2, lambda: [ByHand(1)], tolerance=1e-5)
    assert graphs(made, ByHand) == 2  # of full batches and of smaller ones
    with (
        pytest.warns(UserWarning, match="had a gradient that learner.backward did not compute"),
        pytest.raises(CompileError, match="by hand, and leaves them for a later step"),
    ):
        learner().fit(2, phases=[ByHand(3)])


class NeverZeroed(Every):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        self.loss(learner, state).backward()
        learner.optimizer.step()


class ZeroedAtTimes(Every):
    """Drops the gradients of the step before in two steps, and adds to them in the third."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if not self.updates:
            learner.optimizer.zero_grad()
        self.loss(learner, state).backward()
        learner.optimizer.step()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_step_by_hand_that_adds_to_gradients_after_others_have_dropped_them_is_refused() -> None:
    with pytest.raises(CompileError, match=r"adds to gradients that a step before it computed by hand.*zero_grad"):
        learner().fit(2, phases=[ZeroedAtTimes(4)])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_steps_by_hand_add_to_without_end_are_added_to_in_no_graph() -> None:
    with pytest.warns(UserWarning, match="had a gradient that learner.backward did not compute.*the step added to it"):
        _, made = both(2, lambda: [NeverZeroed(1)])
    assert graphs(made, NeverZeroed) == 0


class AsEver(TrainingPhase):
    compiled = False


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_somebody_computes_after_an_update_are_released() -> None:
    found = []
    for compile in (False, "step"):
        made = learner(compile)
        made.fit(2)
        made.loss_fn(made.model(rows()[0]), rows()[1]).backward()
        assert made.state_dict()["updates"]["gradients"] == {}
        made.fit(1, phases=[AsEver()])
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


class Dropping(Every):
    """Drops what waits in every second batch."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if self.updates:
            learner.optimizer.zero_grad()
        else:
            learner.backward(self.loss(learner, state))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_waited_and_were_dropped_are_gone() -> None:
    eager, made = both(2, lambda: [Dropping(2)])
    assert gradients(eager) == gradients(made) == [None] * 4
