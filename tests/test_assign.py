"""What is assigned to a learner takes effect, or is refused with what to type."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import SGD

from fluxloop import (
    Accelerator,
    AssignmentError,
    Callback,
    DataError,
    EpochEnd,
    Learner,
    LossError,
    OptimizerError,
    StepEnd,
    TrainingPhase,
    on,
)

CPU = Accelerator("cpu")
XS = torch.rand(16, 4, generator=torch.Generator().manual_seed(0))
DATA = (XS, XS.sum(1, keepdim=True))


def make(**options: Any) -> Learner:
    torch.manual_seed(0)
    given = {"data": (DATA,), "optimizer": partial(SGD, lr=0.1), "default_callbacks": False, "seed": 0, **options}
    return Learner(nn.Linear(4, 1), mse_loss, accelerator=CPU, **given)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", nn.Linear(4, 1), ["learner.model.head = ...", "load_weights", "Learner(learner.model, ...)"]),
        ("models", {}, ["learner.model.head = ..."]),
        ("optimizer", SGD(nn.Linear(4, 1).parameters(), lr=0.1), ["set_hyperparameter(learner", "add_param_group"]),
        ("accelerator", CPU.__class__("cpu"), ["Learner(..., accelerator=Accelerator('cpu'))"]),
        ("callbacks", [], ["learner.set_callbacks([...])"]),
        ("seed", 3, ["Learner(..., seed=1)"]),
        ("params", (), ["parameter.copy_"]),
        ("weights", {}, ["load_state_dict"]),
        ("history", None, ["a new learner"]),
        ("cbstate", None, ["learner.cbstate.name = value"]),
        ("batch_size", 64, ["TensorBatches(xs, ys, batch_size=64)"]),
        ("optmizer", 1, ["no attribute 'optmizer'", "did you mean 'optimizer'?", "learner._optmizer"]),
        ("lossfn", l1_loss, ["did you mean 'loss_fn'?"]),
        ("zzzz", 1, ["no attribute 'zzzz'", "subclass of Learner"]),
    ],
)
def test_what_would_have_no_effect_is_refused_with_what_to_type(name: str, value: Any, words: list[str]) -> None:
    learner = make()
    before = dict(vars(learner))
    with pytest.raises(AssignmentError) as caught:
        setattr(learner, name, value)
    assert isinstance(caught.value, AttributeError)
    missing = [word for word in (f"learner.{name} was assigned", *words) if word not in str(caught.value)]
    assert not missing, f"the message says nothing of {missing}: {caught.value}"
    assert vars(learner) == before


def test_what_is_there_already_may_be_assigned_again() -> None:
    learner = make()
    for name in ("model", "optimizer", "callbacks", "seed", "history", "data", "loss_fn"):
        setattr(learner, name, getattr(learner, name))
    learner.fit(1)


def test_private_names_and_subclasses_may_keep_what_they_like() -> None:
    class Mine(Learner[Any]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.temperature = 0.5

    learner = make()
    learner._note = "mine"
    mine = Mine(nn.Linear(4, 1), mse_loss, data=(DATA,), default_callbacks=False)
    mine.rounds = 3
    assert (learner._note, mine.temperature, mine.rounds) == ("mine", 0.5, 3)
    with pytest.raises(AssignmentError, match="callbacks"):
        mine.callbacks = []


def test_a_copied_learner_refuses_the_same_and_trains() -> None:
    learner = make()
    for other in (copy.deepcopy(learner), copy.copy(learner)):
        with pytest.raises(AssignmentError, match="did you mean 'optimizer'"):
            other.optmizer = 1
        other.fit(1)


def test_data_that_is_assigned_between_fits_is_loaded_and_used() -> None:
    learner, other = make(), make(data=((XS[:8], DATA[1][:8]),))
    learner.data = ((XS[:8], DATA[1][:8]),)
    learner.fit(2)
    other.fit(2)
    assert torch.equal(learner.model.weight, other.model.weight)
    with pytest.raises(DataError, match="3 was given as data"):
        learner.data = 3
    learner.fit(1)


class Assigns(Callback):
    """Assigns something to the learner in a fit."""

    reads = ("*",)
    writes = ("data", "loss_fn", "optimizer", "model")

    def __init__(self, name: str, value: Any, event: Any = StepEnd) -> None:
        self.what, self.value, self.event = name, value, event

    @on(StepEnd)
    def after_step(self, event: StepEnd, phase: Any, learner: Any) -> None:
        if self.event is StepEnd:
            setattr(learner, self.what, self.value)

    @on(EpochEnd)
    def after_epoch(self, event: EpochEnd, phase: Any, learner: Any) -> None:
        if self.event is EpochEnd:
            setattr(learner, self.what, self.value)


@pytest.mark.parametrize("event", [StepEnd, EpochEnd])
@pytest.mark.parametrize(("name", "words"), [("data", "fit.epochs, data."), ("model", "head"), ("optimizer", "option")])
def test_during_a_fit_what_cannot_be_replaced_is_refused_to_callbacks_too(name: str, words: str, event: Any) -> None:
    learner = make(callbacks=[Assigns(name, (DATA,), event)])
    with pytest.raises(AssignmentError, match=words):
        learner.fit(2)
    with pytest.raises(AssignmentError, match=words):
        learner.epoch(TrainingPhase())


def test_a_loss_function_that_is_assigned_is_used_from_the_next_step_on() -> None:
    learner, whole = make(), make()
    learner.fit(1)
    learner.loss_fn = l1_loss
    learner.fit(1)
    whole.fit(1)
    by_hand = copy.deepcopy(whole.model)
    by_hand.zero_grad()
    optimizer = SGD(by_hand.parameters(), lr=0.1)
    l1_loss(by_hand(XS), DATA[1]).backward()
    optimizer.step()
    assert torch.allclose(learner.model.weight, by_hand.weight, atol=1e-6)  # the rows come in another order


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
        return (self.scale * (preds - ys)).square().mean()


def test_a_loss_function_with_parameters_has_to_have_an_optimizer() -> None:
    learner, loss = make(), Scaled()
    with pytest.raises(OptimizerError, match=r"in no optimizer: loss_fn.scale.*add_param_group"):
        learner.loss_fn = loss
    assert learner.loss_fn is mse_loss
    learner.optimizer.add_param_group({"params": [loss.scale]})
    learner.loss_fn = loss
    learner.fit(1)
    assert "loss_fn.scale" in learner.step.grads
    assert loss.scale != 1


@pytest.mark.parametrize("wrong", ["mse", 3, nn.MSELoss])
def test_what_is_no_loss_function_is_refused_when_it_is_assigned(wrong: Any) -> None:
    learner = make()
    with pytest.raises(LossError, match=r"loss_fn=.* was given; expected a function"):
        learner.loss_fn = wrong
    assert learner.loss_fn is mse_loss
