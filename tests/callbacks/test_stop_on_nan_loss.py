from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    BackwardEnd,
    CancelFittingException,
    CustomCallback,
    FitEnd,
    Learner,
    Metrics,
    PerOptimizerPhase,
    Recorder,
    StopOnNaNLoss,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.testing import Coefficient, EventRecorder, assert_observer, toy_learner

NAN, INF = float("nan"), float("inf")
GOOD = 3  # batches before the bad one
ADAM = partial(torch.optim.Adam, fused=False)


def batches(bad: float) -> list[tuple[Tensor, Tensor]]:
    """Five batches of eight rows; the target of one row of the fourth is `bad`."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.rand(8, 4, generator=generator), torch.rand(8, 1, generator=generator)) for _ in range(5)]
    pairs[GOOD][1][2] = bad
    return pairs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def learner_of(*callbacks: Any, bad: float = NAN, optimizer: Any = ADAM, **options: Any) -> Learner:
    return Learner(
        network(),
        nn.functional.mse_loss,
        **{"data": (batches(bad),), "default_callbacks": False, **options},
        optimizer=optimizer,
        callbacks=[Recorder(), *callbacks],
        seed=0,
    )


def by_hand(steps: int, optimizer: Any = ADAM) -> tuple[nn.Module, Any]:
    model = network()
    made = optimizer(model.parameters())
    for xs, ys in batches(0.0)[:steps]:
        loss = nn.functional.mse_loss(model(xs), ys)
        made.zero_grad()
        loss.backward()
        made.step()
    return model, made


@pytest.mark.parametrize(("bad", "number"), [(NAN, "nan"), (INF, "inf"), (-INF, "inf")])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_fit_ends_with_the_weights_of_the_last_good_step(
    bad: float, number: str, wait: bool, optimizer: Any
) -> None:
    learner = learner_of(StopOnNaNLoss(wait=wait), bad=bad, optimizer=optimizer)
    history = learner.fit(5)
    assert history.stop_reason == f"the loss became {number}"
    assert history[TrainingPhase].steps == GOOD
    assert history[TrainingPhase].updates == {None: GOOD}
    assert history[TrainingPhase].epochs == 0
    assert history.cycles == 0
    model, reference = by_hand(GOOD, optimizer)
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = learner.optimizer.state_dict()["state"], reference.state_dict()["state"]
    for index, entries in theirs.items():
        for name, tensor in entries.items():
            assert torch.equal(torch.as_tensor(ours[index][name]), torch.as_tensor(tensor)), name


def test_d_ft_13_fit_returns_and_its_end_says_why() -> None:
    reasons: list[Any] = []
    recorder = EventRecorder()
    learner = learner_of(StopOnNaNLoss(), recorder)

    class Ends(EventRecorder):
        def record(self, event: Any, phase: Any, learner: Any) -> None:
            if isinstance(event, FitEnd):
                reasons.append((event.reason, event.error))

    learner.add_callback(Ends(name="ends"))
    assert learner.fit(5) is learner.history
    assert recorder.events.count("FitEnd") == 1
    assert recorder.events[-2:] == ["BackwardBegin", "FitEnd"]
    assert reasons == [("the loss became nan", None)]


def test_it_is_a_default_callback(capsys: pytest.CaptureFixture[str]) -> None:
    assert learner_of(default_callbacks=True).fit(2).stop_reason == "the loss became nan"


def test_without_it_the_weights_are_lost() -> None:
    learner = learner_of()
    assert learner.fit(1).stop_reason is None
    assert not torch.isfinite(learner.model[2].weight).any()


def test_outside_a_fit_the_signal_reaches_the_caller() -> None:
    learner = learner_of(StopOnNaNLoss())
    with pytest.raises(CancelFittingException, match="the loss became nan"):
        learner.epoch(TrainingPhase())
    assert torch.equal(learner.model[0].weight, by_hand(GOOD)[0][0].weight)


def test_large_losses_are_fine() -> None:
    learner = learner_of(StopOnNaNLoss(), bad=1e18)
    assert learner.fit(1).stop_reason is None
    assert learner.history[TrainingPhase].steps == 5


def test_a_nan_of_the_validation_does_not_stop() -> None:
    learner = learner_of(StopOnNaNLoss(), data=(batches(0.0), batches(NAN)))
    history = learner.fit(2)
    assert history.stop_reason is None
    assert history[TrainingPhase].epochs == history[ValidationPhase].epochs == 2
    learner.evaluate(batches(NAN))


def test_a_loss_replaced_before_the_backward_is_the_one_looked_at() -> None:
    def mend(learner: Any) -> None:
        learner.step.loss = learner.step.loss.nan_to_num(0.0)

    mending = CustomCallback(mend, BackwardBegin, reads=("step.loss",), writes=("step.loss",))
    assert learner_of(StopOnNaNLoss(), mending).fit(1).stop_reason is None


# Update blocks


class InOrder(AbstractTrainingPhase):
    """One update per (name, loss factor), in order."""

    def __init__(self, *updates: tuple[str, float]) -> None:
        self.updates = updates

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            for name, factor in self.updates:
                with learner.optimizing(name) as block:
                    block.loss = factor * getattr(learner.model, name)(state.xs).mean()


def pair() -> Learner:
    return Learner(
        {"G": Coefficient(1.0), "D": Coefficient(1.0)},
        data=([torch.ones(2, 1)] * 2,),
        optimizer=partial(torch.optim.SGD, lr=0.25),
        callbacks=[Recorder(), StopOnNaNLoss()],
        default_callbacks=False,
        seed=0,
    )


@pytest.mark.parametrize(
    ("updates", "reason", "values"),
    [
        ([("D", NAN), ("G", 1.0)], "the loss of 'D' became nan", (1.0, 1.0)),
        ([("D", 1.0), ("G", INF)], "the loss of 'G' became inf", (1.0, 0.75)),
        ([("D", 1.0), ("D", 1.0), ("D", NAN), ("G", 1.0)], "the loss of 'D' became nan", (1.0, 0.5)),
        ([("D", 1.0), ("G", 1.0), ("D", NAN)], "the loss of 'D' became nan", (0.75, 0.75)),
        ([("G", 1.0), ("D", 1.0), ("G", NAN), ("D", 1.0)], "the loss of 'G' became nan", (0.75, 0.75)),
    ],
)
def test_in_blocks_the_optimizer_is_named_and_its_parameters_unharmed(
    updates: Any, reason: str, values: tuple[float, float]
) -> None:
    learner = pair()
    assert learner.fit(2, phases=[InOrder(*updates)]).stop_reason == reason
    assert (learner.model.G.value.item(), learner.model.D.value.item()) == values
    assert all(p.requires_grad for p in (learner.model.G.value, learner.model.D.value))


def test_a_single_unnamed_block_is_looked_at_as_well() -> None:
    class Block(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                with learner.optimizing() as block:
                    block.loss = nn.functional.mse_loss(learner.model(state.xs), state.ys)

    learner = learner_of(StopOnNaNLoss())
    assert learner.fit(1, phases=[Block()]).stop_reason == "the loss became nan"
    assert torch.equal(learner.model[0].weight, by_hand(GOOD)[0][0].weight)


def test_a_phase_with_a_loss_per_optimizer_is_looked_at_as_well() -> None:
    class Rates(PerOptimizerPhase):
        def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
            return nn.functional.mse_loss(state.preds, state.ys) * (NAN if name == "2" else 1.0)

    learner = learner_of(StopOnNaNLoss(), bad=0.0, optimizer={"0": torch.optim.SGD, "2": torch.optim.SGD})
    head = learner.model[2].weight.detach().clone()
    assert learner.fit(1, phases=[Rates()]).stop_reason == "the loss of '2' became nan"
    assert torch.equal(learner.model[2].weight, head)


# Phases that say nothing before their backward


class ByHand(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = nn.functional.mse_loss(learner.model(state.xs), state.ys)
            learner.optimizer.zero_grad()
            state.loss.backward()
            learner.optimizer.step()


class Numbers(AbstractTrainingPhase):
    def __init__(self, entry: str) -> None:
        self.entry = entry

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            loss = batch[1].mean().item()
            vars(state).update({"loss": loss} if self.entry == "loss" else {"losses": {"G": 1.0, "D": loss}})


def test_a_phase_without_backwardbegin_is_looked_at_when_its_step_ends() -> None:
    learner = learner_of(StopOnNaNLoss())
    assert learner.fit(2, phases=[ByHand()]).stop_reason == "the loss became nan"
    assert learner.history[ByHand].steps <= GOOD + 1
    assert learner.history[ByHand].epochs == 0


@pytest.mark.parametrize(("entry", "name"), [("loss", "the loss"), ("losses", "the loss of 'D'")])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_losses_that_are_numbers_are_looked_at_too(entry: str, name: str, bad: float) -> None:
    learner = learner_of(StopOnNaNLoss(), bad=bad)
    assert learner.fit(1, phases=[Numbers(entry)]).stop_reason == f"{name} became {bad}"


class Nothing(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (handle, _):
            handle(BackwardBegin())
            handle(BackwardEnd())


def test_a_step_without_a_loss_is_fine() -> None:
    learner = learner_of(StopOnNaNLoss())
    assert learner.fit(1, phases=[Nothing()]).stop_reason is None
    assert learner.history[Nothing].steps == 5


def test_looking_changes_nothing() -> None:
    assert_observer(StopOnNaNLoss(), toy_learner)


class ThenExplicit(TrainingPhase):
    """The block of D, then an explicit loss of G, which is `loss`."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            with learner.optimizing("D") as block:
                block.loss = learner.model.D(state.xs).square().mean()
            state.loss = learner.model.G(state.xs).square().mean() * self.loss
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update("G")


@pytest.mark.parametrize("loss", [1.0, NAN])
def test_an_explicit_loss_after_a_block_is_looked_at_before_its_update(loss: float) -> None:
    learner = Learner(
        {"D": Coefficient(1.0), "G": Coefficient(2.0)},
        data=([(torch.ones(4, 1), torch.ones(4, 1))],),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[StopOnNaNLoss()],
        default_callbacks=False,
    )
    reason = learner.fit(1, phases=[ThenExplicit(loss)]).stop_reason
    assert learner.model.D.value.item() != 1.0
    if loss == 1.0:
        assert reason is None
        assert learner.model.G.value.item() != 2.0
    else:
        assert reason == "the loss became nan"
        assert learner.model.G.value.item() == 2.0


class LossesListed(TrainingPhase):
    """Keeps a list of its own under the name ``losses``."""

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.losses = [1.0, NAN]
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            learner.update()


def test_an_entry_called_losses_that_is_a_list_is_ignored() -> None:
    learner = toy_learner(Recorder(), Metrics(), StopOnNaNLoss())
    history = learner.fit(2, phases=[LossesListed()])
    assert history.stop_reason is None
    assert history.cycles == 2
    assert list(history.metrics[LossesListed]) == ["loss"]
    assert len(history.metrics[LossesListed]["loss"]) == 2
