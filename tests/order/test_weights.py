from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fluxloop import (
    EMA,
    Callback,
    CallbackConflictError,
    Learner,
    ModelError,
    PhaseError,
    StepEnd,
    TrainingPhase,
    on,
)
from fluxloop.order.weights import Weights, submodule


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 3))


def data() -> tuple[Any, ...]:
    xs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return ((xs, torch.arange(8) % 3),)


def learner_of(model: Any, *callbacks: Callback) -> Learner:
    return Learner(
        model,
        cross_entropy,
        data=data(),
        optimizer=torch.optim.SGD,
        callbacks=callbacks,
        default_callbacks=False,
        seed=0,
    )


def pair() -> dict[str, nn.Module]:
    return {"G": net(), "D": nn.Linear(3, 1)}


class Pair(NamedTuple):
    G: nn.Module
    D: nn.Module


class Wrapper(nn.Module):
    """A module with parts of awkward names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 3)
        self.encoder = net()

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        return self.model(self.encoder(xs))


# Live weights


def test_a_single_model_is_called_model_and_its_parts_by_their_paths() -> None:
    learner = learner_of(net())
    assert learner.weights["model"] is learner.model
    for name, module in learner.model.named_modules():
        if name:
            assert learner.weights[name] is module
            assert learner.weights[f"model.{name}"] is module
    assert list(learner.weights) == ["model"]


@pytest.mark.parametrize("arrange", [dict, lambda models: Pair(**models)], ids=["mapping", "named tuple"])
def test_several_models_are_called_by_their_names(arrange: Callable[[Any], Any]) -> None:
    learner = learner_of(arrange(pair()))
    assert learner.weights["G"] is learner.weights["model.G"] is learner.model.G
    assert learner.weights["G.0.0"] is learner.weights["model.G.0.0"] is learner.model.G[0][0]
    assert list(learner.weights) == ["G", "D"]


def test_models_in_a_tuple_are_called_by_their_numbers() -> None:
    learner = learner_of(tuple(pair().values()))
    assert learner.weights["0"] is learner.model[0]
    assert learner.weights["0.1"] is learner.model[0][1]
    assert learner.weights["1"] is learner.model[1]


def test_a_part_that_is_called_model_is_the_part() -> None:
    learner = learner_of(Wrapper())
    assert learner.weights["model"] is learner.model
    assert learner.weights["model.encoder"] is learner.model.encoder
    assert learner.weights["model.model"] is learner.model.model


def test_a_model_that_is_called_model_among_others_has_parts() -> None:
    learner = learner_of({"model": net(), "head": nn.Linear(3, 3)}, EMA("model"))
    assert learner.weights["model"] is learner.model.model
    assert learner.weights["model.1"] is learner.model.model[1]
    assert learner.weights["head"] is learner.model.head
    assert learner.weights["model@ema"][1].weight.shape == (3, 4)
    assert "head@ema" not in learner.weights


def test_in_tells_whether_there_are_such_weights() -> None:
    weights = learner_of(pair(), EMA("G")).weights
    assert all(name in weights for name in ("G", "G.0", "model.G.1", "D", "G@ema", "G.0@ema"))
    assert not any(name in weights for name in ("H", "G.9", "D@ema", "G@slow", "model", "", "G.9@ema", "@ema"))


def test_an_unknown_name_says_what_there_is_and_what_may_be_meant() -> None:
    weights = learner_of({"generator": net(), "critic": nn.Linear(3, 1)}).weights
    with pytest.raises(ModelError, match=r"no weights 'genrator'.*\['generator', 'critic'\]; did you mean"):
        weights["genrator"]
    with pytest.raises(ModelError, match=r"no weights 'generator\.5': Sequential has no part '5', it has \['0', '1'\]"):
        weights["generator.5"]
    with pytest.raises(ModelError, match="Linear has no part 'weight', it has none"):
        weights["critic.weight"]
    with pytest.raises(ModelError, match=r"Wrapper has no part 'encodr', it has .*did you mean 'encoder'"):
        learner_of(Wrapper()).weights["encodr"]


def test_an_unknown_view_says_what_keeps_it() -> None:
    weights = learner_of(pair(), EMA("G", view="slow")).weights
    with pytest.raises(ModelError, match=r"no weights 'G@ema'.*\['G@slow'\].*EMA\('G', 0\.999\) keeps 'G@ema'"):
        weights["G@ema"]
    with pytest.raises(ModelError, match=r"the views are none.*EMA\('model', 0\.999\) keeps 'model@ema'"):
        learner_of(net()).weights["model@ema"]


def test_the_callback_to_add_keeps_the_view_that_was_asked_for() -> None:
    with pytest.raises(ModelError, match=r"no weights 'G@slow'.*EMA\('G', 0\.999, view='slow'\)"):
        learner_of(pair()).weights["G@slow"]
    with pytest.raises(PhaseError, match=r"'@slow'.*EMA\('G', 0\.999, view='slow'\)"):
        learner_of(pair()).weights.view("slow")


def test_a_part_is_found_by_its_path_alone() -> None:
    module = net()
    assert submodule(module, "", "model") is module
    assert submodule(module, "0.1", "0.1") is module[0][1]
    with pytest.raises(ModelError, match=r"'0\.in_features'"):
        submodule(module, "0.in_features", "0.in_features")


# Views


def test_a_view_is_another_module_beside_the_live_one() -> None:
    learner = learner_of(pair())
    copy = net()
    learner.weights["G@mine"] = copy
    assert learner.weights["G@mine"] is learner.weights["model.G@mine"] is copy
    assert learner.weights["G"] is learner.model.G is not copy
    assert list(learner.weights) == ["G", "D", "G@mine"]
    assert repr(learner.weights) == "Weights(G, D, G@mine)"


def test_a_part_of_a_view_is_the_views() -> None:
    learner = learner_of(pair())
    learner.weights["G@mine"] = net()
    assert learner.weights["G.0.0@mine"] is learner.weights["G@mine"][0][0]
    with pytest.raises(ModelError, match="has no part '7'"):
        learner.weights["G.7@mine"]


def test_a_view_of_a_part_is_preferred_to_the_part_of_a_view() -> None:
    for names in (("G@mine", "G.0@mine"), ("G.0@mine", "G@mine")):
        learner = learner_of(pair())
        for name in names:
            learner.weights[name] = net() if name == "G@mine" else net()[0]
        whole, part = learner.weights["G@mine"], learner.weights["G.0@mine"]
        assert part is not whole[0]
        assert learner.weights["G.1@mine"] is whole[1]


def test_a_view_of_a_model_whose_name_begins_like_anothers_is_not_the_others() -> None:
    learner = learner_of({"net": net(), "net2": nn.Linear(3, 3)})
    learner.weights["net@mine"] = net()
    assert "net2@mine" not in learner.weights


@pytest.mark.parametrize("name", ["G", "G@", "G@two words", "G@1", "H@mine", "G.9@mine"])
def test_only_a_view_of_weights_can_be_assigned(name: str) -> None:
    learner = learner_of(pair())
    with pytest.raises(ModelError):
        learner.weights[name] = net()
    assert list(learner.weights) == ["G", "D"]
    assert learner.weights["G"] is learner.model.G


def test_assigning_live_weights_says_what_can_be_assigned() -> None:
    learner = learner_of(pair())
    with pytest.raises(ModelError, match=r"weights 'G' were assigned; expected the name of a view, such as 'G@ema'"):
        learner.weights["G"] = net()
    with pytest.raises(ModelError, match=r"'G@mine' were assigned a dict of length 0; expected a torch\.nn\.Module"):
        learner.weights["G@mine"] = {}


# The models as the learner holds them, by a view


def test_arranged_by_a_view_the_models_that_have_it_stand_in_their_places() -> None:
    single = learner_of(net(), EMA("model"))
    assert single.weights.view("ema") is single.weights["model@ema"]
    for arrange in (dict, lambda models: Pair(**models)):
        learner = learner_of(arrange(pair()), EMA("G"))
        G, D = learner.weights.view("ema")  # noqa: N806 - as the paper calls them
        assert G is learner.weights["G@ema"]
        assert D is learner.model.D
        assert learner.weights.view("ema")._fields == ("G", "D")
    assert type(learner.weights.view("ema")) is Pair
    numbered = learner_of(tuple(pair().values()), EMA("0"))
    assert numbered.weights.view("ema") == (numbered.weights["0@ema"], numbered.model[1])


def test_a_view_that_no_model_has_is_refused_with_what_to_add() -> None:
    with pytest.raises(PhaseError, match=r"'@ema', and there are none; .*EMA\('G', 0\.999\)"):
        learner_of(pair()).weights.view("ema")
    with pytest.raises(PhaseError, match=r"'@ema', and there are \['G\.0@ema'\]"):
        learner_of(pair(), EMA("G.0")).weights.view("ema")


# What a callback may have of them


class Touch(Callback):
    """Does `use(learner)` at the end of each training step."""

    def __init__(self, use: Callable[[Any], object], reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> None:
        self.use = use
        self.reads = reads
        self.writes = writes
        self.found: list[Any] = []

    @on(StepEnd, TrainingPhase)
    def run(self, event: Any, phase: Any, learner: Any) -> None:
        self.found.append(self.use(learner))


def test_a_callback_keeps_a_view_of_its_own_and_another_reads_it() -> None:
    class Snapshot(Callback):
        """Keeps the weights of the last step."""

        reads = ("model",)
        writes = ("model@last",)

        def init(self, learner: Any) -> None:
            learner.weights["model@last"] = net()

        @on(StepEnd, TrainingPhase)
        def keep(self, event: Any, phase: Any, learner: Any) -> None:
            learner.weights["model@last"].load_state_dict(learner.weights["model"].state_dict())

    def same(learner: Any) -> bool:
        pairs = zip(learner.weights["model"].parameters(), learner.weights["model@last"].parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    touch = Touch(same, reads=("model", "model@last"))
    learner = learner_of(net(), touch, Snapshot())
    learner.fit(1)
    assert touch.found == [True]
    assert learner.callbacks.order == ["Snapshot", "Touch"]


def test_a_refused_callback_takes_its_view_with_it() -> None:
    class Fails(Callback):
        writes = ("model@mine",)

        def init(self, learner: Any) -> None:
            learner.weights["model@mine"] = net()
            raise RuntimeError("no")

    learner = learner_of(net(), EMA("model"))
    kept = learner.weights["model@ema"]
    with pytest.raises(RuntimeError, match="no"):
        learner.add_callback(Fails())
    assert list(learner.weights) == ["model", "model@ema"]
    assert learner.weights["model@ema"] is kept


def test_a_callback_that_is_refused_leaves_the_view_of_the_one_it_would_replace() -> None:
    learner = learner_of(net(), EMA("model", 0.5))
    kept = learner.weights["model@ema"]
    with pytest.raises(ModelError):
        learner.set_callbacks([EMA("model", 0.9), EMA("nope", view="other")])
    assert learner.weights["model@ema"] is kept
    assert learner.get_callback(EMA).decay == 0.5


class Other(Touch): ...


def test_two_writers_of_one_view_conflict() -> None:
    with pytest.raises(CallbackConflictError, match=r"'model\.G@mine'"):
        learner_of(pair(), Touch(print, writes=("model.G@mine",)), Other(print, writes=("model.G@mine",)))


def test_weights_stand_alone_without_a_learner() -> None:
    model = net()
    weights = Weights({None: model}, model)
    weights["0@mine"] = net()[0]
    assert weights["0.0@mine"].weight.shape == (4, 3)
    assert "1@mine" not in weights
