"""Keep an exponential moving average of weights: a copy to evaluate, or a teacher to learn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.access import weights_path
from fluxloop.callback import Callback, on
from fluxloop.errors import ModelError, did_you_mean
from fluxloop.events import BackwardEnd, StepBegin, StepEnd, UpdateEnd
from fluxloop.optimizers import owned_parameters
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.schedules import Schedule, value_at
from fluxloop.view import look_up

Buffers = Literal["copy", "average", "keep"]


@define
class EMA(Callback):
    """Keep the exponential moving average of a model's weights.

    After each training step in which an optimizer of the model's parameters stepped (or which
    made its update by hand), every parameter of the average becomes
    ``decay * average + (1 - decay) * live``, computed as torch's ``lerp``.

    The average is a module of its own, at another path: ``learner.weights["G@ema"]``. Whatever
    evaluates or samples says that name (``SampleImages("G@ema")``, ``KNNProbe("encoder@ema")``,
    `AveragedValidationPhase`); the live weights are never replaced. With `into` it is one of the
    learner's models instead, such as the teacher of a `BYOLPhase`.

    Args:
        model: Name of the weights: a model's, ``"model"`` for a single one, or a part's, ``"encoder.0"``.
        decay: Weight of the past, 0 to 1: a number, or a schedule over averages taken, counted from 0.
        into: Name of the model that holds the average, of the same parameters, frozen. It begins as
            it is given.
        buffers: What happens to buffers, such as batch norm's statistics: ``"copy"`` the live ones
            (a copy's default), ``"average"`` them too (whole numbers are copied), or ``"keep"`` the
            average's own (the default with `into`: a teacher that sees data keeps statistics itself).
        view: What stands behind the ``@``.

    Raises:
        ModelError: There are no such weights, they have seen no batch (lazy modules), or the model
            `into` has other parameters or is trained.
        ValueError: The decay does not lie between 0 and 1.

    Attributes:
        num_averaged: How many averages have been taken.

    Reads: model, optimizer (only the model that is averaged)
    Writes: model (only the average: "model.G@ema", or the model `into`)
    """

    model: str
    decay: float | Schedule = 0.999
    into: str | None = None
    buffers: Buffers | None = None
    view: str = "ema"
    num_averaged: int = field(default=0, init=False, repr=False)
    _average: nn.Module | None = field(default=None, init=False, repr=False)
    _by_hand: bool = field(default=True, init=False, repr=False)
    _updated: bool = field(default=False, init=False, repr=False)
    _owners: dict[tuple[str | None, int], bool] = field(factory=dict, init=False, repr=False)

    draws = False

    def __attrs_post_init__(self) -> None:
        if "@" in self.model:
            raise ModelError(f"EMA({self.model!r}) was given; expected live weights, such as EMA('G', 0.999)")
        if not callable(self.decay):
            _check_decay(self.decay)
        if self.buffers not in (None, "copy", "average", "keep"):
            raise ValueError(f"buffers={self.buffers!r} was given; expected 'copy', 'average' or 'keep'")

    @property
    def average(self) -> str:
        """Name of the average, for ``learner.weights``."""
        return f"{self.model}@{self.view}" if self.into is None else self.into

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The live weights, and which optimizer owns them."""
        return (weights_path(self.model), "optimizer")

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # the average's
        """The average."""
        return (weights_path(self.average),)

    def init(self, learner: Any) -> None:
        """Begin the average."""
        live = learner.weights[self.model]
        if any(is_lazy(tensor) for tensor in (*live.parameters(), *live.buffers())):
            raise ModelError(
                f"EMA({self.model!r}) cannot average weights that have seen no batch (lazy modules); run the model on "
                "one before the learner is made"
            )
        if self.into is None:
            self._average = copy.deepcopy(live).requires_grad_(False).eval()
            learner.weights[self.average] = self._average
        else:
            self._average = learner.weights[self.into]
            _check_like(self.model, live, self.into, self._average)
        self.num_averaged = 0
        self._owners.clear()

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin a step: nothing is known of its updates."""
        self._by_hand, self._updated = True, False

    @on(BackwardEnd, AbstractTrainingPhase)
    def note_backward(self, event: BackwardEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Note that the step's updates are announced."""
        self._by_hand = False

    @on(UpdateEnd, AbstractTrainingPhase)
    def note_update(self, event: UpdateEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Note an update of the model's weights."""
        self._by_hand = False
        optimizer = learner.optimizer if event.name is None else look_up(learner.optimizer, event.name)
        key = event.name, len(optimizer.param_groups)  # a group may be added while training
        if key not in self._owners:
            own = set(learner.weights[self.model].parameters())
            self._owners[key] = not own.isdisjoint(owned_parameters(optimizer))
        self._updated = self._updated or self._owners[key]

    @on(StepEnd, AbstractTrainingPhase)
    def take(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Take an average where the weights were updated."""
        if self._updated or self._by_hand:
            self._take(learner.weights[self.model])

    @torch.no_grad()
    def _take(self, live: nn.Module) -> None:
        average, decay = self._average, value_at(self.decay, self.num_averaged)
        if average is None:
            return
        _check_decay(decay)
        _lerp(average.parameters(), live.parameters(), 1 - decay)
        buffers = self.buffers or ("copy" if self.into is None else "keep")
        if buffers != "keep":
            weight = 1 - decay if buffers == "average" else 1.0
            _lerp(average.buffers(), live.buffers(), weight)
        self.num_averaged += 1

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: the count, and the average where no model holds it."""
        own = self._average is not None and self.into is None
        return {
            "num_averaged": self.num_averaged,
            "average": self._average.state_dict() if own and self._average is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a kept state."""
        self.num_averaged = state["num_averaged"]
        if state["average"] is not None and self._average is not None:
            self._average.load_state_dict(state["average"])


def _lerp(averages: Iterator[Tensor], live: Iterator[Tensor], weight: float) -> None:
    """Move averages towards the live tensors, in place; whole numbers, and all at a weight of 1, are copied."""
    moved: list[Tensor] = []
    towards: list[Tensor] = []
    for average, tensor in zip(averages, live, strict=True):
        if weight == 1 or not average.is_floating_point():
            average.copy_(tensor)
        else:
            moved.append(average)
            towards.append(tensor)
    if moved:
        torch._foreach_lerp_(moved, towards, weight)  # as torch.optim.swa_utils does


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"EMA was given the decay {decay!r}; expected a weight of the past from 0 to 1, e.g. 0.999")


def _check_like(model: str, live: nn.Module, into: str, average: nn.Module) -> None:
    """Raise for a model that cannot hold the average of another.

    Raises:
        ModelError: It is the same, has other parameters or buffers, or is trained.
    """
    if live is average:
        raise ModelError(f"EMA({model!r}, into={into!r}) would average a model into itself; expected another one")
    shapes, others = (
        {name: tuple(t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())}
        for module in (live, average)
    )
    if shapes != others:
        name = next(n for n in (*shapes, *others) if shapes.get(n) != others.get(n))
        raise ModelError(
            f"EMA({model!r}, into={into!r}): {name!r} has shape {shapes.get(name, 'none')} in one and "
            f"{others.get(name, 'none')} in the other{did_you_mean(name, others)}; make the second a copy of the "
            f"first: copy.deepcopy({model}).requires_grad_(False)"
        )
    if any(parameter.requires_grad for parameter in average.parameters()):
        raise ModelError(
            f"EMA({model!r}, into={into!r}) moves {into!r}, and its parameters require gradients, so an optimizer "
            f"would move them too; write {into}.requires_grad_(False) before the learner is made"
        )
