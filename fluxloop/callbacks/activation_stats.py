"""Watch how a network's activations are distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from fluxloop.callback import Callback, on
from fluxloop.callbacks.recorder import Recorder
from fluxloop.compute.models import named_parts
from fluxloop.compute.recompute import is_recomputing
from fluxloop.errors import ModelError, did_you_mean
from fluxloop.events import EpochBegin, StepBegin
from fluxloop.guard.given import as_plain, number, texts
from fluxloop.nested import tensors
from fluxloop.phase import AbstractTrainingPhase


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


@define
class ActivationStats(Callback):
    """Record the mean, the standard deviation and the share of zeros of what modules compute.

    ``cbstate.activations["encoder.0"]`` is a list of (step from 1, mean, std, zeros), one entry for
    each time the module ran in that training step. Of several outputs the first tensor counts.
    Activations that vanish, explode or die show there before the loss does (fastai's
    ``ActivationStats``).

    Modules have hooks in the recorded steps alone; the others cost nothing. Nothing waits for the
    device.

    Args:
        pattern: Names of modules, as ``learner.weights`` knows them (``"encoder.0"``; a single model's parts
            ``"0"``, ``"layer1.conv"``), or several. With a wildcard (``"*"``, ``"encoder.*"``) it
            means those that have no parts of their own.
        every: Record the first step and every so many.
        near: What counts as zero: at most so far from it.

    Raises:
        ModelError: No module matches.
        ValueError: `every` is less than 1.

    Reads: model, cbstate.history
    Writes: cbstate.activations
    Runs after: Recorder

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> data = ((torch.randn(64, 4), torch.randn(64, 1)),)
        >>> learner = Learner(model, torch.nn.functional.mse_loss, data=data, default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), ActivationStats("1", every=1)])
        >>> history = learner.fit(1)
        >>> [(step, zeros > 0) for step, mean, std, zeros in learner.cbstate.activations["1"]]
        [(1, True), (2, True)]
    """

    pattern: str | Sequence[str] = field(default="*", converter=as_plain, validator=texts)
    every: int = field(default=10, kw_only=True, validator=number(least=1, whole=True))
    near: float = field(default=0.0, kw_only=True)
    _waits: dict[type, int] = field(factory=dict, init=False, repr=False)
    """How many steps of a phase need not be looked at."""

    reads = ("model", "cbstate.history")
    writes = ("cbstate.activations",)
    run_after = (Recorder,)
    transient = ("_waits",)
    draws = False
    _fixed = ("pattern",)
    in_compiled_step = "never"  # it hooks modules

    def init(self, learner: Any) -> None:
        """Look for the modules, and publish the statistics, once."""
        self._modules(learner)
        if "activations" not in learner.cbstate:
            learner.cbstate.activations = {}

    def _modules(self, learner: Any) -> dict[str, nn.Module]:
        """Find the modules to watch, by name.

        Raises:
            ModelError: A pattern matches none.
        """
        named = dict(named_parts(learner.model, nn.Module.named_modules))
        found: dict[str, nn.Module] = {}
        for pattern in _patterns(self.pattern):
            leaves = {name: module for name, module in named.items() if not list(module.children())}
            matching = {name: module for name, module in leaves.items() if fnmatchcase(name, pattern)}
            if pattern in named:
                matching[pattern] = named[pattern]
            if not matching:
                raise ModelError(
                    f"ActivationStats({pattern!r}) matches no module; there are {list(named)[:20]}"
                    f"{did_you_mean(pattern, named)}"
                )
            found |= matching
        return found

    @on(EpochBegin, AbstractTrainingPhase)
    def count_anew(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Look at the next step: the counts may be those of a checkpoint."""
        self._waits.clear()

    @on(StepBegin, AbstractTrainingPhase)
    def watch(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Hook the modules for a step that is to be recorded."""
        wait = self._waits.get(type(phase), 0)
        if wait:
            self._waits[type(phase)] = wait - 1
            return
        step = learner.cbstate.history[phase].steps
        self._waits[type(phase)] = -(step + 1) % self.every  # a cancelled step is not counted: too few at worst
        if step % self.every:
            return
        for name, module in self._modules(learner).items():
            learner.defer(module.register_forward_hook(self._hook(learner, name, step + 1)).remove)

    def _hook(self, learner: Any, name: str, step: int) -> Callable[..., None]:
        def record(module: nn.Module, given: Any, made: Any) -> None:
            if not torch.is_grad_enabled() or is_recomputing():  # somebody watches inside the step, or a second time
                return
            values = next(tensors(made), None)
            if values is None or not values.numel():
                return
            numbers: list[float] = []

            def arrive(value: float) -> None:
                numbers.append(value)
                if len(numbers) == 3:
                    learner.cbstate.activations.setdefault(name, []).append((step, *numbers))

            for statistic in statistics(values, self.near):
                learner.host(statistic, arrive)

        return record


@torch.no_grad()
def statistics(values: Tensor, near: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the standard deviation and the share of zeros of a tensor, as scalars on its device.

    Args:
        values: Any shape, at least one number; of complex ones the magnitudes count.
        near: What counts as zero: at most so far from it.
    """
    values = values.detach()
    values = values.abs() if values.is_complex() else values
    values = values if values.dtype == torch.float64 else values.float()
    std, mean = torch.std_mean(values, correction=0)
    return mean, std, (values.abs() <= near).to(values.dtype).mean()
