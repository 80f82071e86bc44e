"""The phase types: what one epoch and one step do.

::

    Phase
    ├── AbstractTrainingPhase      data "training", train mode, gradients on
    │   └── TrainingPhase, PerOptimizerPhase, …             (fluxloop/phases/)
    ├── AbstractValidationPhase    data "validation", eval mode, gradients off
    │   ├── ValidationPhase, PredictionPhase, …             (fluxloop/phases/)
    │   └── ProbePhase             what callbacks measure on held-out data by themselves
    └── FittingPhase               the fit itself: FitBegin, CycleBegin, CycleEnd, FitEnd

A new method of training is a subclass with its own `body` (what happens between StepBegin and
StepEnd), or, where that is not enough, its own `step`; callbacks that handle an abstract phase act on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import update_wrapper
from numbers import Real
from pathlib import PurePath
from types import FunctionType, MethodType, NoneType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from fluxloop.errors import BatchError, CancelStepException, PhaseError, arguments_misfit, describe
from fluxloop.guard.given import is_number
from fluxloop.lazy import all_subclasses
from fluxloop.loop import runepoch, runstep
from fluxloop.nested import batch_size
from fluxloop.state import name_of

if TYPE_CHECKING:
    from torch import Tensor

    from fluxloop.loop import Handle
    from fluxloop.state import StepState


class Step:
    """The `step` of a phase class: it ends where a handler of its StepBegin raised a cancel.

    Such a cancel leaves the ``with runstep(...)`` of the step, which cannot skip its own body;
    here the step ends, whoever called it.
    """

    # Each class's own step is wrapped when the class is made, and not caught by the epoch that calls it: users call
    # `phase.step` in loops of their own too, and a subclass's step may call super().step(), where the cancel has to end
    # the inner step alone. An object and not a closure, as `function` can be looked at by name: check_methods reads its
    # arguments, and what compares steps of classes sees whether one is inherited.

    def __init__(self, function: Callable[[Any, Any, Any], Any]) -> None:
        update_wrapper(self, function)
        self.function = function

    @property
    def __closure__(self) -> Any:
        """The function's: where ``attrs`` repairs ``super()`` in a class that it makes anew."""
        return getattr(self.function, "__closure__", None)

    def __get__(self, phase: Phase | None, owner: type) -> Any:
        return self if phase is None else MethodType(self, phase)

    def __call__(self, phase: Phase, learner: Any, batch: Any) -> Any:
        """Run the step; return what it returns, or the step's state where it was cancelled."""
        try:
            return self.function(phase, learner, batch)
        except CancelStepException:
            return learner.step


def has_step(phase: type[Phase]) -> bool:
    """Return whether a phase class says what a step does; one may have an epoch alone."""
    return phase.body is not Phase.body or getattr(phase.step, "function", phase.step) is not Phase.step


class Phase:
    """Base of all phases.

    Subclasses write the parts of a step, `entries`, `body` and `finish`, as the built-in ones do, so
    that it can be compiled whole. They override `step` where a batch is not one step of that form, and
    seldom `epoch`. One that holds something between steps has ``state_dict()`` and
    ``load_state_dict(state)``, both or neither; in a second learner it begins as in the first. A class
    may say otherwise on these:

    Example:
        >>> class Regression(TrainingPhase):
        ...     def body(self, learner, handle, state):
        ...         state.loss = (learner.model(state.xs) - state.ys).abs().mean()
        ...         learner.backward(state.loss)
        ...         learner.update()
        >>> history = testing.toy_learner(Recorder(), num_batches=4).fit(2, phases=[Regression()])
        >>> history[Regression].updates
        {None: 8}
    """

    data_key: ClassVar[str] = ""
    """Which of the learner's data the phase runs on; "" for none."""
    train_mode: ClassVar[bool] = False
    """Whether the models are in train mode."""
    gradients: ClassVar[bool] = False
    """Whether gradients are recorded."""
    model_view: ClassVar[str] = ""
    """Which weights view ``learner.model`` is in it: ``"ema"`` for averaged ones; "" for the live ones."""
    resumable: ClassVar[bool] = False
    """Whether an `epoch` of its own can be resumed in the middle: it is called again with the remaining batches, so
    what it holds between steps has to be in attributes."""
    transient: ClassVar[Sequence[str]] = ()
    """Names of attributes that no checkpoint needs; others that change are kept in it, where they are plain data."""

    stores_loss: ClassVar[bool] = False
    """Whether each of its steps stores ``loss``, so that a metric's misspelt name is found before the first step."""
    compiled: ClassVar[bool] = True
    """Whether ``Accelerator(compile="step")`` is to compile its steps; False: they run as they are."""

    name: str = "Phase"
    """What its numbers are called in the history, monitors and logs; by default the class's name. Give it when
    the phase is made, ``ValidationPhase(name="noisy")``, or is an attribute of the class or of the phase."""

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__()  # a subclass may have another base beside this one
        if name is not None:
            if not isinstance(name, str):
                raise PhaseError(f"{type(self).__name__}(name={name!r}) was given; expected a text: name='noisy'")
            self.name = name
            check_name(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(cls.data_key, str):
            raise PhaseError(
                f"{cls.__name__} has data_key as a field; it belongs to the class, without an annotation: "
                "data_key = 'training'"
            )
        if "name" not in vars(cls):
            cls.name = cls.__name__
        require_pair(cls, PhaseError)
        if not isinstance(cls.step, Step):
            setattr(cls, "step", Step(cls.step))  # noqa: B010 - mypy knows no other way

    @property
    def owner(self) -> str:
        """Whose the phase's random numbers are: the data key's where it trains, its own where it watches."""
        if self.gradients and self.data_key:
            return self.data_key
        return f"{self.data_key}/{name_of(self)}".lstrip("/")

    @property
    def epoch_stream(self) -> str:
        """The name of the stream that its epochs start from."""
        return f"{self.owner}/epoch"

    @property
    def step_stream(self) -> str:
        """The name of the stream that its steps start from."""
        return f"{self.owner}/step"

    def step(self, learner: Any, batch: Any) -> Any:
        """Do one step on one batch: its `entries`, then `body` between StepBegin and StepEnd, then `finish`.

        Returns:
            Anything; the built-in phases return the step's state.

        Raises:
            PhaseError: The phase has neither a body nor a step of its own.
        """
        if type(self).body is Phase.body:
            raise PhaseError(
                f"{type(self).__name__} does not say what a step does; write a body:\n"
                "    def body(self, learner, handle, state):\n"
                "        ..."
            )
        with runstep(learner, self, **self.entries(batch)) as (handle, state):
            if learner._compiled is None:
                self.body(learner, handle, state)
            else:
                learner._compiled.run(self, handle, state)
            self.finish(learner, state)
        return state

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the entries that a step starts with: ``xs``, and ``ys`` where the batch is a pair."""
        return inputs_and_labels(batch)

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Do what happens between StepBegin and StepEnd, in tensors alone where it is to be compiled."""

    def finish(self, learner: Any, state: StepState) -> None:
        """Do what follows the body before StepEnd, in Python, such as counting steps; it is not compiled."""

    def epoch(self, learner: Any, data: Iterable[Any]) -> None:
        """Do one epoch: a step on each batch of `data`."""
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)

    def weight(self, state: StepState) -> float | Tensor:
        """Return what a step weighs in the means of an epoch: of its losses, and of metrics that are functions.

        It is asked when the step ends. By default the number of the step's rows: the length of its
        first entry that is a tensor, or a list of as many rows. Where a loss is a mean over
        something else, say what: ``return (state.ys != -100).sum()`` for the tokens that are no padding.

        Args:
            state: The step's entries.

        Returns:
            A number from 0 on, or a tensor with one such number, which stays on its device.
        """
        return batch_size(vars(state))

    def check(self, learner: Any) -> None:
        """Raise what is wrong with the learner for this phase, before anything has begun."""

    kept_as: ClassVar[Mapping[str, str]] = {}
    """Under which attributes arguments are kept whose own names are others'; for `repr`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options_of(self).items())})"


def options_of(phase: Phase) -> dict[str, Any]:
    """Return what a phase was made with: arguments that are numbers, texts, or tuples of these, and no defaults.

    They are read from its attributes: an argument that is kept under no attribute of its name, or of the name that
    `kept_as` says, is left out.
    """
    cls = type(phase)
    found: dict[str, Any] = {}
    for name, parameter in _arguments(cls).items():
        usual = name_of(cls) if name == "name" else parameter.default
        kept = cls.kept_as.get(name, name)
        value = name_of(phase) if name == "name" else getattr(phase, kept, usual)
        parts = value if isinstance(value, tuple) else (value,)
        if all(isinstance(part, (bool, Real, str, NoneType)) for part in parts) and value != usual:
            found[name] = value
    return found


def _arguments(cls: type[Phase]) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class, with those of its bases where it passes on what it does not name."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]  # without self
        found |= {each.name: each for each in own if each.kind in _NAMED and each.name not in found}
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own):
            break
    return found


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_name(phase: Phase) -> None:
    """Raise for a phase whose name cannot stand before a metric's: ``"noisy/loss"``.

    Raises:
        PhaseError: It is empty, or has a slash or a bracket in it.
    """
    name = getattr(phase, "name", None)  # an attribute of a user's may be anything: what is no text is no name
    if isinstance(name, str) and (not name.strip() or any(mark in name for mark in "/[]")):
        cls = type(phase).__name__
        raise PhaseError(
            f"a {cls} has name={name!r}; expected a text without slashes and brackets, as in 'noisy/loss': "
            f"{cls}.name = 'noisy', or phase.name = 'noisy'"
        )


_CALLED = {
    "step": "(self, learner, batch)",
    "epoch": "(self, learner, data)",
    "entries": "(self, batch)",
    "body": "(self, learner, handle, state)",
    "finish": "(self, learner, state)",
}
"""What the methods of a phase that users write are called with."""

_checked: WeakSet[type[Phase]] = WeakSet()


def check_methods(cls: type[Phase]) -> None:
    """Raise for a phase class with a method that cannot be called as it will be: seen now, not after an epoch.

    Raises:
        PhaseError: Names the method, and what it is to take.
    """
    if cls in _checked:
        return
    for name, expected in _CALLED.items():
        method = inspect.getattr_static(cls, name)
        function = getattr(method, "function", method)  # of a step, which is wrapped
        misfit = arguments_misfit(function, expected.count(",") + 1) if isinstance(function, FunctionType) else None
        if misfit is not None:
            raise PhaseError(f"{cls.__name__}.{name} has the arguments {misfit[0]}; expected {expected} ({misfit[1]})")
    _checked.add(cls)


def check_every(phase: AbstractValidationPhase) -> None:
    """Raise for a validation phase whose `every` is no number of cycles.

    Raises:
        PhaseError: `every` is no whole number from 1.
    """
    if not is_number(phase.every, whole=True) or phase.every < 1:
        cls = type(phase).__name__
        raise PhaseError(
            f"a {cls} has every={phase.every!r}; expected in which cycles of a fit it runs, a whole number from 1: "
            f"{cls}.every = 3 for every third"
        )


def is_due(phase: Phase, cycle: int, last: int) -> bool:
    """Return whether a phase runs in a cycle: one that trains always does.

    Args:
        phase: The phase.
        cycle: Number of the cycle, from 1.
        last: Number of the fit's last one.
    """
    return not isinstance(phase, AbstractValidationPhase) or cycle % int(phase.every) == 0 or cycle == last


def without_names(batch: Any) -> Any:
    """Return a batch without the names of files behind its first two items, as some data sets give them."""
    if not isinstance(batch, (tuple, list)) or len(batch) <= 2 or _are_texts(batch[0]):  # which are inputs then
        return batch
    kept = [*batch[:2], *(each for each in batch[2:] if not _are_file_names(each))]
    return batch if len(kept) == len(batch) else tuple(kept)


def _are_file_names(items: Any) -> bool:
    """Return whether these are texts with the ending of a file each; others, such as questions, mean something."""
    return _are_texts(items) and all(PurePath(each).suffix[1:].isalnum() for each in items)


def _are_texts(items: Any) -> bool:
    return isinstance(items, (tuple, list)) and bool(items) and all(isinstance(each, str) for each in items)


def inputs_and_labels(batch: Any) -> dict[str, Any]:
    """Return ``xs``, and ``ys`` of a batch that is a pair; a tuple or list of one item is that item.

    Names of files behind them, lists of texts such as ``"cats/1.png"``, are passed over.

    Raises:
        BatchError: It has more items.
    """
    if not isinstance(batch, (tuple, list)):
        return {"xs": batch}
    if len(batch) > 2:
        batch = without_names(batch)
    if len(batch) not in (1, 2):
        raise BatchError(
            f"a batch of {len(batch)} items was given ({describe(batch)}); expected xs, (xs,) or (xs, ys). For others "
            "say in the phase's entries(batch) what they are"
        )
    return dict(zip(("xs", "ys"), batch, strict=False))


def check_phase_type(whose: str, phase: object) -> None:
    """Raise for something that is no phase type.

    Raises:
        PhaseError: Says what was given.
    """
    if not (isinstance(phase, type) and issubclass(phase, Phase)):
        raise PhaseError(f"{whose}(phase={describe(phase)}) was given; expected a phase type, e.g. phase=TrainingPhase")


def require_pair(cls: type, error: type[Exception]) -> None:
    """Raise for a class that has only one of ``state_dict`` and ``load_state_dict``."""
    pair = ["state_dict" in dir(cls), "load_state_dict" in dir(cls)]
    if pair[0] != pair[1]:
        raise error(
            f"{cls.__name__} has {'state_dict' if pair[0] else 'load_state_dict'} alone; expected "
            "both state_dict(self) and load_state_dict(self, state), or neither"
        )


class AbstractTrainingPhase(Phase):
    """Base of the phases that train: data ``"training"``, train mode, gradients on.

    Example:
        >>> AbstractTrainingPhase.data_key, issubclass(GANPhase, AbstractTrainingPhase)
        ('training', True)
        >>> learned = CustomCallback(lambda learner: print("an epoch of training"), EpochEnd, AbstractTrainingPhase)
        >>> history = testing.toy_learner(learned).fit(1)  # the validation's epoch is none
        an epoch of training
    """

    data_key = "training"
    train_mode = True
    gradients = True


class AbstractValidationPhase(Phase):
    """Base of the phases that only watch: data ``"validation"``, eval mode, gradients off.

    Args:
        name: What its numbers are called; by default the class's name.
        every: In a fit it runs in every so many cycles, counted over all fits, and in the last one of the fit.

    Raises:
        PhaseError: `name` cannot stand before a metric's, or `every` is no whole number from 1.

    Example:
        >>> AbstractValidationPhase.data_key, issubclass(PredictionPhase, AbstractValidationPhase)
        ('validation', True)
        >>> history = testing.toy_learner(Recorder()).fit(4, phases=[TrainingPhase(), ValidationPhase(every=2)])
        >>> history[ValidationPhase].epochs
        2
    """

    data_key = "validation"
    every: int = 1
    """In which cycles of a fit it runs; it may be an attribute of the class or of the phase as well."""

    def __init__(self, *, name: str | None = None, every: int = 1) -> None:
        super().__init__(name=name)
        if type(every) is not int or every != 1:
            self.every = every
            check_every(self)


class ProbePhase(AbstractValidationPhase):
    """Stands for what callbacks measure on held-out data by themselves: ``history["validation/knn_encoder"]``.

    It is the key under which they record it, at the epoch of the training phase that ended; it has
    no epochs of its own.

    Example:
        >>> class Zeros(MetricSource):
        ...     metric_names = ("zeros",)
        ...     def measure(self, learner):
        ...         return {"zeros": 0.5}
        >>> history = testing.toy_learner(Recorder(), Metrics(), Zeros()).fit(1)
        >>> history.metrics[ProbePhase]["zeros"]
        [0.5]
    """

    def check(self, learner: Any) -> None:
        """Raise: it has no epochs of its own."""
        raise PhaseError("ProbePhase stands for what probes record and has no epochs; give the probe as a callback")


class FittingPhase(Phase):
    """The fit itself. `FitBegin`, `CycleBegin`, `CycleEnd` and `FitEnd` are fired with it.

    Example:
        >>> events = testing.EventRecorder()
        >>> history = testing.toy_learner(events).fit(1)
        >>> [event for event, phase in events.trace if phase == "FittingPhase"]
        ['FitBegin', 'CycleBegin', 'CycleEnd', 'FitEnd']
    """

    def check(self, learner: Any) -> None:
        """Raise: it has no epochs of its own."""
        raise PhaseError("FittingPhase is the fit itself and has no epochs; expected a phase such as TrainingPhase()")


def phase_types() -> list[type[Phase]]:
    """List the phase types that exist, fluxloop's and users'."""
    return all_subclasses(Phase, "fluxloop.phases")
