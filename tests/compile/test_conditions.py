from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import Scale, both, graphs, learner, learner_of, rows, weights
from torch import Tensor, nn
from torch.nn import functional

from fluxloop import (
    Accelerator,
    Attribute,
    Callback,
    CompileError,
    Scheduler,
    StepBegin,
    StepEnd,
    TrainingPhase,
    linear,
    on,
    runepoch,
)
from fluxloop.compile.conditions import form_of_entries, has_form
from fluxloop.state import StepState

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_modes_attributes_and_frozen_parameters_are_compared_at_each_epoch() -> None:
    model = lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.LeakyReLU(0.1))  # noqa: E731
    changes: list[Callable[[nn.Sequential], object]] = [
        lambda model: setattr(model[3], "negative_slope", 0.5),
        lambda model: model[0].requires_grad_(False),
        lambda model: setattr(model[1], "momentum", 0.5),
        lambda model: model[2].weight.data.mul_(0.5),
        lambda model: setattr(model[2].bias, "data", model[2].bias.data + 1),
    ]
    for change in changes:
        made = [learner(compile, model=model) for compile in (False, "step")]
        for each in made:
            each.fit(2)
            change(each.model)
            each.fit(2)
        for a, b in zip(*map(weights, made), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:the step of TrainingPhase has been compiled")
def test_a_callback_that_changes_the_model_between_steps_is_seen() -> None:
    class Slope(Callback):
        writes = ("model",)

        @on(StepBegin, TrainingPhase)
        def change(self, event: Any, phase: Any, learner: Any) -> None:
            learner.model[1].negative_slope += 0.1

    model = lambda: nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))  # noqa: E731
    both(3, model=model, callbacks=lambda: [Slope()])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_in_a_loop_of_ones_own_the_model_is_compared_at_every_step() -> None:
    found = []
    for compile in (False, "step"):
        model = lambda: nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))  # noqa: E731
        made, phase, (xs, ys) = learner(compile, model=model), TrainingPhase(), rows()
        with runepoch(made, phase):
            for _ in range(5):
                made.model[1].negative_slope += 0.1
                phase.step(made, (xs, ys))
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Annealed:
    """A loss function with a number."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, preds: Tensor, ys: Tensor) -> Tensor:
        return functional.cross_entropy(preds, ys) * self.weight


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made.model, "act", nn.Sigmoid()),
        lambda made: setattr(made.model.config, "scale", 3.0),
        lambda made: setattr(made, "loss_fn", partial(functional.cross_entropy, label_smoothing=0.5)),
        lambda made: setattr(made.loss_fn, "weight", 0.1),
        lambda made: made.model.double() and setattr(made, "loss_fn", lambda p, ys: functional.cross_entropy(p, ys)),
        lambda made: made.optimizer.param_groups[0].update(lr=torch.tensor(0.01)),
        lambda made: made.optimizer.load_state_dict(made.optimizer.state_dict()),
        lambda made: made.optimizer.param_groups[0].update(momentum=0.5),
        lambda made: torch.optim.lr_scheduler.StepLR(made.optimizer, 1),
        lambda made: setattr(made.model.layer.weight, "data", made.model.layer.weight.data.t().contiguous().t()),
    ],
    ids=["part", "config", "loss", "loss's number", "dtype", "rate", "state", "option", "scheduler", "strides"],
)
def test_what_changes_between_fits_is_noticed(change: Any) -> None:
    xs, ys = torch.randn(24, 6), torch.randint(3, (24,))

    class Converted(TrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch[0].to(next(iter(weights)).dtype), "ys": batch[1]}

    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        made = learner_of(Scale(), accelerator=Accelerator("cpu", compile=compile), data=([(xs[:8], ys[:8])] * 3,))
        made.loss_fn = Annealed(1.0)
        weights = list(made.model.parameters())
        made.fit(2, phases=[Converted()])
        change(made)
        made.fit(2, phases=[Converted()])
        found.append([parameter.detach().clone() for parameter in made.model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


class Finishing(TrainingPhase):
    """Changes something in finish, after every step."""

    def __init__(self, change: Callable[[Any, Any], object]) -> None:
        self.change = change
        self.options, self.center = {"weight": 1.0}, torch.zeros(3)

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        preds = learner.model(state.xs)
        self.center = 0.5 * self.center + preds.detach().mean(0)
        state.preds = preds - self.center
        state.loss = learner.loss_fn(state.preds, state.ys) * self.options["weight"]
        learner.backward(state.loss)
        learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.change(self, learner)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "change",
    [
        lambda phase, learner: None,
        lambda phase, learner: phase.options.update(weight=phase.options["weight"] * 0.5),
        lambda phase, learner: setattr(learner.model.config, "scale", learner.model.config.scale * 0.9),
        lambda phase, learner: learner.model.layer.bias.requires_grad_(not learner.model.layer.bias.requires_grad),
        lambda phase, learner: setattr(phase, "center", phase.center + 1),
    ],
    ids=["nothing", "its own", "a model's", "frozen", "a tensor"],
)
@pytest.mark.filterwarnings("ignore:the step of Finishing has been compiled")
def test_what_finish_changes_is_noticed_and_a_tensor_that_the_body_replaces_is_kept(change: Any) -> None:
    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        made = learner_of(Scale(), accelerator=Accelerator("cpu", compile=compile))
        phase = Finishing(change)
        made.fit(3, phases=[phase])
        found.append((*made.model.parameters(), phase.center))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_an_attribute_that_a_schedule_sets_is_noticed_although_nobody_says_what_it_writes() -> None:
    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        model = Scale()
        rate = Scheduler({Attribute(model.config, "scale"): linear(6, 1.0, 0.1)})
        made = learner_of(model, accelerator=Accelerator("cpu", compile=compile), callbacks=[rate])
        made.fit(2)
        found.append(list(model.parameters()))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


class Resets(Callback):
    """Puts other tensors in the place of an optimizer's state."""

    reads = writes = ("optimizer",)

    @on(StepEnd, TrainingPhase)
    def reset(self, event: Any, phase: Any, learner: Any) -> None:
        for state in learner.optimizer.state.values():
            state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])


@pytest.mark.usefixtures("uncompiled")
def test_state_that_a_callback_replaces_after_a_step_is_the_next_steps() -> None:
    both(2, callbacks=lambda: [Resets()])


class Gives(Callback):
    """Puts a gradient there that nobody computed, before some steps."""

    reads = writes = ("model",)
    count = 0

    @on(StepBegin, TrainingPhase)
    def give(self, event: Any, phase: Any, learner: Any) -> None:
        self.count += 1
        if self.count % 3 == 0:
            learner.model[0].weight.grad = torch.ones_like(learner.model[0].weight)


@pytest.mark.usefixtures("uncompiled")
def test_a_gradient_that_nobody_computed_is_added_to_and_told() -> None:
    with pytest.warns(UserWarning, match=r"0.weight had a gradient that learner.backward did not compute.*zero_grad"):
        both(3, callbacks=lambda: [Gives()])


class Doubling(Tensor):
    """Of which a layer computes twice as much."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func is functional.linear else found


class Named(Tensor):
    """A tensor with a name of its own."""


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("first", [0, 3], ids=["always", "later"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda xs: torch.complex(xs, xs).conj().imag, r"'xs' holds a view of conjugated.*resolve_neg"),
        (lambda xs: xs.as_subclass(Doubling), r"'xs' holds a Doubling.*as_subclass\(torch.Tensor\)"),
    ],
    ids=["negative", "subclass"],
)
def test_a_batch_that_says_more_than_its_memory_is_refused(first: int, change: Any, told: str) -> None:
    xs, ys = rows()
    data = [(xs[:8], ys[:8])] * first + [(change(xs[:8]), ys[:8])] * 2
    with pytest.raises(CompileError, match=told):
        learner(data=(data,)).fit(1)
    learner(False, data=(data,)).fit(1)


@pytest.mark.usefixtures("plain")
def test_a_subclass_of_tensors_that_changes_nothing_has_a_graph_of_its_own() -> None:
    xs, ys = rows()
    kinds = [Tensor, Tensor, Named, Named]
    data = [(xs[:8].as_subclass(kind), ys[:8]) for kind in kinds]
    both(2, data=(data,))
    made = learner(data=(data,))
    made.fit(1)
    assert graphs(made) == 2


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"xs": torch.zeros(4, 2), "ys": torch.zeros(4)},
    "of another shape": lambda: {"xs": torch.zeros(3, 2), "ys": torch.zeros(3)},
    "of other strides": lambda: {"xs": torch.zeros(2, 4).T, "ys": torch.zeros(4)},
    "of another type": lambda: {"xs": torch.zeros(4, 2), "ys": torch.zeros(4, dtype=torch.long)},
    "requiring gradients": lambda: {"xs": torch.zeros(4, 2, requires_grad=True), "ys": torch.zeros(4)},
    "of other names": lambda: {"xs": torch.zeros(4, 2), "zs": torch.zeros(4)},
    "one": lambda: {"xs": torch.zeros(4, 2)},
    "one twice": lambda: dict.fromkeys(("xs", "ys"), torch.zeros(4)),
    "views": lambda: {"views": (torch.zeros(4, 2), torch.zeros(4, 2))},
    "views in a list": lambda: {"views": [torch.zeros(4, 2), torch.zeros(4, 2)]},
    "three views": lambda: {"views": (torch.zeros(4, 2),) * 3},
    "views of other sizes": lambda: {"views": (torch.zeros(4, 2), torch.zeros(4, 3))},
    "views of other strides": lambda: {"views": (torch.zeros(4, 2), torch.zeros(2, 4).T)},
    "views that require gradients": lambda: {"views": (torch.zeros(4, 2), torch.zeros(4, 2, requires_grad=True))},
    "parameters": lambda: {"views": (torch.zeros(4, 2), nn.Parameter(torch.zeros(4, 2), requires_grad=False))},
    "views in views": lambda: {"views": (torch.zeros(4, 2), (torch.zeros(4, 2),))},
    "views and a number": lambda: {"views": (torch.zeros(4, 2), 1)},
    "numbers": lambda: {"views": (torch.zeros(4, 2), torch.zeros(4, 2)), "index": 1},
    "an empty tuple": lambda: {"views": ()},
}


def test_the_quick_look_at_a_step_agrees_with_the_thorough_one() -> None:
    cpu = torch.device("cpu")
    forms = {name: form_of_entries(StepState(make()), cpu) for name, make in BATCHES.items()}
    found = {name: [other for other in forms if has_form(make(), forms[other], cpu)] for name, make in BATCHES.items()}
    slow = {"one twice", "views in a list", "parameters", "views in views", "views and a number", "numbers"}
    alike = {name: [other for other in forms if forms[other] == forms[name]] for name in BATCHES}
    assert found == {name: [] if name in slow else alike[name] for name in BATCHES}
    assert alike["views"] == ["views", "parameters"]
    assert all(alike[name] == [name] for name in BATCHES if name not in ("views", "parameters"))


@pytest.mark.parametrize(
    "refused", [lambda xs: xs.to_sparse(), lambda xs: torch.nested.nested_tensor([*xs]), lambda xs: torch._neg_view(xs)]
)
@pytest.mark.parametrize("place", ["alone", "in a tuple"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_quick_look_leaves_what_is_refused_to_the_thorough_one(refused: Any, place: str) -> None:
    cpu, xs = torch.device("cpu"), torch.eye(4)
    wrap = (lambda value: {"xs": value}) if place == "alone" else (lambda value: {"views": (value, xs.clone())})
    form = form_of_entries(StepState(wrap(xs)), cpu)
    assert has_form(wrap(torch.eye(4)), form, cpu)
    assert not has_form(wrap(refused(xs)), form, cpu)
    with pytest.raises(CompileError, match="expected"):
        form_of_entries(StepState(wrap(refused(xs))), cpu)
