from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    GANPhase,
    Learner,
    LearningRate,
    Momentum,
    OptimizerError,
    PhaseError,
    Recorder,
    Scheduler,
    TensorBatches,
    TrainingPhase,
    get_hyperparameter,
    runstep,
    set_hyperparameter,
)
from fluxloop import linear as linear_schedule
from fluxloop.compute.fused import step_optimizer
from fluxloop.compute.optimizers import build_optimizers, owned_parameters, parameter_names
from fluxloop.testing import assert_resumes_exactly
from small_models import Two

SGD = partial(torch.optim.SGD, lr=0.1)


def linear(frozen: bool = False) -> nn.Module:
    return nn.Linear(2, 3).requires_grad_(not frozen)


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for parameter in owned_parameters(optimizer)]


def ids(*modules: nn.Module) -> list[int]:
    return [id(parameter) for module in modules for parameter in module.parameters()]


def message(model: Any, optimizer: Any, error: type[Exception] = OptimizerError) -> str:
    with pytest.raises(error) as raised:
        Learner(model, optimizer=optimizer)
    return str(raised.value)


# What may be given


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (torch.optim.Adam, torch.optim.Adam),
        (SGD, torch.optim.SGD),
        (lambda ps: torch.optim.AdamW(ps, 0.1), torch.optim.AdamW),
    ],
    ids=["class", "partial", "function"],
)
def test_a_factory_makes_the_optimizer_of_a_single_model(factory: Any, expected: type) -> None:
    model = linear()
    learner = Learner(model, optimizer=factory)
    assert type(learner.optimizer) is expected
    assert held(learner.optimizer) == ids(model)
    assert learner.optimizer_names == (None,)


def test_a_factory_is_called_with_the_trainable_parameters_alone() -> None:
    model = Two()
    model.encoder.requires_grad_(False)
    learner = Learner(model, optimizer=SGD)
    assert held(learner.optimizer) == ids(model.head)


def test_a_factory_makes_one_optimizer_per_model() -> None:
    generator, critic = linear(), linear()
    learner = Learner({"generator": generator, "critic": critic}, optimizer=SGD)
    assert learner.optimizer_names == ("generator", "critic")
    assert held(learner.optimizer.generator) == ids(generator)
    assert held(learner.optimizer.critic) == ids(critic)
    assert learner.optimizer.generator is not learner.optimizer.critic


def test_an_optimizer_is_used_as_it_is_with_its_groups() -> None:
    model = Two()
    groups = [{"params": model.head.parameters(), "lr": 0.5}, {"params": model.encoder.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    learner = Learner(model, optimizer=optimizer)
    assert learner.optimizer is optimizer
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.5, 0.1]


def test_one_optimizer_may_hold_the_parameters_of_several_models() -> None:
    generator, critic = linear(), linear()
    optimizer = SGD([*generator.parameters(), *critic.parameters()])
    learner = Learner({"generator": generator, "critic": critic}, optimizer=optimizer)
    assert learner.optimizer is optimizer
    assert learner.optimizer_names == (None,)


def test_a_mapping_may_mix_factories_partials_and_optimizers() -> None:
    one, two, three = linear(), linear(), linear()
    given = {"one": torch.optim.Adam, "two": SGD, "three": torch.optim.AdamW(three.parameters(), lr=0.3)}
    learner = Learner({"one": one, "two": two, "three": three}, optimizer=given)
    assert [type(optimizer).__name__ for optimizer in learner.optimizer] == ["Adam", "SGD", "AdamW"]
    assert learner.optimizer.three is given["three"]
    assert [held(optimizer) for optimizer in learner.optimizer] == [ids(one), ids(two), ids(three)]


def test_the_order_of_a_mapping_is_the_order_of_the_optimizers() -> None:
    models = {"one": linear(), "two": linear()}
    assert Learner(models, optimizer={"two": SGD, "one": SGD}).optimizer_names == ("two", "one")


def test_a_factorys_name_may_be_that_of_a_submodule_of_a_single_model() -> None:
    model = Two()
    learner = Learner(model, optimizer={"encoder": SGD, "head": torch.optim.Adam})
    assert held(learner.optimizer.encoder) == ids(model.encoder)
    assert held(learner.optimizer.head) == ids(model.head)


def test_a_factorys_name_may_be_the_path_of_a_submodule_of_one_of_several_models() -> None:
    model, critic = Two(), linear()
    given = {"G.encoder": SGD, "G.head.0": SGD, "G.head.1": SGD, "D": torch.optim.Adam}
    learner = Learner({"G": model, "D": critic}, optimizer=given)
    assert learner.optimizer_names == tuple(given)
    assert held(learner.optimizer["G.encoder"]) == ids(model.encoder)
    assert held(learner.optimizer["G.head.1"]) == ids(model.head[1])
    assert held(learner.optimizer["D"]) == ids(critic)
    with learner.optimizing("G.head.0") as block:
        assert held(block.slot.optimizer) == ids(model.head[0])


def test_names_of_optimizers_over_given_parameters_are_free() -> None:
    model = Two()
    given = {"slow": SGD(model.encoder.parameters()), "fast": SGD(model.head.parameters())}
    learner = Learner(model, optimizer=given)
    assert learner.optimizer.slow is given["slow"]
    assert learner.optimizer.fast is given["fast"]


def test_optimizers_over_one_model_are_found_under_the_names_they_were_given() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    learner = Learner(model, optimizer={"0": SGD, "2": torch.optim.Adam})
    assert learner.optimizer_names == ("0", "2")
    assert held(learner.optimizing("2").slot.optimizer) == held(learner.optimizing(2).slot.optimizer) == ids(model[2])


def test_an_optimizer_may_hold_frozen_parameters_too() -> None:
    model = Two()
    model.encoder.requires_grad_(False)
    learner = Learner(model, optimizer=SGD(model.parameters()))
    assert held(learner.optimizer) == ids(model)


# Frozen models


def test_a_frozen_model_gets_no_optimizer() -> None:
    learner = Learner({"teacher": linear(frozen=True), "student": linear()}, optimizer=SGD)
    assert learner.optimizer_names == ("student",)
    assert held(learner.optimizer.student) == ids(learner.model.student)
    assert not hasattr(learner.optimizer, "teacher")
    with pytest.raises(OptimizerError, match=r"no optimizer 'teacher'.*\['student'\]"):
        learner.optimizing("teacher")


def test_a_learner_whose_models_are_all_frozen_has_no_optimizer_and_can_evaluate() -> None:
    model = linear(frozen=True)
    learner = Learner(model, nn.functional.mse_loss, optimizer=SGD, default_callbacks=False)
    assert learner.optimizer_names == ()
    assert len(learner.optimizer) == 0
    xs = torch.zeros(4, 2)
    expected = nn.functional.mse_loss(model(xs), torch.zeros(4, 3)).item()
    assert learner.evaluate((xs, torch.zeros(4, 3)))["loss"] == pytest.approx(expected)


def test_the_only_trained_one_of_several_models_may_be_left_unnamed_in_a_block() -> None:
    learner = Learner({"teacher": linear(frozen=True), "student": linear()}, optimizer=SGD)
    with learner.optimizing() as block:
        assert block.slot.name == "student"


def test_a_factory_for_a_frozen_model_is_an_error_that_names_it() -> None:
    text = message({"teacher": linear(frozen=True), "student": linear()}, {"teacher": SGD, "student": SGD})
    assert "optimizer['teacher'] would get no parameter" in text
    assert "none of Linear requires a gradient" in text


# What is reported by name


def test_parameters_in_no_optimizer_are_named() -> None:
    model = Two()
    text = message(model, SGD(model.head.parameters()))
    assert "trainable parameters are in no optimizer: encoder.weight, encoder.bias;" in text
    assert "requires_grad_(False)" in text


def test_parameters_in_no_optimizer_are_named_with_their_model_and_counted_where_there_are_many() -> None:
    text = message({"G": nn.Sequential(*(linear() for _ in range(4))), "D": linear()}, {"D": SGD})
    assert "G.0.weight, G.0.bias, G.1.weight, G.1.bias, G.2.weight and 3 more" in text
    assert "D." not in text


def test_a_parameter_in_two_optimizers_is_named_with_both() -> None:
    model = Two()
    text = message(model, {"all": SGD(model.parameters()), "head": SGD(model.head[0].parameters())})
    assert "parameters are held more than once" in text
    assert "head.0.weight (in optimizer['all'] and optimizer['head'])" in text
    assert "head.0.bias (in optimizer['all'] and optimizer['head'])" in text
    assert "encoder" not in text


def test_overlapping_submodules_are_reported() -> None:
    text = message(Two(), {"head": SGD, "head.1": SGD, "encoder": SGD})
    assert "head.1.weight (in optimizer['head'] and optimizer['head.1'])" in text


def test_foreign_parameters_are_counted_with_their_shapes() -> None:
    model = linear()
    text = message(model, SGD([*model.parameters(), nn.Parameter(torch.zeros(7, 5))]))
    assert "the optimizer holds 1 parameters that belong to no model (shapes (7, 5))" in text


def test_an_optimizer_of_another_copy_of_the_model_is_foreign() -> None:
    text = message(linear(), SGD(linear().parameters()))
    assert "holds 2 parameters that belong to no model (shapes (3, 2), (3,))" in text


def test_many_foreign_parameters_are_shown_in_part() -> None:
    text = message({"D": linear()}, {"D": SGD(nn.Parameter(torch.zeros(i)) for i in range(1, 6))})
    assert "optimizer['D'] holds 5 parameters" in text
    assert "(shapes (1,), (2,), (3,), …)" in text


def test_a_parameter_shared_by_two_models_is_named_and_can_be_given_to_one_optimizer() -> None:
    one, two = linear(), linear()
    two.weight = one.weight
    models = {"one": one, "two": two}
    text = message(models, SGD)
    assert "one.weight (in optimizer['one'] and optimizer['two'])" in text
    assert "give the optimizers themselves" in text
    given = {"one": SGD(one.parameters()), "two": SGD([two.bias])}
    assert held(Learner(models, optimizer=given).optimizer.two) == [id(two.bias)]


def test_a_shared_parameter_inside_one_model_has_one_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert list(parameter_names({None: model}).values()) == ["0.weight", "0.bias", "1.bias"]
    assert held(Learner(model, optimizer=SGD).optimizer) == ids(model)


# What cannot be used


def test_a_name_that_is_no_model_or_submodule_is_an_error_with_the_nearest_one() -> None:
    text = message(Two(), {"encodr": SGD, "head": SGD})
    assert "optimizer['encodr'] is a factory, but no model or submodule is called 'encodr'" in text
    assert "['encoder', 'head']" in text
    assert "did you mean 'encoder'?" in text


def test_a_name_that_is_no_model_lists_models_and_their_parts() -> None:
    text = message({"G": Two(), "D": linear()}, {"generator": SGD, "D": SGD})
    assert "no model or submodule is called 'generator'" in text
    assert "'D', 'G'" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0.1, "optimizer=0.1 was given; expected a factory that takes parameters"),
        ("adam", "optimizer='adam' was given; expected a factory"),
        (None, "optimizer=None was given"),
        ([torch.optim.Adam], "optimizer=a list of length 1 was given"),
    ],
)
def test_something_that_is_no_optimizer_is_an_error(given: Any, words: str) -> None:
    text = message(linear(), given)
    assert words in text
    assert "partial(torch.optim.SGD, lr=0.1)" in text


def test_something_in_a_mapping_that_is_no_optimizer_is_an_error() -> None:
    assert "optimizer['head'] is 0.1; expected a factory" in message(Two(), {"encoder": SGD, "head": 0.1})


@pytest.mark.parametrize("name", [1, "", None])
def test_an_optimizer_needs_a_name(name: Any) -> None:
    assert f"an optimizer is named {name!r}" in message(Two(), {name: SGD})


def test_an_empty_mapping_leaves_every_parameter_without_optimizer() -> None:
    assert "in no optimizer: weight, bias" in message(linear(), {})


def test_a_factory_that_makes_no_optimizer_is_an_error() -> None:
    text = message(linear(), lambda parameters: list(parameters))
    assert "the factory optimizer made a list of length 2; expected a torch.optim.Optimizer" in text
    text = message({"G": linear()}, {"G": lambda parameters: None})
    assert "the factory optimizer['G'] made None" in text


def test_an_error_of_a_factory_is_its_own() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Learner(linear(), optimizer=partial(torch.optim.Adam, lr=-1.0))


# Building and stepping


def test_build_optimizers_gives_them_by_name() -> None:
    built = build_optimizers({"G": linear(), "D": linear()}, {"D": SGD, "G": torch.optim.Adam})
    assert [(name, type(optimizer).__name__) for name, optimizer in built.items()] == [("D", "SGD"), ("G", "Adam")]
    assert list(build_optimizers({None: linear()}, SGD)) == [None]


@pytest.mark.parametrize(
    "factory",
    [
        SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        partial(torch.optim.Adam, foreach=True),
        partial(torch.optim.Adam, fused=True),
        partial(torch.optim.Adam, amsgrad=True, maximize=True),
    ],
)
def test_stepping_an_optimizer_gives_the_bits_of_its_own_step(factory: Any) -> None:
    trained = []
    for step in (step_optimizer, lambda optimizer: optimizer.step()):
        torch.manual_seed(0)
        model = Two()
        optimizer = factory(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            step(optimizer)
        trained.append([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*trained, strict=True))


def test_stepping_an_optimizer_records_no_graph() -> None:
    model = linear()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    step_optimizer(optimizer)
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_names_of_the_gradients_are_those_of_the_models_parameters() -> None:
    class Both(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch) as (_, state):
                for name in ("G", "D"):
                    with learner.optimizing(name) as block:
                        block.loss = learner.models[name](state.xs).square().mean()

    batches = TensorBatches(torch.ones(4, 2), batch_size=4)
    learner = Learner({"G": linear(), "D": linear()}, data=(batches,), optimizer=SGD, default_callbacks=False)
    learner.epoch(Both())
    assert list(learner.step.grads) == ["G.weight", "G.bias", "D.weight", "D.bias"]
    assert learner.step.grads["D.bias"] is learner.model.D.bias.grad


class Weighted(nn.Module):
    """A loss with a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
        return self.weight * (preds - ys).square().mean()


def test_a_trainable_parameter_of_the_loss_in_no_optimizer_is_an_error_that_names_it() -> None:
    with pytest.raises(OptimizerError, match=r"in no optimizer: loss_fn\.weight"):
        Learner(linear(), Weighted(), optimizer=SGD)


def test_parameters_of_the_loss_may_be_frozen_or_in_an_optimizer() -> None:
    Learner(linear(), Weighted().requires_grad_(False), optimizer=SGD)
    model, loss_fn = linear(), Weighted()
    data = TensorBatches(torch.ones(4, 2), torch.ones(4, 3), batch_size=2)
    optimizer = SGD([*model.parameters(), *loss_fn.parameters()])
    Learner(model, loss_fn, data=(data,), optimizer=optimizer, default_callbacks=False).fit(1)
    assert loss_fn.weight.item() < 1


# Options that are tensors


def halves() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"G": nn.Linear(4, 2), "D": nn.Linear(2, 1)}


def by_tensor(**options: Any) -> Any:
    return partial(torch.optim.AdamW, lr=torch.tensor(1e-2), **options)


def test_each_optimizer_of_a_factory_has_a_tensor_of_its_own_as_learning_rate() -> None:
    make = by_tensor()
    learner = Learner(halves(), optimizer=make, default_callbacks=False)
    second = Learner(halves(), optimizer=make, default_callbacks=False)
    set_hyperparameter(learner, LearningRate("G"), 0.5)
    for held in (learner.optimizer.D, second.optimizer.G, second.optimizer.D):
        assert held.param_groups[0]["lr"].item() == pytest.approx(1e-2)
    assert make.keywords["lr"].item() == pytest.approx(1e-2)
    assert learner.optimizer.G.param_groups[0]["lr"].item() == 0.5


def test_betas_and_defaults_are_tensors_of_their_own_too() -> None:
    make = by_tensor(betas=(torch.tensor(0.9), torch.tensor(0.99)), capturable=False)
    learner = Learner(halves(), optimizer=make, default_callbacks=False)
    set_hyperparameter(learner, Momentum("G"), 0.5)
    assert get_hyperparameter(learner, Momentum("D")) == pytest.approx(0.9)
    assert learner.optimizer.G.defaults["betas"][0].item() == pytest.approx(0.9)


def test_a_group_that_joins_later_shares_no_tensor_with_the_others() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    learner = Learner(model, mse_loss, data=((torch.ones(4, 2),) * 2,), optimizer=by_tensor(), default_callbacks=False)
    for _ in range(2):
        model.append(nn.Linear(2, 2))
        learner.optimizer.add_param_group({"params": model[-1].parameters()})
    learner.fit(1)
    set_hyperparameter(learner, LearningRate(group=1), 0.5)
    rates = [group["lr"].item() for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([1e-2, 0.5, 1e-2])


def test_groups_of_an_optimizer_made_beforehand_are_separated_and_the_first_keeps_its_tensor() -> None:
    model, rate = nn.Linear(2, 2), torch.tensor(0.1)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=rate)
    learner = Learner(model, optimizer=optimizer, default_callbacks=False)
    set_hyperparameter(learner, LearningRate(group=1), 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
    assert get_hyperparameter(learner, LearningRate) == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_tensor_rates_under_a_schedule_are_trained_with_as_numbers_are_also_copied_and_resumed(options: Any) -> None:
    rows = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))

    def make(rate: Any) -> Learner:
        torch.manual_seed(0)
        factory = partial(torch.optim.AdamW, lr=rate, **options)
        return Learner(
            Two(),
            mse_loss,
            data=((rows, rows[:, :1]),),
            optimizer={"encoder": factory, "head": factory},
            callbacks=[Scheduler({LearningRate("encoder"): linear_schedule(4, 0.1, 0.0)})],
            default_callbacks=False,
            seed=0,
        )

    learner, plain, other = make(torch.tensor(1e-2)), make(1e-2), make(torch.tensor(1e-2))
    learner.fit(2)
    copied = copy.deepcopy(learner)
    other.load_state_dict(learner.state_dict())
    plain.fit(4)
    for each in (learner, copied, other):
        each.fit(2)
        rates = [each.optimizer.encoder.param_groups[0]["lr"].item(), each.optimizer.head.param_groups[0]["lr"].item()]
        assert rates == pytest.approx([0.025, 1e-2])
        for mine, theirs in zip(each.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
        assert all(map(torch.equal, each.model.parameters(), learner.model.parameters()))


# A factory that gets names, or the model


def matrices_and_the_rest(named: Any) -> dict[str, torch.optim.Optimizer]:
    matrices = [parameter for _, parameter in named if parameter.ndim == 2]
    rest = [parameter for _, parameter in named if parameter.ndim != 2]
    return {
        "matrices": torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
        "rest": torch.optim.AdamW(rest, lr=0.01, fused=False),
    }


def decay_of_matrices(named: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    groups = [
        {"params": [each for _, each in named if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for _, each in named if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=False)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1))


def trained(optimizer: Any, model: nn.Module | None = None, **options: Any) -> Learner:
    torch.manual_seed(1)
    data = TensorBatches(torch.randn(24, 3), torch.randn(24, 1), batch_size=8, shuffle=True, seed=0)
    return Learner(
        small() if model is None else model,
        mse_loss,
        data=(data,),
        optimizer=optimizer,
        default_callbacks=False,
        seed=0,
        **options,
    )


@pytest.mark.parametrize("argument", ["named", "named_parameters"])
def test_a_factory_whose_first_argument_is_called_named_gets_names_and_trainable_parameters(argument: str) -> None:
    model, seen = Two(), []
    model.encoder.requires_grad_(False)

    def make(pairs: Any) -> torch.optim.Optimizer:
        seen.extend(pairs)
        return SGD([parameter for _, parameter in pairs])

    Learner(model, optimizer=eval(f"lambda {argument}: make({argument})", {"make": make}))
    assert [name for name, _ in seen] == [name for name, _ in model.named_parameters() if name.startswith("head")]
    assert [id(parameter) for _, parameter in seen] == ids(model.head)


def test_a_partial_of_such_a_factory_gets_names_too() -> None:
    learner = Learner(small(), optimizer=partial(decay_of_matrices, lr=0.5))
    assert [(len(group["params"]), group["weight_decay"]) for group in learner.optimizer.param_groups] == [
        (2, 0.1),
        (4, 0.0),
    ]
    assert learner.optimizer.defaults["lr"] == 0.5


@pytest.mark.parametrize(
    "factory",
    [
        lambda model: SGD([{"params": model.head.parameters(), "lr": 0.5}, {"params": model.encoder.parameters()}]),
        lambda model_or_params, lr=0.5: SGD(model_or_params.parameters(), lr=lr),
    ],
    ids=["model", "model_or_params"],
)
def test_a_factory_whose_first_argument_is_called_model_gets_the_module(factory: Any) -> None:
    model = Two()
    learner = Learner(model, optimizer=factory)
    assert sorted(held(learner.optimizer)) == sorted(ids(model))
    assert learner.optimizer.param_groups[0]["lr"] == 0.5


def test_a_factory_may_make_several_optimizers_of_one_model() -> None:
    learner = Learner(small(), optimizer=matrices_and_the_rest)
    assert learner.optimizer_names == ("matrices", "rest")
    assert [type(each).__name__ for each in learner.optimizer] == ["SGD", "AdamW"]


def test_several_optimizers_of_several_models_are_named_behind_their_models() -> None:
    models = {"G": small(), "D": small()}
    learner = Learner(models, optimizer={"G": matrices_and_the_rest, "D": SGD})
    assert learner.optimizer_names == ("G.matrices", "G.rest", "D")
    assert Learner(models, optimizer=matrices_and_the_rest).optimizer_names == (
        *("G.matrices", "G.rest"),
        *("D.matrices", "D.rest"),
    )


def test_several_optimizers_from_one_factory_train_as_a_loop_by_hand() -> None:
    learner = trained(matrices_and_the_rest, callbacks=[Recorder()])
    model = small()
    optimizers = matrices_and_the_rest(list(model.named_parameters()))
    batches = trained(matrices_and_the_rest)
    taken: list[tuple[Tensor, Tensor]] = []

    class Kept(TrainingPhase):
        def finish(self, learner: Any, state: Any) -> None:
            taken.append((state.xs.clone(), state.ys.clone()))

    batches.fit(2, phases=[Kept()])
    learner.fit(2)
    for xs, ys in taken:
        mse_loss(model(xs), ys).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(learner.model.parameters(), model.parameters(), strict=True))
    assert learner.history[TrainingPhase].updates == {"matrices": 6, "rest": 6}


def test_a_schedule_keeps_the_ratios_of_groups_that_a_factory_made() -> None:
    def by_layer(named: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [each], "lr": 0.5 ** (3 - int(name[0]))} for name, each in named])

    learner = trained(by_layer, callbacks=[Scheduler({LearningRate: linear_schedule(6, 1.0, 0.0)})])
    learner.fit(1)
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([rates[-1] * 0.5 ** (3 - place) for place in (0, 0, 2, 2, 3, 3)])
    assert rates[-1] == pytest.approx(1 - 2 / 6)


def test_a_run_with_several_optimizers_from_one_factory_resumes_to_the_bit() -> None:
    assert_resumes_exactly(lambda: trained(matrices_and_the_rest), at=[2, 4])


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (lambda named: SGD(named.parameters()), AttributeError),
        (lambda named: "nothing", "made 'nothing'; expected a torch.optim.Optimizer"),
        (lambda named: {"a": 3}, "made 3 as 'a'; expected a torch.optim.Optimizer, or a dict of names to them"),
        (lambda named: {3: SGD(dict(named).values())}, "names an optimizer 3; expected a text"),
        (lambda named: {}, "made a dict of length 0; expected"),
        (lambda named: SGD(named, 3, 4, 5, 6, 7, 8), "parameters with their names: .* list of pairs"),
        (lambda model: SGD(model), "of the model: .* takes the module"),
        (lambda named: {"a": SGD([named[0][1]])}, "trainable parameters are in no optimizer: 0.bias"),
    ],
    ids=["raises", "no optimizer", "no optimizer by name", "no name", "empty", "arguments", "model", "left out"],
)
def test_a_factory_that_gets_names_and_makes_something_else_is_told(factory: Any, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(OptimizerError, match=expected):
            Learner(small(), optimizer=factory)
    else:
        with pytest.raises(expected):
            Learner(small(), optimizer=factory)


def test_what_steps_one_optimizer_by_a_models_name_says_that_the_model_has_several() -> None:
    def two(named: Any) -> Any:
        parts = {name: parameter for name, parameter in named}
        return {name: torch.optim.SGD([parameter]) for name, parameter in parts.items()}

    learner = Learner({"G": nn.Linear(2, 4), "D": nn.Linear(4, 1)}, data=(torch.randn(8, 4),), optimizer=two)
    with pytest.raises(OptimizerError, match=r"'D' has the optimizers \['D.weight', 'D.bias'\].*\('D.weight'\)"):
        learner.optimizing("D")
    with pytest.raises(PhaseError, match=r"GANPhase updates 'G', and the optimizers are .*one of its name"):
        learner.fit(1, phases=[GANPhase(noise=2)])


def test_options_that_differ_between_optimizers_are_scheduled_by_the_optimizers_names() -> None:
    def two(named: Any) -> Any:
        return {name: torch.optim.SGD([parameter], momentum=0.1 * (2 - parameter.ndim)) for name, parameter in named}

    with pytest.raises(OptimizerError, match=r"alike, and they were given .*: Momentum\('weight'\)"):
        Learner(linear(), optimizer=two, callbacks=[Scheduler({Momentum: 0.5})])
    Learner(linear(), optimizer=two, callbacks=[Scheduler({Momentum("weight"): 0.5})])
