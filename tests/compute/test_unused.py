from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fluxloop.compile.graphs
from fluxloop import Accelerator, Checkpointer, Learner, TrainingPhase, Unfreeze


class Half(nn.Module):
    """Has a part that its forward uses, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.used(xs)
        return out


class Net(Half):
    """Has also a number that it uses in its second step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, xs: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(xs)
        return out * self.seldom if self.calls == 2 else out


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": torch.optim.Adam,
    "plain Adam": partial(torch.optim.Adam, fused=False),
}

MESSAGE = r"^2 parameters .* in a whole epoch, so the optimizer left them alone: unused\.weight, unused\.bias\. Use"


def learner_of(model: Any = None, optimizer: Any = torch.optim.Adam, **options: Any) -> Learner:
    torch.manual_seed(0)
    data = (torch.randn(32, 3), torch.randn(32, 1))
    model = Net() if model is None else model
    given = {"data": (data,), "default_callbacks": False, "seed": 0, **options}
    return Learner(model, mse_loss, optimizer=optimizer, **given)


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        run()
    return [str(each.message) for each in seen if "got no gradient" in str(each.message)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"optimizer_in_backward": True}, {"compile": "step"}], ids=str
)
def test_parameters_without_a_gradient_are_named_once(
    optimizer: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Run as it was traced: the compiler takes seconds
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
    data = (torch.randn(128, 3), torch.randn(128, 1))
    learner = learner_of(Half(), OPTIMIZERS[optimizer], data=(data,), accelerator=Accelerator("cpu", **options))
    with pytest.warns(UserWarning, match=MESSAGE):
        learner.fit(1)
    assert told(lambda: learner.fit(2)) == []


def test_a_part_that_is_used_in_one_step_of_many_is_not_named() -> None:
    for optimizer in OPTIMIZERS.values():
        model = Net()
        model.unused.requires_grad_(False)
        learner = learner_of(model, optimizer, data=((torch.randn(128, 3), torch.randn(128, 1)),))
        assert told(lambda learner=learner: learner.fit(2)) == []
        assert model.calls == 8


def test_nothing_is_said_where_all_get_gradients() -> None:
    assert told(lambda: learner_of(nn.Linear(3, 1)).fit(2)) == []


class Turns(TrainingPhase):
    """Trains one network in the first epoch, and then both."""

    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        names = ["D"] if learner.history.cycles == 0 else ["D", "G"]
        for name in names:
            with learner.optimizing(name) as block:
                block.loss = getattr(learner.model, name).used(state.xs).square().mean()


def test_each_optimizer_is_judged_after_its_first_turn() -> None:
    models = {"G": Half(), "D": Half()}
    learner = learner_of(models)
    first, second = told(lambda: learner.fit(4, phases=[Turns()]))
    assert "2 parameters" in first
    assert "D.unused.weight, D.unused.bias. " in first
    assert "2 parameters" in second
    assert "G.unused.weight, G.unused.bias. " in second


class OnlyUsed(TrainingPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        with learner.optimizing() as block:
            block.loss = learner.model.used(state.xs).square().mean()


class OnlyUnused(TrainingPhase):
    def __init__(self, every: int) -> None:
        self.every = every

    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        with learner.optimizing() as block:
            block.loss = learner.model.unused(state.xs).square().mean()


@pytest.mark.parametrize("every", [1, 3])
def test_what_another_phase_of_the_fit_trains_is_not_named(every: int) -> None:
    learner = learner_of()
    (found,) = told(lambda: learner.fit(4, phases=[OnlyUsed(), OnlyUnused(every)]))
    assert found.startswith("a parameter that is to be trained got no gradient")
    assert "left it alone: seldom. " in found


def test_a_copy_of_a_learner_that_has_told_does_not_tell_again() -> None:
    learner = learner_of()
    assert len(told(lambda: learner.fit(1))) == 1
    assert told(lambda: copy.deepcopy(learner).fit(1)) == []


def test_frozen_parts_and_those_that_are_unfrozen_later_are_not_named() -> None:
    learner = learner_of(Half(), callbacks=[Unfreeze({"unused*": 1})])
    assert told(lambda: learner.fit(3)) == []


def test_a_run_that_was_killed_says_it_in_its_first_whole_epoch(tmp_path: Any) -> None:
    class KilledError(Exception):
        pass

    class Dies(Net):
        def forward(self, xs: Tensor) -> Tensor:
            if self.calls == 3 and self.training and self.dies:
                raise KilledError
            return super().forward(xs)

    data = ((torch.randn(128, 3), torch.randn(128, 1)),)
    for dies in (True, False):
        model = Dies()
        model.dies = dies
        keeper = Checkpointer(tmp_path / "run", every=1, unit="step")
        learner = learner_of(model, data=data, callbacks=[keeper], default_callbacks=True)
        if dies:
            with pytest.raises(KilledError):
                learner.fit(2, resume=tmp_path / "run")
        else:
            found = told(lambda learner=learner: learner.fit(3, resume=tmp_path / "run"))
            assert len(found) == 1
            assert "unused.weight, unused.bias" in found[0]


def test_many_names_are_shortened() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 1)
            self.parts = nn.ModuleList(nn.Linear(1, 1) for _ in range(8))

        def forward(self, xs: Tensor) -> Tensor:
            out: Tensor = self.used(xs)
            return out

    (found,) = told(lambda: learner_of(Wide()).fit(1))
    assert "16 parameters that are to be trained" in found
    assert "parts.0.weight, parts.0.bias, parts.1.weight, parts.1.bias, parts.2.weight and 11 more" in found


def test_lazy_parts_are_not_taken_for_unused_ones() -> None:
    assert told(lambda: learner_of(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))).fit(1)) == []
