from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import nn
from torch.nn.functional import mse_loss

from fluxloop import EMA, CustomCallback, Learner, OptimizerError, Scheduler, StepBegin, TrainingPhase, linear, runstep
from fluxloop.hyperparameters import (
    Attribute,
    Betas,
    HyperParameter,
    LearningRate,
    Momentum,
    OptimizerOption,
    WeightDecay,
    get_hyperparameter,
    set_hyperparameter,
)
from fluxloop.testing import toy_learner


def groups_learner() -> Learner:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    return Learner(model, mse_loss, optimizer=torch.optim.SGD(groups, lr=0.2), default_callbacks=False, seed=0)


def gan_learner() -> Learner:
    models = {"G": nn.Linear(2, 2), "D": nn.Linear(2, 1)}
    return Learner(models, optimizer={"G": torch.optim.Adam, "D": torch.optim.SGD}, default_callbacks=False, seed=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_value_that_is_set_is_the_one_the_optimizer_uses(optimizer: Any) -> None:
    learner = toy_learner(optimizer=partial(optimizer, lr=0.001))
    learner.fit(1)
    before = learner.model.value.clone()
    set_hyperparameter(learner, LearningRate, 0.0)
    assert get_hyperparameter(learner, LearningRate) == 0.0
    assert learner.optimizer.param_groups[0]["lr"] == 0.0
    learner.fit(1)
    assert torch.equal(learner.model.value, before)
    set_hyperparameter(learner, LearningRate, 0.01)
    learner.fit(1)
    assert not torch.equal(learner.model.value, before)


def test_weight_decay_changes_the_next_step_as_in_a_loop_by_hand() -> None:
    learner = toy_learner(num_batches=1)
    set_hyperparameter(learner, WeightDecay, 0.5)
    learner.fit(2)
    value = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([value], lr=0.001, weight_decay=0.5)
    (batch,) = learner.data.training
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.l1_loss(batch[0] * value, batch[1]).backward()
        optimizer.step()
    assert torch.equal(learner.model.value, value)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"momentum": 0.5}),
        (partial(torch.optim.RMSprop, momentum=0.9), {"momentum": 0.5}),
        (partial(torch.optim.Adam, betas=(0.9, 0.99)), {"betas": (0.5, 0.99)}),
        (partial(torch.optim.NAdam, betas=(0.9, 0.99)), {"betas": (0.5, 0.99)}),
    ],
)
def test_momentum_is_what_each_optimizer_calls_it(optimizer: Any, expected: dict[str, Any]) -> None:
    learner = toy_learner(optimizer=optimizer)
    assert get_hyperparameter(learner, Momentum) == 0.9
    set_hyperparameter(learner, Momentum, 0.5)
    assert get_hyperparameter(learner, Momentum) == 0.5
    (name, value), *_ = expected.items()
    assert learner.optimizer.param_groups[0][name] == value
    learner.fit(1)


def test_betas_are_set_as_a_pair() -> None:
    learner = toy_learner(optimizer=torch.optim.AdamW)
    set_hyperparameter(learner, Betas, (0.5, 0.9))
    assert get_hyperparameter(learner, Betas) == (0.5, 0.9)
    learner.fit(1)


def test_without_an_index_all_groups_are_set_and_with_one_that_group() -> None:
    learner = groups_learner()
    assert get_hyperparameter(learner, LearningRate) == (0.1, 0.2)
    assert get_hyperparameter(learner, LearningRate(group=1)) == 0.2
    set_hyperparameter(learner, LearningRate(group=1), 0.3)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.1, 0.3]
    set_hyperparameter(learner, LearningRate(), 0.4)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.4, 0.4]
    assert get_hyperparameter(learner, LearningRate) == 0.4


def test_without_a_name_all_optimizers_are_set_and_with_one_that_optimizer() -> None:
    learner = gan_learner()
    set_hyperparameter(learner, LearningRate("D"), 0.5)
    assert learner.optimizer.D.param_groups[0]["lr"] == 0.5
    assert learner.optimizer.G.param_groups[0]["lr"] == 0.001
    set_hyperparameter(learner, LearningRate, 0.25)
    assert get_hyperparameter(learner, LearningRate) == 0.25


@pytest.mark.parametrize("models", [(nn.Linear(1, 1), nn.Linear(1, 1)), {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}])
def test_optimizers_of_a_tuple_and_of_a_mapping_have_names(models: Any) -> None:
    learner = Learner(models, default_callbacks=False, seed=0)
    second = str(learner.optimizer_names[1])
    set_hyperparameter(learner, LearningRate(second), 0.5)
    assert [o.param_groups[0]["lr"] for o in learner.optimizer] == [0.001, 0.5]


def test_an_optimizer_of_a_part_has_a_dotted_name() -> None:
    models = {"G": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))}
    learner = Learner(models, optimizer={"G.0": torch.optim.Adam, "G.1": torch.optim.SGD}, default_callbacks=False)
    set_hyperparameter(learner, LearningRate("G.1"), 0.5)
    assert [get_hyperparameter(learner, LearningRate(name)) for name in ("G.0", "G.1")] == [0.001, 0.5]
    assert LearningRate("G.1").writes == ("optimizer",)


@pytest.mark.parametrize(
    "use",
    [
        lambda learner, hp: learner.add_callback(Scheduler({hp: linear(4, 0.1, 0.0)})),
        lambda learner, hp: set_hyperparameter(learner, hp, 0.5),
    ],
)
def test_a_model_with_several_optimizers_names_them(use: Any) -> None:
    models = {"G": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))}
    learner = Learner(models, optimizer={"G.0": torch.optim.Adam, "G.1": torch.optim.SGD}, default_callbacks=False)
    words = (
        r"LearningRate\(optimizer='G', group=None\): 'G' has the optimizers \['G.0', 'G.1'\]; expected the name of "
        r"one, 'G.0', or all of them by name: {LearningRate\('G.0'\): ..., LearningRate\('G.1'\): ...}"
    )
    with pytest.raises(OptimizerError, match=words):
        use(learner, LearningRate("G"))
    assert [get_hyperparameter(learner, LearningRate(name)) for name in ("G.0", "G.1")] == [0.001, 0.001]


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (
            Momentum("D2"),
            r"Momentum\(optimizer='D2', .*there is no optimizer 'D2'; the learner has.*'G', 'D'",
        ),
        (LearningRate("G", 1), "Adam 'G' has 1 parameter groups; there is no 1"),
        (Betas("D"), "SGD 'D' has no 'betas'; it has dampening, .*lr, .*momentum.*weight_decay"),
    ],
)
def test_what_an_optimizer_does_not_have_is_an_error_that_names_what_it_has(hp: OptimizerOption, message: str) -> None:
    learner = gan_learner()
    for call in (partial(get_hyperparameter, learner, hp), partial(set_hyperparameter, learner, hp, 0.5)):
        with pytest.raises(OptimizerError, match=message):
            call()


def test_an_optimizer_without_momentum_says_so() -> None:
    with pytest.raises(OptimizerError, match=r"Adagrad has no 'momentum' or 'betas'; it has .*lr, lr_decay"):
        get_hyperparameter(toy_learner(optimizer=torch.optim.Adagrad), Momentum)
    with pytest.raises(OptimizerError, match=r"the learner has a single one without a name: LearningRate\(\)"):
        get_hyperparameter(toy_learner(), LearningRate("G"))


def test_nothing_is_set_where_one_of_several_optimizers_cannot_be() -> None:
    learner = gan_learner()
    with pytest.raises(OptimizerError, match="SGD 'D' has no 'betas'"):
        set_hyperparameter(learner, Betas, (0.1, 0.2))
    assert get_hyperparameter(learner, Betas("G")) == (0.9, 0.999)


def test_a_tensor_in_a_parameter_group_is_filled_in_place() -> None:
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    rate = torch.tensor(0.001)
    learner = toy_learner(optimizer=partial(torch.optim.Adam, lr=rate, betas=betas, capturable=False, foreach=False))
    group = learner.optimizer.param_groups[0]
    held = group["lr"], group["betas"][0]
    set_hyperparameter(learner, LearningRate, 0.5)
    set_hyperparameter(learner, Momentum, 0.25)
    assert (group["lr"], group["betas"][0]) == held
    assert group["lr"] is held[0]
    assert group["betas"][0] is held[1]
    assert (held[0].item(), held[1].item()) == (0.5, 0.25)
    assert get_hyperparameter(learner, LearningRate) == 0.5


def test_any_attribute_of_any_object_is_a_hyperparameter() -> None:
    class Weighted(TrainingPhase):
        beta = 1.0

    phase, ema, loss = Weighted(), EMA("model", 0.9), nn.CrossEntropyLoss(weight=torch.ones(3))
    learner = toy_learner()
    for thing, name in ((phase, "beta"), (ema, "decay"), (loss, "label_smoothing")):
        set_hyperparameter(learner, Attribute(thing, name), 0.5)
        assert getattr(thing, name) == 0.5
        assert get_hyperparameter(learner, Attribute(thing, name)) == 0.5
    held = loss.weight
    set_hyperparameter(learner, Attribute(loss, "weight"), 2.0)
    assert loss.weight is held
    assert held.tolist() == [2.0, 2.0, 2.0]


def test_attributes_are_the_same_where_the_object_is() -> None:
    first, second = TrainingPhase(), TrainingPhase()
    assert Attribute(first, "data_key") == Attribute(first, "data_key")
    assert hash(Attribute(first, "data_key")) == hash(Attribute(first, "data_key"))
    assert Attribute(first, "data_key") != Attribute(second, "data_key")
    assert repr(Attribute(first, "data_key")) == "Attribute(TrainingPhase, 'data_key')"
    with pytest.raises(AttributeError, match="a EMA has no attribute 'decy' to schedule; did you mean 'decay'"):
        Attribute(EMA("model"), "decy")


@frozen
class Temperature(HyperParameter):
    writes = ("loss_fn",)


class Scaled(nn.Module):
    temperature = 1.0

    def forward(self, preds: Any, ys: Any) -> Any:
        return ((preds - ys) / self.temperature).abs().mean()


@get_hyperparameter.register(Temperature)
def _(learner: Any, hp: Temperature) -> float:
    return float(learner.loss_fn.temperature)


@set_hyperparameter.register(Temperature)
def _(learner: Any, hp: Temperature, value: float) -> None:
    learner.loss_fn.temperature = value


class Dampening(OptimizerOption):
    options = ("dampening",)


def test_users_add_their_own() -> None:
    learner = toy_learner()
    learner.loss_fn = Scaled()
    set_hyperparameter(learner, Temperature, 2.0)
    assert get_hyperparameter(learner, Temperature()) == 2.0
    set_hyperparameter(learner, Dampening, 0.25)
    assert learner.optimizer.param_groups[0]["dampening"] == 0.25
    assert Dampening().label == "dampening"


def test_one_that_nobody_taught_says_what_to_write() -> None:
    class Unknown(HyperParameter):
        pass

    with pytest.raises(NotImplementedError, match=r"@set_hyperparameter.register\(Unknown\)\n.*learner, hp, value"):
        set_hyperparameter(toy_learner(), Unknown, 1.0)
    with pytest.raises(TypeError, match=r"'lr' was given as a hyperparameter; expected one such as LearningRate"):
        get_hyperparameter(toy_learner(), "lr")


def test_they_work_on_the_view_of_a_handler() -> None:
    seen = []
    look = CustomCallback(
        lambda learner: seen.append(get_hyperparameter(learner, LearningRate("D"))),
        StepBegin,
        reads=("optimizer.D",),
    )
    learner = gan_learner()
    learner.add_callback(look)
    with runstep(learner, TrainingPhase()):
        pass
    assert seen == [0.001]


@pytest.mark.parametrize(
    ("hp", "label"),
    [
        (LearningRate(), "learning_rate"),
        (LearningRate("G"), "learning_rate/G"),
        (WeightDecay("G", 0), "weight_decay/G/0"),
        (Momentum(group=2), "momentum/2"),
        (Temperature(), "temperature"),
        (Attribute(EMA("model"), "decay"), "EMA.decay"),
        (Attribute(EMA("model"), "decay", label="teacher"), "teacher"),
    ],
)
def test_each_has_a_name_for_records(hp: HyperParameter, label: str) -> None:
    assert hp.label == label


def test_two_overlap_where_both_may_change_one_value() -> None:
    assert LearningRate().overlaps(LearningRate("G"))
    assert LearningRate("G", 0).overlaps(LearningRate("G"))
    assert not LearningRate("G").overlaps(LearningRate("D"))
    assert not LearningRate(group=0).overlaps(LearningRate(group=1))
    assert not LearningRate().overlaps(WeightDecay())
    assert Momentum().overlaps(Betas("G"))


def test_a_hyperparameter_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(LearningRate("G", 1))) == LearningRate("G", 1)


@pytest.mark.parametrize("given", [{"optimizer": 0.1}, {"group": -1}, {"group": 0.5}])
def test_a_name_is_a_text_and_an_index_a_whole_number(given: Any) -> None:
    with pytest.raises(OptimizerError, match=r"LearningRate\(.*was given; expected the (name|index)"):
        LearningRate(**given)


def test_a_method_cannot_be_scheduled_as_an_attribute() -> None:
    with pytest.raises(TypeError, match=r"Attribute\(TrainingPhase, 'weight'\) was given, which is a method"):
        Attribute(TrainingPhase(), "weight")
