"""Hooks of users are refused before a step runs, by name; those of fluxloop's callbacks have a step run as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import Model, graphs, learner, learner_of
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fluxloop import CompileError, Recorder, SampleImages, StepEnd, TrainingPhase, on
from fluxloop.callback import Callback

pytestmark = pytest.mark.usefixtures("imported", "uncompiled")


def watch(*_: Any) -> None:
    """Look at what a module, a parameter or an optimizer tells."""


class Watcher:
    """Looks, too."""

    def __call__(self, *_: Any) -> None:
        """Look."""

    def look(self, *_: Any) -> None:
        """Look."""


HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda m: m.layer.register_forward_hook(watch), r"Linear \(test_hooks.watch\)"),
    "before forward": (lambda m: m.register_forward_pre_hook(partial(watch, 1)), r"Model \(test_hooks.watch\)"),
    "backward": (lambda m: m.layer.register_full_backward_hook(Watcher().look), r"Linear \(.*Watcher.look\)"),
    "before backward": (lambda m: m.layer.register_full_backward_pre_hook(watch), r"Linear \(test_hooks.watch\)"),
    "gradient": (lambda m: m.layer.weight.register_hook(Watcher()), r"layer.weight \(test_hooks.Watcher\)"),
    "accumulated": (lambda m: m.layer.bias.register_post_accumulate_grad_hook(watch), r"layer.bias \(test_hooks.watch"),
    "all modules": (lambda m: nn.modules.module.register_module_forward_hook(watch), r"all modules .*test_hooks.watch"),
    "all optimizers": (
        lambda m: register_optimizer_step_post_hook(watch),
        r"all optimizers .*test_hooks.watch",
    ),
}


def model() -> Model:
    return Model(lambda model, out: out)


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_is_refused_when_the_learner_is_made_and_when_a_fit_begins(kind: str) -> None:
    register, named = HOOKS[kind]
    hooked = model()
    made = learner_of(hooked)
    handle = register(hooked)
    try:
        with pytest.raises(CompileError, match=f"there are hooks on {named}"):
            learner_of(hooked)
        before = [parameter.clone() for parameter in made.model.parameters()]
        with pytest.raises(CompileError, match=f"there are hooks on {named}"):
            made.fit(1)
        assert all(map(torch.equal, before, made.model.parameters()))
    finally:
        handle.remove()
    made.fit(1)
    assert graphs(made) == 1


def test_hooks_of_an_optimizer_are_refused() -> None:
    made = learner_of(model())
    made.optimizer.register_step_post_hook(watch)
    with pytest.raises(CompileError, match=r"there are hooks on the optimizer .*test_hooks.watch"):
        made.fit(1)


def test_a_hook_that_a_callback_registers_in_the_middle_is_refused_in_that_step() -> None:
    class Late(Callback):
        reads = ("model",)

        @on(StepEnd, TrainingPhase)
        def hook(self, event: Any, phase: Any, learner: Any) -> None:
            learner.model.layer.register_forward_hook(watch)

    made = learner_of(model(), callbacks=[Late()])
    with pytest.raises(CompileError, match=r"TrainingPhase.* there are hooks on Linear \(test_hooks.watch\)"):
        made.fit(1)


def test_a_look_of_a_built_in_callback_has_one_step_run_as_it_is() -> None:
    made = learner(model=lambda: nn.Sequential(nn.Linear(16, 4)), default_callbacks=False)
    made.fit(1, phases=[TrainingPhase()])
    images = SampleImages("model", shape=(1, 2, 2), folder=None)
    made.set_callbacks([Recorder(), images])
    made.fit(1, phases=[TrainingPhase()])
    assert isinstance(images._inputs[0], Tensor)
    assert graphs(made) > 0
