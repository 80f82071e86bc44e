"""Keep an exponential moving average of weights: a copy to evaluate, or a teacher to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from fluxloop.callback import Callback, on, resolve_conflict
from fluxloop.compute.models import by_name, check_not_lazy, copied_weights, move_towards
from fluxloop.compute.optimizers import owned_parameters
from fluxloop.compute.pairs import Pairs
from fluxloop.errors import CallbackConflictError, ModelError, describe
from fluxloop.events import StepBegin, StepEnd, UpdateEnd
from fluxloop.guard.assign import put
from fluxloop.guard.given import is_number
from fluxloop.order.access import overlap, parse, weights_path
from fluxloop.order.averages import Buffers, StepAverage
from fluxloop.order.view import behind, look_up
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.schedules import Schedule, value_at


@define
class EMA(Callback):
    """Keep the exponential moving average of a model's weights.

    At the end of each training step that updated the model's weights, every parameter of the average
    becomes ``decay * average + (1 - decay) * live``, computed as torch's ``lerp``; also where the step
    is cancelled after its update. An update is seen by its `UpdateEnd`. In a phase that steps the
    optimizer by hand, without ``learner.update``, the parameters at the step's begin and end are compared
    instead, which takes time and, on a GPU, waits for the device.

    The average is a module of its own, at another path: ``learner.weights["G@ema"]``. Whatever
    evaluates or samples says that name (``SampleImages("G@ema")``, ``KNNProbe("encoder@ema")``,
    `AveragedValidationPhase`); the live weights are never replaced. With `into` it is one of the
    learner's models instead, such as the teacher of a `BYOLPhase`.

    Average weights of 32 bits or more: in 16 bits a step of ``1 - decay`` is rounded away.

    Until the first step the average is the live weights, whatever they are; it begins with those, and
    with others that ``learner.load_weights`` loads later.

    Args:
        model: Name of the weights: a model's, ``"model"`` for a single one, or a part's, ``"encoder.0"``.
        decay: Weight of the past, 0 to 1: a number, or a schedule over averages taken, counted from 0.
        into: Name of the model that holds the average, of the same parameters, frozen. It begins with
            weights of its own.
        buffers: What happens to buffers, such as batch norm's statistics: ``"copy"`` the live ones
            (a copy's default), ``"average"`` them too (whole numbers are copied), or ``"keep"`` the
            average's own (the default with `into`: a teacher that sees data keeps statistics itself).
        view: Name of the weights view: what stands behind the ``@``.

    Raises:
        ModelError: There are no such weights, they have seen no batch (lazy modules) or cannot be
            copied, or the model `into` has other parameters or is trained.
        ValueError: The decay does not lie between 0 and 1, or `buffers` is another word.

    Attributes:
        num_averaged: How many averages have been taken.

    Reads: model, optimizer (only the model that is averaged)
    Writes: model (only the average: "model.G@ema", or the model `into`)

    Example:
        >>> learner = testing.toy_learner(EMA("model", 0.9))
        >>> history = learner.fit(1)
        >>> average, live = learner.weights["model@ema"].value.item(), learner.model.value.item()
        >>> 0 < average < live  # it began at 0, and follows
        True
    """

    model: str
    decay: float | Schedule = 0.999
    into: str | None = None
    buffers: Buffers | None = None
    view: str = "ema"
    num_averaged: int = field(default=0, init=False, repr=False)
    _average: nn.Module | None = field(default=None, init=False, repr=False)
    """The module that holds the average; None before there is a learner."""
    _loaded: dict[str, Any] | None = field(default=None, init=False, repr=False)
    """A state that was loaded before there is a learner."""
    _follows: bool = field(default=True, init=False, repr=False)
    """Whether the average is still to be the live weights: before the first step, and after load_weights."""
    _pending: bool = field(default=False, init=False, repr=False)
    """Whether an update has been seen whose average is not yet taken."""
    _counted: dict[str, bool] = field(factory=dict, init=False, repr=False)
    """By phase, whether `UpdateEnd` shows its updates (True), or the parameters alone (False)."""
    _before: tuple[int, list[Tensor]] | None = field(default=None, init=False, repr=False)
    """The parameters at the step's begin, as `_changes` and `_norms` tell them; None where nobody has to look."""
    _untouched: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    """The average, as id and changes, when it was last set to the live weights: it may be written to since."""
    _owners: dict[tuple[int, ...], list[torch.optim.Optimizer]] = field(factory=dict, init=False, repr=False)
    """The optimizers of the model, by the numbers of all optimizers' groups: one may be added while training."""
    _pairs: Pairs = field(factory=Pairs, init=False, repr=False, eq=False)
    """The average's tensors with the live ones."""

    draws = False
    _fixed = ("model", "into", "buffers", "view")
    in_compiled_step = "after"  # at UpdateEnd it only takes note

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model or "@" in self.model:
            raise ModelError(f"EMA({self.model!r}) was given; expected live weights, such as EMA('G', 0.999)")
        if self.into is not None and not isinstance(self.into, str):
            raise ModelError(f"EMA(into={describe(self.into)}) was given; expected a model's name: into='teacher'")
        if not callable(self.decay):
            _check_decay(self.decay)
        if self.buffers not in (None, "copy", "average", "keep"):
            raise ValueError(f"buffers={self.buffers!r} was given; expected 'copy', 'average' or 'keep'")
        if not isinstance(self.view, str) or not self.view.isidentifier():
            raise ModelError(f"EMA(view={self.view!r}) was given; expected the name of a weights view, such as 'ema'")

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
        self.num_averaged, self._pending = 0, False
        self._counted.clear()
        self._owners.clear()
        if self.into is None:
            learner.weights[self.average] = self._average = copied_weights(live, f"EMA({self.model!r})")
            self._note_following(self._average)
            learner.weights.follow(self.average, partial(self._follow, learner))
        else:
            self._follows, self._average = False, learner.weights[self.into]
            for module in (live, self._average):
                check_not_lazy(module, f"EMA({self.model!r})")
            _check_like(self.model, live, self.into, self._average, self.buffers not in (None, "keep"))
        if self._loaded is not None:
            self.load_state_dict(self._loaded)

    def _follow(self, learner: Any, average: nn.Module, anew: bool) -> None:
        """Make an average that has not begun, or begins anew, equal to the live weights, unless it was written to."""
        if anew:
            self._note_following(average)
        where, changes = self._untouched
        if self._follows and (where != id(average) or changes == _changes(average)):
            move_towards(average, learner.weights[self.model], 1.0, 1.0, "EMA")
            self._note_following(average)

    def _note_following(self, average: nn.Module) -> None:
        self._follows, self._untouched = True, (id(average), _changes(average))

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin the average, at the first step; look at the weights where no `UpdateEnd` has shown an update."""
        if self._follows:
            self._follow(learner, learner.weights[self.average], anew=False)
            self._follows = False
        if self._counted.get(type(phase).__qualname__) is not True:
            self._look(learner)
            learner.defer(partial(self._end, phase, learner), early=True)

    def _look(self, learner: Any) -> None:
        """Note how the weights are, so that a change of them is seen; fused kernels leave no trace in the counts."""
        live = learner.weights[self.model]
        self._before = _changes(live), _norms(live)

    def _has_changed(self, learner: Any) -> bool:
        """Return whether the weights have changed since they were looked at."""
        if self._before is None:
            return False
        live, (changes, norms) = learner.weights[self.model], self._before
        return changes != _changes(live) or not all(map(torch.equal, norms, _norms(live)))

    def _owning(self, learner: Any) -> list[torch.optim.Optimizer]:
        """List the optimizers of the model's parameters."""
        every = _each(behind(learner).optimizer)
        groups = (*map(len, map(_groups, every)),)  # one may be added while training
        if groups not in self._owners:
            own = set(learner.weights[self.model].parameters())
            self._owners[groups] = [each for each in every if not own.isdisjoint(owned_parameters(each))]
        return self._owners[groups]

    @on(UpdateEnd, AbstractTrainingPhase)
    def note_update(self, event: UpdateEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Note an update of the model's weights."""
        if self._pending:
            return
        held = behind(learner).optimizer
        owning, stepped = self._owning(learner), _each(held if event.name is None else look_up(held, event.name))
        if not {*owning}.isdisjoint(stepped):
            put(self, "_pending", True)  # quicker than an assignment, which sees to options
            self._counted[type(phase).__qualname__] = True
            if event.after_steps:  # no step ends any more
                self._end(phase, learner)
                return
            learner.defer(partial(self._end, phase, learner), early=True)

    def _weight(self) -> float:
        """Return how far the average moves next.

        Raises:
            ValueError: The decay does not lie between 0 and 1.
        """
        decay = value_at(self.decay, self.num_averaged)
        _check_decay(decay)
        return 1 - decay

    @property
    def _buffers(self) -> Buffers:
        """What happens to buffers."""
        return self.buffers or ("copy" if self.into is None else "keep")

    @on(StepEnd, AbstractTrainingPhase)
    def end_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Take an average where the weights were updated."""
        self._end(phase, learner)

    def _end(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Take an average where the weights were updated: when a step ends, or is left early."""
        name = type(phase).__qualname__
        if not self._pending:
            if self._counted.get(name) is True or not self._has_changed(learner):
                return
            self._counted[name] = False
        put(self, "_pending", False)
        put(self, "_before", None)
        weight = self._weight()
        of_buffers = {"copy": 1.0, "average": weight, "keep": 0.0}[self._buffers]
        weights = behind(learner).weights
        self._pairs.move(weights[self.average], weights[self.model], weight, of_buffers, "EMA")
        put(self, "num_averaged", self.num_averaged + 1)
        if self._counted.get(name) is not True:
            self._look(learner)  # a step around this one may go on

    def _step_average(self) -> StepAverage | None:
        """Return the average, for a compiled step to move; a subclass may move it otherwise."""
        if type(self) is not EMA:
            return None
        return StepAverage(self.model, self.average, self._weight, self._buffers, self._note_moved)

    def _note_moved(self, phase: AbstractTrainingPhase) -> None:
        """Note that a compiled step has moved the average."""
        if self._pending or self._before is not None:
            self._pending, self._before = False, None
        self._counted[type(phase).__qualname__] = True
        put(self, "num_averaged", self.num_averaged + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the counts, the updates noted, and the average where no model holds it."""
        own = self._average is not None and self.into is None
        return {
            "num_averaged": self.num_averaged,
            "average": self._average.state_dict() if own and self._average is not None else None,
            "follows": self._follows,
            "pending": self._pending,
            "counted": dict(self._counted),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps; before there is a learner, it waits until one is made."""
        self._loaded = state if self._average is None else None
        self.num_averaged, self._pending, self._before = state["num_averaged"], state.get("pending", False), None
        self._counted = dict(state.get("counted", {}))
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])
            self._note_following(self._average)
        self._follows = state.get("follows", False)


@resolve_conflict.register(EMA, EMA)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _one_place_each(a: EMA, b: EMA) -> None:
    """Two averages lie in two places.

    Raises:
        CallbackConflictError: They do not, and one would be lost.
    """
    if overlap(parse(a.writes[0], "EMA"), parse(b.writes[0], "EMA")):
        raise CallbackConflictError(
            f"{a!r} and {b!r} both write {a.writes[0]!r}, or a part of it; give one a name of its own: "
            f"EMA({b.model!r}, ..., view='slow')"
        )


def _each(held: Any) -> Sequence[torch.optim.Optimizer]:
    """List optimizers, from how a learner holds them."""
    if isinstance(held, torch.optim.Optimizer):
        return (held,)
    if isinstance(held, tuple) and None not in held:
        return held
    return [each for _, each in by_name(held)]


_groups = attrgetter("param_groups")


def _changes(module: nn.Module) -> int:
    """Count the changes in place of a module's parameters, as autograd does."""
    return sum(parameter._version for parameter in module.parameters())


@torch.no_grad()
def _norms(module: nn.Module) -> list[Tensor]:
    """Return the norm of each parameter, so that any change of its numbers is seen without a copy of them."""
    numbers: list[Tensor] = [p for p in module.parameters() if p.is_floating_point() or p.is_complex()]
    return list(torch._foreach_norm(numbers)) if numbers else []


def _check_decay(decay: float) -> None:
    if not is_number(decay) or not 0 <= decay <= 1:
        raise ValueError(f"EMA was given the decay {decay!r}; expected a weight of the past from 0 to 1, e.g. 0.999")


def _check_like(model: str, live: nn.Module, into: str, average: nn.Module, buffers_too: bool) -> None:
    """Raise for a model that cannot hold the average of another.

    Raises:
        ModelError: It is the same, has other parameters or buffers, or is trained.
    """
    if live is average:
        raise ModelError(f"EMA({model!r}, into={into!r}) would average a model into itself; expected another one")
    shapes, others = (
        {name: tuple(t.shape) for name, t in (*m.named_parameters(), *(m.named_buffers() if buffers_too else ()))}
        for m in (live, average)
    )
    if shapes != others:
        name = next(n for n in (*shapes, *others) if shapes.get(n) != others.get(n))
        raise ModelError(
            f"EMA({model!r}, into={into!r}): {name!r} has shape {shapes.get(name, 'none')} in one and "
            f"{others.get(name, 'none')} in the other; make the second a copy of the "
            f"first: copy.deepcopy({model}).requires_grad_(False)"
        )
    if any(parameter.requires_grad for parameter in average.parameters()):
        raise ModelError(
            f"EMA({model!r}, into={into!r}) moves {into!r}, and its parameters require gradients, so an optimizer "
            f"would move them too; write {into}.requires_grad_(False) before the learner is made"
        )
