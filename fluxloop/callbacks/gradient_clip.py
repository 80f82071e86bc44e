"""Clip gradients before the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor
from torch.nn.utils import clip_grad_value_

from fluxloop.callback import NoConflict, RunFirst, on, resolve_conflict
from fluxloop.callbacks.metrics import Metrics, RecordsMetrics
from fluxloop.compute.clipping import clip_norm, norm_of
from fluxloop.compute.models import by_name
from fluxloop.compute.optimizers import owned_parameters
from fluxloop.errors import CallbackConflictError, OptimizerError, did_you_mean
from fluxloop.events import EpochBegin, EpochEnd, StepEnd, UpdateBegin
from fluxloop.guard.given import is_number
from fluxloop.metrics.averages import FOLD_AFTER
from fluxloop.monitor import Expected
from fluxloop.order.view import behind, look_up
from fluxloop.phase import AbstractTrainingPhase, Phase


@define
class GradientClip(RecordsMetrics):
    """Clip the gradients of the optimizer that is about to step.

    By their norm, taken over all parameters of that optimizer together, as
    ``torch.nn.utils.clip_grad_norm_`` does, or with `value` each entry by itself, as
    ``clip_grad_value_`` does. Gradients are complete and unscaled then, in any phase. The other
    optimizers' gradients are not touched. A norm that is not finite acts as in torch: an infinite norm
    zeroes the gradients (NaN where an entry is infinite), a NaN norm makes all of them NaN.

    The norm before clipping is the step's entry ``grad_norm``, with named optimizers
    ``grad_norms[name]``, a tensor on the device; its average over an epoch's steps is recorded
    as ``"training/grad_norm"``, with named optimizers ``"training/grad_norm_<name>"`` (where a
    `Recorder` counts the epochs). Of several updates of one optimizer in a step the last counts.

    Args:
        max_norm: Largest norm, 0 or more; with 0 all gradients become 0.
        norm_type: Which norm: 2, or another number above 0, infinity too.
        value: Largest absolute value of an entry, 0 or more; then norms are not clipped.
        optimizer: Name of the optimizer whose gradients are clipped; left out, all of them.

    Raises:
        OptimizerError: There is no such optimizer.
        ValueError: An argument is not a number, or out of range.

    Reads: optimizer, history
    Writes: step.grads, step.grad_norm, step.grad_norms, cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> from functools import partial
        >>> learner = testing.toy_learner(GradientClip(0.5), num_batches=1, optimizer=partial(torch.optim.SGD, lr=1.0))
        >>> history = learner.fit(1)
        >>> round(learner.model.value.item(), 4)  # moved from 0 by a gradient of norm 0.5
        0.5
    """

    max_norm: float = 1.0
    norm_type: float = field(default=2.0, kw_only=True)
    value: float | None = field(default=None, kw_only=True)
    optimizer: str | int | None = field(default=None, kw_only=True)
    _totals: dict[str, Tensor] = field(factory=dict, init=False, repr=False)
    _counts: dict[str, int] = field(factory=dict, init=False, repr=False)
    _waiting: dict[str, list[Tensor]] = field(factory=dict, init=False, repr=False)

    reads = ("optimizer", "history")
    draws = False
    _fixed = ("optimizer",)
    in_compiled_step = "inside"

    def __attrs_post_init__(self) -> None:
        for name, value in (("max_norm", self.max_norm), ("norm_type", self.norm_type), ("value", self.value)):
            if name == "value" and value is None:
                continue
            if not is_number(value) or not value >= 0 or (name == "norm_type" and value == 0):  # type: ignore[operator]  # a number
                raise ValueError(
                    f"GradientClip({name}={value!r}) was given; expected a number, "
                    f"{'above 0' if name == 'norm_type' else '0 or more'}: GradientClip(1.0)"
                )

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # as the base's
        """The gradients, their norm, and the metric."""
        return ("step.grads", "step.grad_norm", "step.grad_norms", "cbstate.metrics")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The norm of the one optimizer; those of all are known when they step."""
        return (_metric(self.optimizer),)

    def records(self, phase: Phase | None) -> Sequence[Expected]:
        """Return the norms by optimizer; whether there is one optimizer or several is known when they step."""
        several = self.optimizer is None and (phase is None or phase.gradients)
        found = [evolve(each, certain=False) for each in super().records(phase) or ()]
        return [*found, *([Expected("grad_norm_*", None, False)] if several else [])]

    def init(self, learner: Any) -> None:
        """Look for the optimizer, and publish the metrics' container."""
        super().init(learner)
        self._totals, self._counts, self._waiting = {}, {}, {}
        if self.optimizer is not None:
            names = [name for name, _ in by_name(learner.optimizer) if name is not None]
            if str(self.optimizer) not in names:
                raise OptimizerError(
                    f"GradientClip(optimizer={self.optimizer!r}): the learner has "
                    f"{names or 'a single optimizer without a name: leave it out'}"
                    f"{did_you_mean(str(self.optimizer), names)}"
                )

    @on(EpochBegin, AbstractTrainingPhase)
    def start(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin the averages of an epoch."""
        self._totals, self._counts, self._waiting = {}, {}, {}

    @on(UpdateBegin)
    def clip(self, event: UpdateBegin, phase: Any, learner: Any) -> None:
        """Clip the gradients that are about to be used."""
        name, running = event.name, behind(learner)
        if self.optimizer is not None and name != str(self.optimizer):
            return
        optimizer = running.optimizer if name is None else look_up(running.optimizer, name)
        parameters = [parameter for parameter in owned_parameters(optimizer) if parameter.grad is not None]
        if self.value is None:
            norm = clip_norm(parameters, float(self.max_norm), float(self.norm_type))
        else:
            norm = norm_of([p.grad for p in parameters if p.grad is not None], float(self.norm_type))
            clip_grad_value_(parameters, float(self.value))
        step = running.step
        if name is None:
            step.grad_norm = norm
        else:
            if "grad_norms" not in step:
                step.grad_norms = {}
            step.grad_norms[name] = norm
        if event.after_steps:  # no step ends any more
            self._add(name, norm)

    @on(StepEnd, AbstractTrainingPhase)
    def add(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Add the norms of a step's updates to the averages."""
        step = vars(behind(learner).step)
        if "grad_norm" in step:
            self._add(None, step["grad_norm"])
        for name, norm in step["grad_norms"].items() if "grad_norms" in step else ():
            self._add(name, norm)

    def _add(self, name: str | int | None, norm: Tensor) -> None:
        metric = _metric(name)
        waiting = self._waiting.get(metric)
        if waiting is None:
            waiting = self._waiting[metric] = []
        waiting.append(norm)
        self._counts[metric] = self._counts.get(metric, 0) + 1
        if len(waiting) >= FOLD_AFTER:  # one kernel for many steps, always after as many
            self._totals[metric] = self._total(metric)
            waiting.clear()

    @torch.no_grad()
    def _total(self, metric: str) -> Tensor:
        """Return the sum of the norms that a metric was given, of which some wait to be added up."""
        waiting = self._waiting.get(metric)
        total = self._totals.get(metric, 0.0)
        if not waiting:
            return torch.as_tensor(total)
        norms = torch.stack(waiting)
        return total + norms.to(torch.float32 if norms.device.type == "mps" else torch.float64).sum()

    @on(EpochEnd, AbstractTrainingPhase)
    def record(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Record the averages of the epoch."""
        epoch = learner.history[phase].epoch
        if epoch:
            metrics = learner.cbstate.metrics[phase]
            for name, count in self._counts.items():
                metrics.record(name, epoch, self._total(name) / count, type(self).__name__)


@resolve_conflict.register(GradientClip, Metrics)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _epoch_values_last(clip: GradientClip, metrics: Metrics) -> RunFirst:
    """The norm is recorded after the metrics; what metrics read of a step was clipped before its end."""
    return RunFirst(metrics)


@resolve_conflict.register(GradientClip, GradientClip)  # type: ignore[untyped-decorator]  # as above
def _one_optimizer_each(a: GradientClip, b: GradientClip) -> NoConflict:
    """Two of them may clip the gradients of two optimizers.

    Raises:
        CallbackConflictError: They clip those of one optimizer, so that their order would matter.
    """
    if a.optimizer is None or b.optimizer is None or str(a.optimizer) == str(b.optimizer):
        raise CallbackConflictError(
            f"{a!r} and {b!r} both clip the gradients of one optimizer; keep one, or say whose each clips: "
            "GradientClip(1.0, optimizer='G'), GradientClip(5.0, optimizer='D')"
        )
    return NoConflict()


@cache
def _metric(name: str | int | None) -> str:
    return "grad_norm" if name is None else f"grad_norm_{name}".lower()
