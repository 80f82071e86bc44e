from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fluxloop import Learner, ModelError
from fluxloop.compute.models import arrange_like, by_name, named_parts
from fluxloop.compute.optimizers import owned_parameters

SGD = partial(torch.optim.SGD, lr=0.1)


class Networks(NamedTuple):
    generator: nn.Module
    critic: nn.Module


def linear(frozen: bool = False) -> nn.Module:
    return nn.Linear(2, 3).requires_grad_(not frozen)


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for parameter in owned_parameters(optimizer)]


def ids(*modules: nn.Module) -> list[int]:
    return [id(parameter) for module in modules for parameter in module.parameters()]


def message(model: Any, optimizer: Any, error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        Learner(model, optimizer=optimizer)
    return str(raised.value)


def test_a_single_model_its_parameters_and_its_optimizer_stand_alone() -> None:
    model = linear()
    learner = Learner(model, optimizer=SGD)
    assert learner.model is model
    assert [id(p) for p in learner.params] == ids(model)
    assert isinstance(learner.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("given", ["dict", "named tuple"])
def test_named_models_give_their_names_to_parameters_and_optimizers(given: str) -> None:
    generator, critic = linear(), nn.Linear(3, 1)
    models: Any = Networks(generator, critic) if given == "named tuple" else {"generator": generator, "critic": critic}
    learner = Learner(models, optimizer=SGD)
    assert learner.model.generator is generator
    assert [id(p) for p in learner.params.critic] == ids(critic)
    assert held(learner.optimizer.critic) == ids(critic)
    assert [module is expected for module, expected in zip(learner.model, (generator, critic), strict=True)] == [
        True
    ] * 2
    first, second = learner.params
    assert [id(p) for p in (*first, *second)] == ids(generator, critic)
    assert isinstance(learner.model, Networks) is (given == "named tuple")


def test_models_in_a_tuple_are_found_by_their_place() -> None:
    one, two = linear(), linear()
    learner = Learner((one, two), optimizer=SGD)
    assert learner.model == (one, two)
    assert [[id(p) for p in params] for params in learner.params] == [ids(one), ids(two)]
    assert [held(optimizer) for optimizer in learner.optimizer] == [ids(one), ids(two)]
    assert learner.optimizer_names == ("0", "1")
    assert held(learner.optimizing(1).slot.optimizer) == held(learner.optimizing("1").slot.optimizer) == ids(two)


def test_the_optimizer_of_a_model_in_a_tuple_stands_at_the_models_place_although_another_is_frozen() -> None:
    teacher, student = linear(frozen=True), linear()
    learner = Learner((teacher, student), optimizer=SGD)
    assert learner.optimizer_names == ("1",)
    assert held(learner.optimizer[1]) == ids(student)


def test_a_mapping_with_one_model_keeps_its_name() -> None:
    model = linear()
    learner = Learner({"encoder": model}, optimizer=SGD)
    assert learner.model.encoder is model
    assert learner.optimizer_names == ("encoder",)
    assert held(learner.optimizer.encoder) == ids(model)
    assert list(learner.updates.gradients) == ["encoder.weight", "encoder.bias"]


@pytest.mark.parametrize("name", ["class", "lambda", "def"])
def test_a_model_named_with_a_keyword_is_an_error_that_says_so(name: str) -> None:
    text = message({name: linear()}, SGD, ModelError)
    assert repr(name) in text


@pytest.mark.parametrize("name", ["class", "lambda"])
def test_an_optimizer_named_with_a_keyword_can_be_used_by_name(name: str) -> None:
    model = linear()
    learner = Learner(model, optimizer={name: SGD(model.parameters())})
    assert held(learner.optimizer[name]) == ids(model)


@pytest.mark.parametrize("name", ["count", "index"])
def test_a_model_may_not_be_named_as_a_method_of_tuples(name: str) -> None:
    with pytest.raises(ModelError, match=rf"a model is named '{name}', which is a method of the tuple"):
        Learner({name: linear(), "other": linear()}, optimizer=SGD)


def test_a_name_that_is_too_long_for_a_file_is_refused_when_the_learner_is_made() -> None:
    with pytest.raises(ModelError, match=r"a model's name has 300 bytes, 'a{20}…'; expected 200 at most"):
        Learner({"a" * 300: linear(), "other": linear()}, optimizer=SGD)
    assert Learner({"a" * 200: linear(), "other": linear()}, optimizer=SGD).model._fields[0] == "a" * 200


def test_a_single_model_stands_for_itself() -> None:
    model = nn.Linear(2, 3)
    learner = Learner(model)
    assert learner.model is model
    assert [id(p) for p in learner.params] == [id(p) for p in model.parameters()]
    assert isinstance(learner.optimizer, torch.optim.Adam)
    assert learner.optimizer_names == (None,)
    assert learner.modules() == [model]


@pytest.mark.parametrize("as_named_tuple", [False, True])
def test_named_models_have_their_parameters_and_optimizers_under_their_names(as_named_tuple: bool) -> None:
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    models = Networks(generator, critic) if as_named_tuple else {"generator": generator, "critic": critic}
    learner = Learner(models, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert learner.model.generator is generator
    assert learner.model.critic is critic
    assert isinstance(learner.model, Networks) is as_named_tuple
    assert [id(p) for p in learner.params.critic] == [id(p) for p in critic.parameters()]
    held = learner.optimizer.generator.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in generator.parameters()]
    assert learner.optimizer_names == ("generator", "critic")
    a, b = learner.model
    assert (a, b) == (generator, critic)


def test_a_tuple_of_models_stays_a_tuple() -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    learner = Learner((first, second))
    assert learner.model[0] is first
    assert learner.model[1] is second
    assert isinstance(learner.optimizer[1], torch.optim.Adam)
    assert learner.optimizing(1).slot.optimizer is learner.optimizer[1]


def test_names_that_are_no_identifiers_are_items() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    learner = Learner(model, optimizer={"0": torch.optim.Adam, "1.0": torch.optim.SGD})
    assert isinstance(learner.optimizer["1.0"], torch.optim.SGD)


@pytest.mark.parametrize("given", ["single", "tuple", "named tuple", "mapping"])
def test_what_is_held_by_name_is_listed_with_its_names(given: str) -> None:
    one, two = linear(), nn.Linear(3, 1)
    models: Any = {
        "single": one,
        "tuple": (one, two),
        "named tuple": Networks(one, two),
        "mapping": {"generator": one, "critic": two},
    }[given]
    learner = Learner(models, optimizer=SGD)
    assert by_name(learner.model) == list(learner.models.items())
    assert [name for name, _ in by_name(learner.optimizer)] == list(learner.optimizer_names)
    assert [held(optimizer) for _, optimizer in by_name(learner.optimizer)] == [ids(m) for m in learner.models.values()]


def test_a_frozen_model_in_a_tuple_has_no_optimizer_to_list() -> None:
    learner = Learner((linear(frozen=True), linear()), optimizer=SGD)
    assert by_name(learner.optimizer) == [("1", learner.optimizer[1])]


def test_optimizers_whose_names_are_no_identifiers_are_listed_too() -> None:
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    assert by_name(arrange_like(linear(), {"body.weight": optimizer})) == [("body.weight", optimizer)]


def test_parts_have_the_names_that_weights_have() -> None:
    single, several = Learner(nn.Sequential(linear()), optimizer=SGD), Learner({"G": linear(), "D": linear()})
    for learner, names in ((single, ["model", "0"]), (several, ["G", "D"])):
        named = dict(named_parts(learner.model, nn.Module.named_modules))
        assert list(named) == names
        assert all(learner.weights[name] is module for name, module in named.items())
    assert [name for name, _ in named_parts(several.model, nn.Module.named_parameters)] == [
        "G.weight",
        "G.bias",
        "D.weight",
        "D.bias",
    ]
