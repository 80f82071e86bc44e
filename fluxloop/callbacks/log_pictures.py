"""Log pictures: histograms, visualizations of a step, sampled images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from fluxloop.callback import on, require_call
from fluxloop.callbacks.log import LogCallback
from fluxloop.compute.models import named_parts
from fluxloop.compute.recompute import is_recomputing
from fluxloop.errors import CallbackTypeError, describe
from fluxloop.events import EpochBegin, EpochEnd, FitBegin, StepBegin, StepEnd
from fluxloop.guard.given import check_number
from fluxloop.logging.backend import Backend
from fluxloop.logging.loggables import Histogram, Image, loggable
from fluxloop.nested import tensors
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.randomness import preserved

HistogramOf = Literal["weights", "gradients", "activations"]


class LogHistograms(LogCallback):
    """Log how weights, gradients and activations are distributed, every so many training steps.

    They are in the groups ``("step", "weights")``, ``("step", "gradients")`` and
    ``("step", "activations")``, over training steps, under the names of the trainable parameters and
    of the modules without submodules. Activations are what such a module gave in its last call of
    the step; its hook is there in the steps that are logged alone.

    Args:
        backends: What to log to: one or more, or lists of them.
        of: What to log.
        every: In every so many training steps.
        pattern: A regular expression that a name has to match somewhere; left out, all do.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        ValueError: `every` is less than 1, or `of` names something else.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: model, cbstate.history
    Runs after: Recorder

    Example:
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> history = testing.toy_learner(Recorder(), LogHistograms(memory, of=["weights"], every=16)).fit(1)
        >>> [(record.step, record.group, record.name) for record in memory.records]
        [(16, ('step', 'weights'), 'value')]
    """

    reads = ("model", "cbstate.history")

    def __init__(
        self,
        *backends: Backend | Sequence[Backend],
        of: Sequence[HistogramOf] = ("weights", "gradients", "activations"),
        every: int = 100,
        pattern: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(*backends, name=name)
        self.of = (of,) if isinstance(of, str) else tuple(of)
        if not set(self.of) <= {"weights", "gradients", "activations"}:
            raise ValueError(f"LogHistograms(of={of!r}) was given; expected some of weights, gradients, activations")
        check_number(type(self).__name__, "every", every, least=1, whole=True)
        self.every = int(every)
        if pattern is not None and not isinstance(pattern, str):
            raise TypeError(f"LogHistograms(pattern={pattern!r}) was given; expected a regular expression, a text")
        self.pattern = re.compile(pattern or "")
        self._given: dict[str, Tensor] = {}
        self._due = False
        """Whether a step is to be logged, and waits for the last of the batches that make its update."""

    @property
    def in_compiled_step(self) -> Literal["after", "never"]:  # type: ignore[override]  # depends on what is logged
        """Whether a compiled step leaves what is logged: it leaves neither gradients nor activations."""
        return "after" if set(self.of) <= {"weights"} else "never"

    def init(self, learner: Any) -> None:
        """Refuse to log gradients that are used and dropped before a step ends.

        Raises:
            CallbackTypeError: Says what can be logged.
        """
        if "gradients" in self.of and learner.accelerator.optimizer_in_backward:
            raise CallbackTypeError(
                f"LogHistograms(of={self.of!r}) is to log gradients, and Accelerator(optimizer_in_backward=True) drops "
                "each as soon as it is used; expected of=('weights', 'activations'), or optimizer_in_backward=False"
            )

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Refuse to write into another run's log, and to log what no process has as a whole.

        Raises:
            CallbackTypeError: Weights or gradients are to be logged, and are sharded.
        """
        sharded = [what for what in self.of if what != "activations"]
        if sharded and learner.accelerator.sharding is not None:
            raise CallbackTypeError(
                f"{type(self).__name__}(of={self.of!r}) is to log {' and '.join(sharded)} that are sharded: the "
                "process that logs has a part of them; expected of='activations', or Accelerator(strategy='replicate')"
            )
        super().begin(event, phase, learner)

    @on(StepBegin, AbstractTrainingPhase)
    def listen(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Hook the modules, in a step that is logged."""
        self._given = {}
        if "activations" in self.of and (self._due or (self._steps + 1) % self.every == 0):
            for name, module in self._named(learner, nn.Module.named_modules):
                if not any(module.children()):
                    learner.defer(module.register_forward_hook(partial(self._note_output, name)).remove)

    def _note_output(self, name: str, module: nn.Module, inputs: Any, given: Any) -> None:
        first = next(tensors(given), None)
        if first is not None and not is_recomputing():
            self._given[name] = first.detach().clone()  # a later module may change it in place

    @on(StepEnd, AbstractTrainingPhase)
    def log_histograms(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Log the histograms of a step."""
        self._steps += 1
        self._due = self._due or self._steps % self.every == 0
        self._log_where_due(learner)

    @on(EpochEnd, AbstractTrainingPhase)
    def log_last(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Log the histograms of a step whose update was made after it."""
        self._log_where_due(learner)

    def _log_where_due(self, learner: Any) -> None:
        if not self._due or learner.is_accumulating:  # gradients are then those of a part of an update
            return
        self._due = False
        step = learner.trained_steps
        for name, parameter in self._named(learner, nn.Module.named_parameters):
            if "weights" in self.of and parameter.requires_grad:
                self.log(Histogram(parameter), name, step, ("step", "weights"))
            if "gradients" in self.of and parameter.grad is not None:
                self.log(Histogram(parameter.grad), name, step, ("step", "gradients"))
        for name, given in self._given.items():
            self.log(Histogram(given), name, step, ("step", "activations"))
        self._given = {}

    def _named(self, learner: Any, parts: Callable[[nn.Module], Any]) -> Iterator[tuple[str, Any]]:
        """Return the parts of the models whose names match the pattern."""
        for name, part in named_parts(learner.model, parts):
            if self.pattern.search(name):
                yield name, part


class LogVisualization(LogCallback):
    """Log a picture of the step, every so many training steps.

    It is in the group ``("step", "visualization")``, over training steps, under the function's name.

    Args:
        function: ``f(step)`` of the step's entries gives an image (C, H, W), images (N, C, H, W), a figure of
            matplotlib, or any `Loggable`; None logs nothing.
        backends: What to log to: one or more, or lists of them.
        every: In every so many training steps.
        name: What it is called; left out, the function's name.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        ValueError: `every` is less than 1.
        TypeError: What the function gives cannot be logged.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: step, cbstate.history
    Runs after: Recorder

    Example:
        >>> def errors(step): return (step.preds - step.ys).abs().reshape(1, 2, 4)  # eight rows as an image
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> history = testing.toy_learner(Recorder(), LogVisualization(errors, memory, every=16)).fit(1)
        >>> [(record.step, record.name) for record in memory.records]
        [(16, 'errors')]
    """

    reads = ("step", "cbstate.history")
    draws = False  # what the function draws is put back

    def __init__(
        self,
        function: Callable[[Any], Any],
        *backends: Backend | Sequence[Backend],
        every: int = 100,
        name: str | None = None,
    ) -> None:
        super().__init__(*backends, name=name)
        if not callable(function):
            raise CallbackTypeError(f"LogVisualization({describe(function)}, ...) was given; expected a function first")
        require_call(function, 1, "(step)", f"the function {getattr(function, '__name__', function)!s}")
        self.function = function
        check_number(type(self).__name__, "every", every, least=1, whole=True)
        self.every = int(every)
        called = getattr(function, "__name__", "<lambda>")
        self.label = name or ("visualization" if called == "<lambda>" else called)

    @on(StepEnd, AbstractTrainingPhase)
    def log_picture(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Log the picture of a step."""
        self._steps += 1
        if self._steps % self.every:
            return
        with preserved():
            picture = self.function(learner.step)
        if picture is not None:
            self.log(loggable(picture), self.label, learner.trained_steps, ("step", "visualization"))

    def __repr__(self) -> str:
        return f"LogVisualization({self.label}, {', '.join(map(repr, self.backends))})"


class LogImages(LogCallback):
    """Log the pictures that `SampleImages`, `EmbeddingMap` and the like make, in the group ``("epoch", "images")``.

    Args:
        backends: What to log to: one or more, or lists of them.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: cbstate.history, cbstate.images
    Runs after: Recorder

    Example:
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> samples = SampleImages("model", shape=(1, 1, 1), folder=None)
        >>> history = testing.toy_learner(Recorder(), samples, LogImages(memory)).fit(1)
        >>> [(record.step, record.group, record.name) for record in memory.records]
        [(1, ('epoch', 'images'), 'model')]
    """

    reads = ("cbstate.history", "cbstate.images")

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self._before: dict[str, Tensor] = {}

    @on(EpochBegin, AbstractTrainingPhase)
    def look(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """See which grids there are before the epoch."""
        self._before = dict(learner.cbstate.images)

    @on(EpochEnd, AbstractTrainingPhase)
    def log_new(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Log those that were made in this epoch."""
        epoch = learner.cbstate.history[phase].epoch
        for name, grid in learner.cbstate.images.items():
            before = self._before.get(name)
            if before is None or before.shape != grid.shape or not bool((before == grid).all()):
                self.log(Image(grid), name, epoch, ("epoch", "images"))
        self.flush(event, phase, learner)
