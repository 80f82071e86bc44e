"""Check data, model and loss before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback, on
from fluxloop.compute.models import by_name, to_device_of
from fluxloop.compute.modes import watching
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import SanityCheckError, describe, sentence, warn_user
from fluxloop.events import EpochBegin
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.randomness import preserved


@fields_of_the_class
@frozen
class Check:
    """One check.

    Args:
        name: What is checked, in a few words.
        run: Called with the learner view of this callback; raises (anything) where the check fails.
        hint: What to do about a failure.
        severity: ``"error"`` ends the fit, ``"warning"`` only warns.

    Example:
        >>> check = Check("rows are scaled", lambda learner: 1 / 0, hint="divide by the deviation", severity="warning")
        >>> check.name, check.severity
        ('rows are scaled', 'warning')
    """

    name: str
    run: Callable[[Any], object]
    hint: str = ""
    severity: str = field(default="error")

    @severity.validator
    def _check_severity(self, attribute: object, value: str) -> None:
        if value not in ("error", "warning"):
            raise ValueError(f"severity={value!r} was given; expected 'error' or 'warning'")


class SanityCheck(Callback):
    """Run checks once, at the first training epoch, and report every one that failed.

    The default checks are: there is training data; there is validation data (a warning); the
    parameters are finite; and, for a single model with a loss function, batches unpack into
    ``(xs, ys)`` and model and loss give a number for one. Where these pass, one step of every
    phase of the fit is run on the side, as ``learner.check()`` does, so that an error in a
    validation phase is found before the first training epoch and not after it.

    The checks leave model, phases, data order and random numbers as they were. Data that can be iterated
    only once is not looked into.

    Args:
        checks: Further checks.
        defaults: Whether to run the default checks too.
        name: Tells two of them apart.

    Reads: data, model, loss_fn

    Example:
        >>> def scaled(learner):
        ...     rows, _ = next(iter(learner.data.training))
        ...     if rows.abs().max() > 10:
        ...         raise ValueError("a row has numbers above 10")
        >>> learner = testing.toy_learner(SanityCheck(Check("scale", scaled, hint="divide by 100")))
        >>> try:
        ...     learner.fit(1)
        ... except SanityCheckError as error:
        ...     print(error)
        sanity check before the first step:
          error: scale: a row has numbers above 10. divide by 100
    """

    reads = ("data", "model", "loss_fn")
    draws = False

    def __init__(self, *checks: Check, defaults: bool = True, name: str | None = None) -> None:
        for check in checks:
            if not isinstance(check, Check):
                raise TypeError(
                    f"SanityCheck({describe(check)}) was given; expected checks: Check('name', lambda learner: ...)"
                )
        super().__init__(name=name)
        self.checks = (*(default_checks() if defaults else ()), *checks)
        self._defaults = defaults
        self._done = False

    def init(self, learner: Any) -> None:
        """Check this learner anew."""
        self._done = False

    @on(EpochBegin, AbstractTrainingPhase)
    def check(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Run the checks, the first time."""
        if self._done:
            return
        failed: list[str] = []
        fatal = False
        for check in self.checks:
            try:
                with preserved():
                    check.run(learner)
            except Exception as error:
                failed.append(f"{check.severity}: {check.name}: {sentence(error)} {check.hint}".rstrip())
                fatal = fatal or check.severity == "error"
        if self._defaults and not fatal:
            for problem in _of_phases(learner):
                failed.append(f"{problem.severity}: {problem}")
                fatal = fatal or problem.severity == "error"
        report = "sanity check before the first step:\n" + "\n".join(f"  {line}" for line in failed)
        if fatal:
            raise SanityCheckError(report)
        self._done = True
        if failed:
            warn_user(report)

    def __repr__(self) -> str:
        return f"SanityCheck({', '.join(check.name for check in self.checks)})"


def _of_phases(learner: Any) -> list[Any]:
    """Run a step of each phase of the running fit on the side, and return what is wrong with them."""
    models = [model for _, model in by_name(learner.model)]
    losses = (learner.loss_fn,) if isinstance(learner.loss_fn, nn.Module) else ()
    if any(is_lazy(parameter) for module in (*models, *losses) for parameter in module.parameters()):
        return []
    problems = learner.check(phases=learner.fit_phases or None)
    return [problem for problem in problems if problem.severity != "skipped"]


def default_checks() -> tuple[Check, ...]:
    """Make the checks that `SanityCheck` runs by default."""
    return (
        Check("training data", lambda learner: _data(learner, "training"), "Give data=(train, valid)."),
        Check(
            "validation data",
            lambda learner: _data(learner, "validation"),
            "Without it nothing tells whether the model generalises.",
            "warning",
        ),
        Check("parameters are finite", _finite, "Look at the initialisation, or at what was loaded."),
        Check("model and loss on one batch", _one_batch, "The built-in phases take batches (xs, ys)."),
    )


def _data(learner: Any, key: str) -> Any:
    if key not in learner.data:
        raise ValueError(f"the learner has no {key} data")
    return learner.data[key]


def _finite(learner: Any) -> None:
    for _, model in by_name(learner.model):
        for name, parameter in model.named_parameters():
            if not is_lazy(parameter) and not torch.isfinite(parameter).all():
                raise ValueError(f"{type(model).__name__}.{name} holds NaN or infinite values")


def _one_batch(learner: Any) -> None:
    model, loss_fn = learner.model, learner.loss_fn
    if isinstance(model, tuple) or loss_fn is None or "training" not in learner.data:
        return
    data = learner.data["training"]
    if hasattr(data, "__next__") or any(is_lazy(parameter) for parameter in model.parameters()):
        return
    with untouched(data):
        batch = next(complete(data))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"a batch is {describe(batch)}, not a pair (xs, ys)")
    xs, ys = to_device_of(model, (batch[0], batch[1]))
    with watching(model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])):
        loss = loss_fn(model(xs), ys)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"the loss of one batch is a {type(loss).__name__}, not a scalar tensor")
