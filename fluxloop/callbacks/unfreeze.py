"""Freeze parts of a model at the start, and unfreeze them on a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from attrs import define, field
from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback, NoConflict, on, resolve_conflict
from fluxloop.compute.models import by_name, named_parts
from fluxloop.compute.optimizers import owned_parameters
from fluxloop.errors import ModelError, OptimizerError, describe, did_you_mean
from fluxloop.events import EpochBegin, EpochEnd, FitBegin, StepBegin, StepEnd
from fluxloop.guard.given import is_number
from fluxloop.phase import AbstractTrainingPhase, FittingPhase


def _copied(given: Any) -> Any:
    """Copy a mapping."""
    return dict(given) if isinstance(given, Mapping) else given


@define
class Unfreeze(Callback):
    """Train parts of a model from an epoch or a step on; until then they are frozen.

    What a pattern matches is frozen when the first fit begins and unfrozen when the training epoch
    (or step) of that number begins, counted from 0 over all fits; 0 stands for the start. What
    matches several patterns is unfrozen at the earliest, and what matches none stays as it is::

        Unfreeze({"*": 10, "encoder.3": 5, "head": 0})

    It freezes once: what is frozen or unfrozen by other means later stays so, also in a resumed run.
    The optimizer holds the parameters from the start, and skips those that are frozen: momentum
    and weight decay do not move them. Batch norm's statistics are no parameters: in train mode those of a
    frozen one still follow the data, unless the model's own ``train`` method puts it into eval mode.

    Args:
        when: When by pattern (as in a shell: ``*``, ``?``): the path of a module or the name of a
            parameter, ``"encoder"``, ``"encoder.0.weight"``, ``"*.bias"``; with several models it
            begins with a model's name, ``"G.head"``.
        unit: ``"epoch"`` or ``"step"``. Where ``Accelerator(accumulate=k)`` makes one update of k batches, they
            are one step.

    Raises:
        ModelError: A pattern matches nothing, or weights that have seen no batch (lazy modules).
        OptimizerError: A parameter that would be unfrozen is in no optimizer, as it was frozen
            when the learner was made.
        ValueError: There is no pattern, a number is out of range, or another unit.

    Reads: optimizer
    Writes: model (whether its parameters require gradients)

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> data = ((torch.randn(8, 4), torch.randn(8, 1)),)
        >>> learner = Learner(model, torch.nn.functional.mse_loss, data=data, default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Unfreeze({"0": 1})])
        >>> for epoch in range(2):
        ...     history = learner.fit(1)
        ...     print(model[0].weight.requires_grad, model[1].weight.requires_grad)
        False True
        True True
    """

    when: dict[str, int] = field(converter=_copied)
    unit: Literal["epoch", "step"] = field(default="epoch", kw_only=True)
    _done: int = field(default=0, init=False, repr=False)
    _frozen: bool = field(default=False, init=False, repr=False)
    _next: int | None = field(default=None, init=False, repr=False)
    _waiting: bool = field(default=False, init=False, repr=False)
    """Whether a step of several batches has begun and not ended."""

    reads = ("optimizer",)
    writes = ("model",)
    draws = False
    _fixed = ("when", "unit")

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.when, dict) or not self.when or not all(isinstance(key, str) for key in self.when):
            raise ValueError(
                f"Unfreeze({describe(self.when)}) was given; expected when by pattern: Unfreeze({{'encoder': 5}})"
            )
        for pattern, number in self.when.items():
            if not is_number(number, whole=True) or number < 0:
                raise ValueError(
                    f"Unfreeze({{{pattern!r}: {number!r}}}) was given; expected the number of an epoch or a step, 0 or "
                    "more (0: from the start)"
                )
        if self.unit not in ("epoch", "step"):
            raise ValueError(f"Unfreeze(unit={self.unit!r}) was given; expected 'epoch' or 'step'")

    @property
    def in_compiled_step(self) -> Literal["after"] | None:  # type: ignore[override]  # depends on the unit
        """Whether the models may change from step to step."""
        return "after" if self.unit == "epoch" else None

    def init(self, learner: Any) -> None:
        """Look for what the patterns match; begin anew."""
        self._done, self._frozen, self._next, self._waiting = 0, False, None, False
        if any(is_lazy(parameter) for parameter in self._plan(learner)):
            raise ModelError(
                "Unfreeze cannot freeze weights that have seen no batch (lazy modules); run the model on one before "
                "the learner is made"
            )

    def _plan(self, learner: Any) -> dict[nn.Parameter, int]:
        """Return the number of the epoch or step at which each parameter is unfrozen.

        Raises:
            ModelError: A pattern matches nothing.
        """
        plan: dict[nn.Parameter, int] = {}
        found: dict[str, int] = dict.fromkeys(self.when, 0)
        known: dict[str, None] = {}
        for name, parameter in _parameters(learner.model):
            paths = [name[:end] for end, letter in enumerate(name) if letter == "."] + [name]
            known.update(dict.fromkeys(paths))
            for pattern, number in self.when.items():
                if any(fnmatchcase(path, pattern) for path in paths):
                    found[pattern] += 1
                    plan[parameter] = min(number, plan.get(parameter, number))
        for pattern, count in found.items():
            if not count:
                tops = sorted({path.partition(".")[0] for path in known})
                raise ModelError(
                    f"Unfreeze: no module or parameter matches {pattern!r}; there are "
                    f"{', '.join(tops) or 'no parameters'}, and what is inside them, such as {next(iter(known), '')!r}"
                    f"{did_you_mean(pattern, known)}"
                )
        return plan

    def _freeze(self, learner: Any) -> None:
        """Freeze what waits, once."""
        if self._frozen:
            return
        plan = self._plan(learner)
        owned = {parameter for _, each in by_name(learner.optimizer) for parameter in owned_parameters(each)}
        missing = [name for name, each in _parameters(learner.model) if each in plan and each not in owned]
        if missing:
            raise OptimizerError(
                f"Unfreeze would unfreeze {', '.join(missing[:3])}, which no optimizer holds: frozen parameters are "
                "given to none; leave all of them trainable when the learner is made: Unfreeze freezes them"
            )
        for parameter, number in plan.items():
            if number > self._done:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._frozen = True
        self._unfreeze(learner)

    def _unfreeze(self, learner: Any) -> None:
        """Unfreeze what is due now, and note what comes next."""
        plan = self._plan(learner)
        for parameter, number in plan.items():
            if number == self._done:
                parameter.requires_grad_(True)
        self._next = min((number for number in plan.values() if number > self._done), default=None)

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Freeze what waits, in the first fit."""
        self._freeze(learner)

    @on(EpochBegin, AbstractTrainingPhase)
    def start_epoch(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Unfreeze what is due in this epoch."""
        self._freeze(learner)
        if self.unit == "epoch" and self._done == self._next:
            self._unfreeze(learner)

    @on(StepBegin, AbstractTrainingPhase)
    def start_step(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Unfreeze what is due in this step."""
        if self.unit == "step" and self._done == self._next:
            self._unfreeze(learner)

    @on(StepEnd, AbstractTrainingPhase)
    def count_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Count a step, with the last of the batches that make an update."""
        if self.unit == "step":
            self._waiting = learner.is_accumulating
            if not self._waiting:
                self._done += 1

    @on(EpochEnd, AbstractTrainingPhase)
    def count_epoch(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Count an epoch, or the step whose last batches are fewer."""
        if self.unit == "epoch" or (self._waiting and not learner.is_accumulating):
            self._done += 1
        self._waiting = False


@resolve_conflict.register(Unfreeze, Callback)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _flags_alone(a: Unfreeze, b: Callback) -> NoConflict:
    """It changes which parameters take gradients, before a step's forward, and no weight."""
    return NoConflict()


def _parameters(models: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the parameters of a learner's models with their names, one that is shared under each of its names."""
    return named_parts(models, partial(nn.Module.named_parameters, remove_duplicate=False))
