"""Average the weights that training goes through at its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from attrs import define, field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fluxloop.callback import Callback, on
from fluxloop.compute.models import copied_weights, move_towards, to_device_of
from fluxloop.compute.modes import switch_modes
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import DataError, ModelError, describe
from fluxloop.events import EpochBegin, EpochEnd, FitEnd, StepEnd
from fluxloop.guard.given import is_number
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase, AbstractValidationPhase, Phase
from fluxloop.processes.batch_norm import apart
from fluxloop.randomness import drawing, stream_seed
from fluxloop.screen.bars import length_of, tracked
from fluxloop.signals import INTERRUPTED, TERMINATED

Forward = Callable[[nn.Module, Any], object]


def run_inputs(module: nn.Module, batch: Any) -> object:
    """Run a module on a batch, or on the first of a batch's items."""
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


@define
class StochasticWeightAveraging(Callback):
    """Keep the equal average of the weights at the ends of training epochs (Izmailov et al., 2018).

    The n-th average moves by ``(live - average) / n``, as ``torch.optim.swa_utils.AveragedModel``
    computes it. It is a module of its own, ``learner.weights["model@swa"]``; the live weights are
    never replaced. Until the first average it equals the live weights, whenever it is read; so it does again
    after ``learner.load_weights``, and the average begins anew. A phase that evaluates it says so::

        class SWAValidation(ValidationPhase):
            model_view = "swa"

        learner.fit(20, phases=[TrainingPhase(), ValidationPhase(), SWAValidation()])
        learner.evaluate(phase=SWAValidation())

    Batch norm's statistics of the average are those of its own activations, computed over the training data
    (as ``torch.optim.swa_utils.update_bn`` does) before a phase runs the average, and when the
    fit ends by itself; the training's data order and random numbers are not moved. What reads the
    average at another time, such as a probe, or after Ctrl+C, finds the live model's statistics. The
    statistics of a batch norm that training holds in eval mode stay as they are.

    The averaged weights should differ: in the paper the learning rate is constant or cyclic from
    `start` on. A `Scheduler` can set it so, or `LRScheduler` with ``torch.optim.swa_utils.SWALR``.

    Args:
        model: Name of the weights: a model's, ``"model"`` for a single one, or a part's, ``"encoder.0"``.
        start: Training epochs (steps, with ``unit="step"``) that go by before the first average.
        every: Average after every so many from then on.
        unit: ``"epoch"`` or ``"step"``, of the training.
        forward: ``(module, batch)`` runs the average on a batch for batch norm's statistics; left
            out, on the batch, or on the first item of a tuple or list.
        view: Name of the weights view: what stands behind the ``@``.

    Raises:
        ModelError: There are no such weights, or they have seen no batch (lazy modules).
        ValueError: `start` is no whole number of 0 or more, `every` none of 1 or more, or `unit` another word.
        DataError: There is batch norm, and no training data that can be iterated again.

    Attributes:
        num_averaged: How many averages have been taken.

    Reads: model, data, seed (only the model that is averaged)
    Writes: model (only the average: "model@swa")

    Example:
        >>> averaging = StochasticWeightAveraging(start=1)
        >>> learner = testing.toy_learner(Recorder(), averaging)
        >>> history = learner.fit(4)
        >>> averaging.num_averaged, "model@swa" in learner.weights
        (3, True)
    """

    model: str = "model"
    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)
    unit: Literal["epoch", "step"] = field(default="epoch", kw_only=True)
    forward: Forward = field(default=run_inputs, kw_only=True, repr=False)
    view: str = field(default="swa", kw_only=True)
    num_averaged: int = field(default=0, init=False, repr=False)
    _done: int = field(default=0, init=False, repr=False)
    """Epochs or steps ended."""
    _stale: bool = field(default=False, init=False, repr=False)
    """Whether the average has moved since batch norm's statistics were computed for it."""
    _waiting: bool = field(default=False, init=False, repr=False)
    """Whether a step of several batches has begun and not ended."""
    _held: list[str] = field(factory=list, init=False, repr=False)
    """Names of the batch norms that were in eval mode while the model was trained."""
    _average: nn.Module | None = field(default=None, init=False, repr=False)
    """The module that holds the average; None before there is a learner."""
    _loaded: dict[str, Any] | None = field(default=None, init=False, repr=False)
    """A state that was loaded before there is a learner."""

    in_compiled_step = "after"
    draws = False  # what running over the data draws is put back
    _fixed = ("model", "view")

    def __attrs_post_init__(self) -> None:
        names = isinstance(self.model, str) and isinstance(self.view, str) and bool(self.model)
        if not names or "@" in self.model or not self.view.isidentifier():
            raise ModelError(
                f"{self!r} was given; expected live weights, and the name of a weights view: "
                "StochasticWeightAveraging('model', start=10, view='swa')"
            )
        if not callable(self.forward):
            raise ValueError(f"forward={describe(self.forward)} was given; expected a function (module, batch)")
        whole = is_number(self.start, whole=True) and is_number(self.every, whole=True)
        if not whole or self.start < 0 or self.every < 1 or self.unit not in ("epoch", "step"):
            raise ValueError(
                f"{self!r} was given; expected start of 0 or more, every of 1 or more, and unit='epoch' or 'step'"
            )

    @property
    def average(self) -> str:
        """Name of the average, for ``learner.weights``."""
        return f"{self.model}@{self.view}"

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The live weights, the training data, and the seed."""
        return (weights_path(self.model), "data", "seed")

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # the average's
        """The average."""
        return (weights_path(self.average),)

    def init(self, learner: Any) -> None:
        """Begin the average."""
        self._average = copied_weights(learner.weights[self.model], f"{self!r}")
        learner.weights[self.average] = self._average
        learner.weights.follow(self.average, partial(self._follow, learner))
        self.num_averaged, self._done, self._stale, self._held = 0, 0, False, []
        if self._loaded is not None:
            self.load_state_dict(self._loaded)

    def _follow(self, learner: Any, average: nn.Module, anew: bool) -> None:
        """Make the average equal to the live weights before the first one is taken, or where it begins anew."""
        if anew:
            self.num_averaged, self._stale = 0, False
        if not self.num_averaged:
            move_towards(average, learner.weights[self.model], 1.0, 1.0, type(self).__name__)

    @on(EpochBegin, AbstractTrainingPhase)
    def look_for_data(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise before the first step for missing data, or data that the average cannot be run on."""
        held = self._held_norms(learner)
        if not self._done and norms(learner.weights[self.model], held):
            self._update_norms(learner, copy.deepcopy(learner.weights[self.average]), held, batches=1)

    def _held_norms(self, learner: Any) -> list[str]:
        """Name the batch norms that are in eval mode while the model is trained."""
        parts = learner.weights[self.model].named_modules()
        return [name for name, part in parts if isinstance(part, _BatchNorm) and not part.training]

    @on(EpochEnd, AbstractTrainingPhase)
    def end_epoch(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Take an average where it is time."""
        if self.unit == "epoch" or (self._waiting and not learner.is_accumulating):
            self._count(learner)
        self._waiting = False

    @on(StepEnd, AbstractTrainingPhase)
    def end_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Take an average where it is time."""
        if self.unit == "step":
            self._waiting = learner.is_accumulating
            if not self._waiting:
                self._count(learner)

    def _count(self, learner: Any) -> None:
        self._done += 1
        past = self._done - self.start
        if past > 0 and past % self.every == 0:
            average = learner.weights[self.average]
            self.num_averaged += 1
            self._held = self._held_norms(learner)
            move_towards(average, learner.weights[self.model], 1 / self.num_averaged, 1.0, type(self).__name__)
            self._stale = True

    @on(EpochBegin, AbstractValidationPhase)
    def prepare(self, event: EpochBegin, phase: AbstractValidationPhase, learner: Any) -> None:
        """Make the average ready for a phase that runs it."""
        if phase.model_view == self.view:
            self._refresh(learner)

    @on(FitEnd)
    def end_fit(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Make the average ready when the fit has ended, unless the process was asked to stop."""
        if event.error is None and event.reason not in (INTERRUPTED, TERMINATED):
            self._refresh(learner)

    def _refresh(self, learner: Any) -> None:
        """Bring batch norm's statistics of the average up to date."""
        average = learner.weights[self.average]
        if self._stale and norms(average, self._held):
            self._update_norms(learner, average, self._held)
            group = learner.accelerator.group
            if group is not None:  # data that is not shared out may give each process other rows
                buffers = group.broadcast([buffer.cpu() for norm in norms(average) for buffer in norm.buffers()])
                for buffer, first in zip((b for norm in norms(average) for b in norm.buffers()), buffers, strict=True):
                    buffer.copy_(first)
        self._stale = False

    def _update_norms(
        self, learner: Any, average: nn.Module, held: Collection[str], batches: int | None = None
    ) -> None:
        """Compute batch norm's statistics of the average anew.

        Raises:
            DataError: The average cannot be run on a batch of the training data.
        """
        source = self._data(learner)
        # numbers of its own: a loader that shuffles must not move those of the training
        with drawing(stream_seed(learner.seed, f"callback/{self.average}", self._done)):
            try:
                update_norms(average, source, self.forward, batches, held)
            except Exception as error:
                raise DataError(
                    f"{self!r} could not run the average on a batch of the training data for batch norm's statistics "
                    f"({type(error).__name__}: {error}); say how: StochasticWeightAveraging({self.model!r}, "
                    "forward=lambda module, batch: module(...))"
                ) from error

    def _data(self, learner: Any) -> Any:
        """Return the training data.

        Raises:
            DataError: There is none, or it can be iterated once only.
        """
        source = learner.data["training"] if "training" in learner.data else None  # noqa: SIM401 - no get
        if source is None or hasattr(source, "__next__"):
            found = "none" if source is None else f"{describe(source)}, which can be iterated once only"
            raise DataError(
                f"{self!r} runs over the training data for batch norm's statistics, and there is {found}; give the "
                "learner data=(loader, ...)"
            )
        return source

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the counts and the average."""
        return {
            "num_averaged": self.num_averaged,
            "done": self._done,
            "stale": self._stale,
            "waiting": self._waiting,
            "held": list(self._held),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps; before there is a learner, it waits until one is made."""
        self._loaded = state if self._average is None else None
        self.num_averaged, self._done, self._stale = state["num_averaged"], state["done"], state["stale"]
        self._held, self._waiting = list(state.get("held", ())), state.get("waiting", False)
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])


def norms(module: nn.Module, held: Collection[str] = ()) -> list[_BatchNorm]:
    """List the batch norms that have running statistics, without those whose names are in `held`."""
    found = [part for name, part in module.named_modules() if isinstance(part, _BatchNorm) and name not in held]
    return [norm for norm in found if norm.track_running_stats]


def update_norms(
    module: nn.Module,
    source: Any,
    forward: Forward = run_inputs,
    batches: int | None = None,
    held: Collection[str] = (),
) -> None:
    """Compute batch norm's statistics anew over data, every batch weighing the same.

    The module is in train mode meanwhile, without gradients; its modes, and a loader's own generators,
    are put back. The statistics of a batch norm that stays in eval mode then (its ``train()`` says so) are left.

    Args:
        module: Whose statistics.
        source: Batches.
        forward: ``(module, batch)`` runs the module on a batch.
        batches: How many; left out, all.
        held: Names of batch norms that stay in eval mode.
    """
    with ExitStack() as undone:
        undone.callback(switch_modes([module], True))
        for name, part in module.named_modules():
            if name in held:
                part.training = False
        for norm in norms(module, held):
            if norm.training:
                norm.reset_running_stats()
                undone.callback(setattr, norm, "momentum", norm.momentum)
                norm.momentum = None  # a plain average
        undone.enter_context(untouched(source))
        undone.enter_context(torch.no_grad())
        undone.enter_context(apart())  # each process runs over all data it has, which need not be as much
        given = length_of(source)
        total = batches if given is None or batches is None else min(given, batches)
        for batch in tracked(islice(complete(source), batches), "batch norm's statistics", total or given):
            forward(module, to_device_of(module, batch))
