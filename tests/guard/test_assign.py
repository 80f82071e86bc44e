"""What is assigned to a learner takes effect, or is refused with what to type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import SGD

from fluxloop import (
    EMA,
    Accelerator,
    AssignmentError,
    Attribute,
    Callback,
    DataError,
    EarlyStopping,
    EpochEnd,
    GradientClip,
    KeepBestModel,
    Learner,
    LearningRate,
    LogMetrics,
    LossError,
    LRScheduler,
    Memory,
    MetricError,
    Metrics,
    OptimizerError,
    Recorder,
    Scheduler,
    StepEnd,
    Timer,
    TrainingPhase,
    Unfreeze,
    linear,
    on,
)
from fluxloop.stopping import Patience

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
    other = copy.deepcopy(learner)
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


# Options of callbacks


def watched(*callbacks: Callback, **options: Any) -> Learner:
    against = (XS, -DATA[1])  # training raises the loss of these
    return make(data=(DATA, against), callbacks=[Recorder(), Metrics(), *callbacks], **options)


def epochs_of(early: EarlyStopping, change: Callable[[EarlyStopping], object], before: bool = False) -> int:
    """Count the epochs until a fit is ended, where the validation loss rises all the time."""
    if before:
        change(early)
    learner = watched(early, optimizer=partial(SGD, lr=0.01))
    if not before:
        change(early)
    return len(learner.fit(9).metrics[TrainingPhase]["loss"])


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("early", "name", "value", "epochs"),
    [
        (lambda: EarlyStopping(5), "criterion", 2, 3),
        (lambda: EarlyStopping(5), "criterion", Patience(3), 4),
        (lambda: EarlyStopping(2), "mode", "max", 9),
        (lambda: EarlyStopping(2), "min_epochs", 6, 6),
        (lambda: EarlyStopping(2, monitor="training/loss"), "monitor", "validation/loss", 3),
        (lambda: EarlyStopping(2, mode="max"), "min_delta", 100.0, 3),
    ],
)
def test_what_is_assigned_to_early_stopping_is_what_it_does(
    early: Any, name: str, value: Any, epochs: int, before: bool
) -> None:
    assert epochs_of(early(), lambda callback: setattr(callback, name, value), before) == epochs


def test_options_of_a_copied_learners_callbacks_take_effect_there_alone() -> None:
    learner = watched(early := EarlyStopping(5), optimizer=partial(SGD, lr=0.01))
    other = copy.deepcopy(learner)
    copied = other.get_callback(EarlyStopping)
    assert copied is not None
    copied.criterion = 2
    assert len(other.fit(9).metrics[TrainingPhase]["loss"]) == 3
    assert len(learner.fit(9).metrics[TrainingPhase]["loss"]) == 6
    assert early.criterion == 5


@pytest.mark.parametrize(
    ("callback", "name", "value", "error"),
    [
        (EarlyStopping(3), "criterion", "soon", TypeError),
        (EarlyStopping(3), "monitor", "loss", MetricError),
        (Timer(hours=1), "hours", -1, ValueError),
        (GradientClip(1.0), "max_norm", -1.0, ValueError),
        (EMA("model", 0.9), "decay", 2, ValueError),
        (Scheduler({LearningRate: 0.1}), "unit", "steps", ValueError),
    ],
)
@pytest.mark.parametrize("adopted", [True, False])
def test_a_wrong_option_is_refused_and_the_old_one_stays(
    callback: Any, name: str, value: Any, error: type[Exception], adopted: bool
) -> None:
    callback, old = copy.deepcopy(callback), getattr(callback, name)
    if adopted and name != "unit":
        watched(callback)
        with pytest.raises(error):
            setattr(callback, name, value)
        assert getattr(callback, name) == old
    else:
        setattr(callback, name, value)
        with pytest.raises(error):  # when a learner takes it
            watched(callback)


@pytest.mark.parametrize(
    ("callback", "name", "value"),
    [
        (EMA("model", 0.9), "model", "0"),
        (EMA("model", 0.9), "view", "slow"),
        (Scheduler({LearningRate: 0.1}), "schedules", {}),
        (LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1)), "unit", "step"),
        (Unfreeze({"weight": 1}), "when", {}),
        (KeepBestModel(), "monitor", "training/loss"),
        (GradientClip(1.0), "name", "mine"),
        (GradientClip(1.0), "run_after", (Recorder,)),
    ],
)
def test_an_option_that_a_learner_has_read_is_refused_with_replace_callback(
    callback: Any, name: str, value: Any
) -> None:
    callback = copy.deepcopy(callback)
    learner = watched(callback)
    kind = type(callback).__name__
    with pytest.raises(AssignmentError, match=rf"{name} of {kind} .*learner.replace_callback\({kind}\(\.\.\., {name}="):
        setattr(callback, name, value)
    learner.remove_callback(type(callback))
    setattr(callback, name, value)  # nobody has read it now


@pytest.mark.parametrize("adopted", [True, False])
def test_a_misspelt_option_is_refused_with_those_that_there_are(adopted: bool) -> None:
    early = EarlyStopping(3)
    if adopted:
        watched(early)
    with pytest.raises(AssignmentError, match=r"no attribute 'min_epoch'; did you mean 'min_epochs'\?(?s:.*)criterion"):
        early.min_epoch = 3  # type: ignore[attr-defined]  # that it is none is the point


def test_a_misspelt_option_of_a_callback_without_fields_is_refused_once_a_learner_has_it() -> None:
    learner = watched(LogMetrics(Memory()))
    logger: Any = learner.get_callback(LogMetrics)
    with pytest.raises(AssignmentError, match=r"did you mean 'every'\?"):
        logger.evrey = 3


def test_a_subclass_keeps_what_it_likes_and_its_options_take_effect() -> None:
    @define
    class Mine(EarlyStopping):
        rounds: int = 0

        def __attrs_post_init__(self) -> None:
            super().__attrs_post_init__()
            self.rounds += 1

    class Plain(EarlyStopping):
        pass

    mine, plain = Mine(5), Plain(5)
    plain.note = "mine"  # type: ignore[attr-defined]  # any name
    assert epochs_of(mine, lambda callback: setattr(callback, "criterion", 2)) == 3
    assert epochs_of(plain, lambda callback: setattr(callback, "criterion", 2)) == 3
    assert mine.rounds == 1


def test_options_under_a_schedule_are_used_at_the_next_step() -> None:
    clip = GradientClip(1.0)
    learner = make(callbacks=[clip, Scheduler({Attribute(clip, "max_norm"): linear(4, 1.0, 0.0)})])
    learner.fit(3)
    assert clip.max_norm == 0.5
