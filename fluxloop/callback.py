"""The callback base, `on`, and `resolve_conflict`.

A callback is a class that declares what it reads and writes and has methods marked with `on`::

    @define
    class LossEMA(Callback):
        alpha: float = 0.1
        value: float | None = None
        reads = ("step.loss",)
        writes = ("cbstate.loss_ema",)

        @on(StepEnd, AbstractTrainingPhase)
        def update(self, event, phase, learner): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from attrs import define, field, frozen
from attrs import fields as attrs_fields
from multipledispatch import Dispatcher
from multipledispatch.conflict import supercedes

from fluxloop.errors import AmbiguousHandlerError, HandlerError, arguments_misfit, describe, did_you_mean
from fluxloop.events import Event, event_types
from fluxloop.guard.assign import fields_of_the_class, put, set_option
from fluxloop.monitor import Expected, Monitor
from fluxloop.order.averages import StepAverage
from fluxloop.phase import Phase, phase_types, require_pair

Handler = Callable[[Event, Phase, Any], None]
Signature = tuple[type[Event], type[Phase], type]
F = TypeVar("F", bound=Callable[..., Any])

EXPECTED = "(self, event, phase, learner)"
"""The arguments of a handler."""


def require_call(function: Any, arguments: int, expected: str, what: str) -> None:
    """Raise for a function that cannot be called with so many arguments by position, as far as that is known.

    Args:
        function: Anything that can be called.
        arguments: How many it will be given.
        expected: How they are written, for the message.
        what: What the function is called there.

    Raises:
        HandlerError: It takes fewer, or needs more.
    """
    misfit = arguments_misfit(function, arguments)
    if misfit is not None:
        raise HandlerError(f"{what} has the arguments {misfit[0]}; expected {expected} ({misfit[1]})")


REGISTRATIONS = "__fluxloop_on__"
"""The attribute in which `@on` notes what a method handles."""


@frozen
class _Registration:
    """One handler: the method's name, or the function itself where it came from outside."""

    name: str
    function: Callable[..., Any] | None


_from_outside: WeakKeyDictionary[type, dict[tuple[type[Event], type[Phase]], Callable[..., Any]]]
_from_outside = WeakKeyDictionary()

watchers: WeakSet[Any] = WeakSet()
"""Whoever has resolved handlers and wants its ``forget()`` called when one is added."""


def on(event: type[Event], phase: type[Phase] = Phase, callback: type[Callback] | None = None) -> Callable[[F], F]:
    """Register a handler for an event type and a phase type.

    In a class body it marks a method ``(self, event, phase, learner)``. From outside, with
    `callback`, it teaches a class one does not own: the function is called as
    ``(callback, event, phase, learner)``. May be stacked. Among several handlers that fit, the
    most specific in (event, phase, class) is called.

    Args:
        event: An event type; its subclasses are handled too.
        phase: A phase type; its subclasses are handled too. Left out: any phase.
        callback: The callback class to teach, where the handler stands outside of it.

    Raises:
        HandlerError: `event` is no event type, `phase` no phase type, or the function takes other arguments.

    Example:
        >>> class Hello(Callback):
        ...     @on(FitBegin)
        ...     def greet(self, event, phase, learner):
        ...         print("hello")
    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        name = event if isinstance(event, str) else getattr(event, "__name__", "")
        hint = did_you_mean(name, [cls.__name__ for cls in event_types()])
        raise HandlerError(
            f"@on was given {describe(event)} as an event; expected an event type, e.g. @on(StepEnd){hint}"
        )
    if not (isinstance(phase, type) and issubclass(phase, Phase)):
        hint = did_you_mean(phase, [cls.__name__ for cls in phase_types()]) if isinstance(phase, str) else ""
        raise HandlerError(
            f"@on({event.__name__}, …) was given {describe(phase)} as a phase; expected a phase type, "
            f"e.g. @on({event.__name__}, AbstractTrainingPhase){hint}"
        )
    if callback is not None and not (isinstance(callback, type) and issubclass(callback, Callback)):
        raise HandlerError(
            f"@on({event.__name__}, {phase.__name__}, …) was given {describe(callback)}; expected the "
            "class of a callback"
        )

    def register(function: F) -> F:
        if callback is None:
            marks = getattr(function, REGISTRATIONS, ())
            setattr(function, REGISTRATIONS, (*marks, (event, phase)))
        else:
            name = getattr(function, "__name__", repr(function))
            require_call(function, 4, "(callback, event, phase, learner)", f"{name}, a handler of {callback.__name__},")
            _from_outside.setdefault(callback, {})[event, phase] = function
            _handlers.clear()
            for watcher in list(watchers):
                watcher.forget()
        return function

    return register


def registrations(cls: type) -> dict[Signature, _Registration]:
    """Collect the handlers of a callback class: its own, inherited, and taught from outside.

    Raises:
        AmbiguousHandlerError: One class registers two methods for the same event and phase.
    """
    found: dict[Signature, _Registration] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            marks = getattr(member, REGISTRATIONS, ())
            if marks:  # a method registered anew no longer stands for what it stood for
                found = {key: reg for key, reg in found.items() if reg.function or reg.name != name}
            for event, phase in marks:
                known = found.get((event, phase, base))
                if known is not None:
                    raise AmbiguousHandlerError(
                        f"{base.__name__} has two handlers for ({event.__name__}, {phase.__name__}): "
                        f"{known.name} and {name}; keep one, or give one a more specific event or phase"
                    )
                found[event, phase, base] = _Registration(name, None)
        for (event, phase), function in _from_outside.get(base, {}).items():
            found[event, phase, base] = _Registration(getattr(function, "__name__", repr(function)), function)
    return found


def _meet(a: type, b: type) -> type | None:
    """Return the more specific of two types, None where neither is a subclass of the other."""
    return a if issubclass(a, b) else b if issubclass(b, a) else None


def _show(signature: Signature) -> str:
    event, phase, owner = signature
    return f"@on({event.__name__}, {phase.__name__}) of {owner.__name__}"


def most_specific(whose: str, found: Mapping[Any, Any], given: tuple[type, ...], show: Callable[[Any], str]) -> Any:
    """Return what is registered under the most specific of the signatures that fit `given`, or None.

    Raises:
        AmbiguousHandlerError: Several fit equally well.
    """
    fitting = [signature for signature in found if all(map(issubclass, given, signature))]
    best = [s for s in fitting if all(s == other or supercedes(s, other) for other in fitting)]
    if fitting and not best:
        rivals = [s for s in fitting if not any(o != s and supercedes(o, s) for o in fitting)]
        first, second = sorted(rivals, key=str)[:2]
        types = ", ".join(cls.__name__ for cls in given[:2])
        raise AmbiguousHandlerError(
            f"{whose} that fit ({types}) equally well: {show(first)} and {show(second)}; add one for exactly "
            f"that: {show(given)}"
        )
    return found[best[0]] if best else None


class Handlers:
    """The handlers of one callback class, dispatched on (event type, phase type, class).

    Raises:
        AmbiguousHandlerError: Two of them fit some event and phase equally well.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self._found = registrations(cls)
        for (event, phase, _), (other_event, other_phase, _) in combinations(self._found, 2):
            related = [_meet(event, other_event), _meet(phase, other_phase)]
            if all(related):
                self.find(*related)  # type: ignore[arg-type]  # both are there: the line above

    def find(self, event: type[Event], phase: type[Phase]) -> _Registration | None:
        """Return the most specific handler for an event type and a phase type, or None.

        Raises:
            AmbiguousHandlerError: Several fit equally well.
        """
        key = (event, phase, self.cls)
        found: _Registration | None = most_specific(f"{self.cls.__name__} has two handlers", self._found, key, _show)
        return found

    @property
    def signatures(self) -> list[tuple[type[Event], type[Phase]]]:
        """The (event, phase) types with a handler."""
        return [(event, phase) for event, phase, _ in self._found]


_handlers: WeakKeyDictionary[type, Handlers] = WeakKeyDictionary()


def handlers_of(cls: type) -> Handlers:
    """Return the handlers of a callback class, collected once."""
    if cls not in _handlers:
        _handlers[cls] = Handlers(cls)
    return _handlers[cls]


@define(eq=False, slots=False)
class Callback:
    """Base of all callbacks: a feature that reacts to events and declares what it touches.

    A subclass is an ``attrs`` class or a plain one. What it may say, in the class body:

    - ``reads``, ``writes``: dotted paths into the learner (``"step.loss"``, ``"cbstate.history"``,
      ``"model"``); a prefix covers what is below, writing implies reading. Handlers get a view of
      the learner that allows exactly that. An instance may compute them (a property).
    - ``run_after``: types of callbacks that must have run before it at each event.
    - ``draws``: whether its handlers draw from the global random generators. True: they get a
      stream of their own. None: what they draw inside an epoch is put back, which costs about
      7 µs per handler between two steps, 13 in the middle of one. False: they promise not to draw.
    - ``in_compiled_step``: when its handlers inside a step run, where
      ``Accelerator(compile="step")`` makes one graph of the step:

      ============  ===========================================  ======================================
      value         for handlers that                            run
      ============  ===========================================  ======================================
      None          must run at the moment of the event          never: the step cannot be compiled
      ``"after"``   only take note of the event, and change      after the graph
                    numbers of models in place alone
      ``"inside"``  are operations on the step's tensors and     as a part of the graph
                    gradients alone
      ``"never"``   look into the step by other means, such as   never: the step cannot be compiled
                    hooks of modules
      ``"watched"`` between steps may change attributes of       between steps; models are compared
                    models that they do not declare              at every step
      ============  ===========================================  ======================================

    - ``main_only``: where several processes train, its handlers run in the first one alone. For what prints, draws or
      writes outside of the training; not for what writes something that others read, or that tells other processes
      something, since these wait for it. `init` runs in all.
    - ``state_dict()`` and ``load_state_dict(state)``, both or neither: what a checkpoint keeps.
      With neither, a checkpoint keeps the attributes that have changed since `init` and are plain
      data: numbers, texts, tensors, generators, and containers of them.
    - ``transient``: names of attributes, and paths that it writes, that no checkpoint needs to keep.

    Args:
        name: Tells two instances of one class apart.

    >>> class CountRows(Callback):
    ...     reads = ("step.xs",)
    ...     rows = 0
    ...     @on(StepEnd, TrainingPhase)
    ...     def count(self, event, phase, learner):
    ...         self.rows += len(learner.step.xs)
    >>> count = CountRows()
    >>> testing.toy_learner(count, num_batches=4, batch_size=8).fit(2), count.rows
    (..., 64)
    """

    name: str | None = field(default=None, kw_only=True, repr=False)
    _adopted: bool = field(default=False, init=False, repr=False, eq=False)  # whether a learner has it
    reads: ClassVar[Sequence[str]] = ()
    writes: ClassVar[Sequence[str]] = ()
    run_after: ClassVar[Sequence[type[Callback]]] = ()
    draws: ClassVar[bool | None] = None
    in_compiled_step: ClassVar[Literal["after", "inside", "never", "watched"] | None] = None
    main_only: ClassVar[bool] = False
    transient: ClassVar[Sequence[str]] = ()
    _begins_anywhere: ClassVar[bool] = False
    """Whether it misses nothing where it is added in the middle of a run, as a logger does not."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in vars(cls).items():
            registered = any(hasattr(vars(base).get(name), REGISTRATIONS) for base in cls.__mro__)
            if name.startswith("on_") and callable(member) and not registered:
                raise HandlerError(
                    f"{cls.__name__}.{name} looks like a handler but nothing calls it; expected "
                    f"@on(Event, Phase) above it, e.g. @on(StepEnd) (or a name without 'on_')"
                )
            if isinstance(member, FunctionType) and hasattr(member, REGISTRATIONS):
                require_call(member, 4, EXPECTED, f"the handler {cls.__name__}.{name}")
        require_pair(cls, HandlerError)
        fields_of_the_class(cls)
        if cls.__module__.startswith("fluxloop."):
            cls._built_in = cls
            if "__attrs_attrs__" in vars(cls):  # attrs has made it anew, with slots
                cls._options = {a.name: a for a in attrs_fields(cls) if a.init and not a.name.startswith("_")}
                if vars(cls).get("__attrs_own_setattr__") or vars(cls).get("__setattr__") is put:
                    cls.__setattr__ = Callback.__setattr__  # type: ignore[method-assign]  # it converts and validates too
                    cls.__attrs_own_setattr__ = False  # type: ignore[attr-defined]  # what attrs asks in subclasses

    _built_in: ClassVar[type | None] = None
    """The class of fluxloop's that it is, or is a subclass of."""
    _options: ClassVar[Mapping[str, Any]] = {}
    """The public fields of that class, by name: its options."""
    _fixed: ClassVar[Sequence[str]] = ()
    """Those of them that have no effect once a learner has the callback."""

    if not TYPE_CHECKING:  # for type checkers every attribute is as the class says

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute; an option of fluxloop's own callbacks takes effect, or is refused.

            Raises:
                AssignmentError: There is no such option, or it cannot be changed any more; says what to type.
            """
            if self._built_in is None or name[:1] == "_":
                put(self, name, value)
            else:
                set_option(self, name, value)

    @property
    def monitors(self) -> Sequence[Monitor]:
        """The metrics that it watches; a fit that will not record one of them is refused before its first step."""
        return ()

    def records(self, phase: Phase | None) -> Sequence[Expected] | None:
        """Return what it is going to record as metrics of a phase; None where that cannot be known before.

        Args:
            phase: The phase; None for any.
        """
        return None if {"*", "cbstate", "cbstate.metrics"}.intersection(self.writes) else ()

    def init(self, learner: Any) -> None:
        """Set up, once per learner, before anything else runs; may be called again.

        Args:
            learner: The same view that handlers get.
        """

    @property
    def unwrapped(self) -> Callback:
        """The callback itself; a wrapper gives the one it wraps."""
        return self

    @property
    def identity(self) -> str:
        """What tells this callback from unnamed others of its class: its fields, without addresses."""
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self))

    def _step_average(self) -> StepAverage | None:
        """Return the average of weights that it moves after updates, where a compiled step may move it instead."""
        return None

    def handles(self) -> list[tuple[type[Event], type[Phase]]]:
        """List the (event, phase) types it has handlers for; raises `AmbiguousHandlerError`."""
        return handlers_of(type(self)).signatures

    def handler(self, event: type[Event], phase: type[Phase]) -> Handler | None:
        """Return the function to call as ``(event, phase, view)`` for an event and a phase type, or None."""
        found = handlers_of(type(self)).find(event, phase)
        if found is None:
            return None
        if found.function is None:
            method: Handler = getattr(self, found.name)
            return method
        bound: Handler = MethodType(found.function, self)
        return bound


Callback.name, Callback._adopted = None, False  # for subclasses whose own __init__ does not call ours
fields_of_the_class(Callback)


@define(eq=False, slots=False)
class UnsafeCallback(Callback):
    """A callback that gets the learner itself instead of a view; what it declares still orders it.

    >>> class Zero(UnsafeCallback):
    ...     zero = on(CycleEnd)(lambda self, event, phase, learner: learner.model.value.data.zero_())
    >>> learner = testing.toy_learner(Zero())
    >>> learner.fit(1), learner.model.value.item()
    (..., 0.0)
    """


@frozen
class RunFirst:
    """A resolution: `callback` goes before the other one.

    >>> Scale, Shift = (type(name, (Callback,), {"writes": ("step.xs",)}) for name in ("Scale", "Shift"))
    >>> rule = resolve_conflict.register(Shift, Scale)(lambda shift, scale: RunFirst(shift))
    >>> testing.toy_learner(Scale(), Shift()).callbacks.order
    ['Shift', 'Scale']
    """

    callback: Callback


@frozen
class NoConflict:
    """A resolution: the two may run in either order.

    >>> Red, Blue = (type(name, (Callback,), {"writes": ("step.xs",)}) for name in ("Red", "Blue"))
    >>> rule = resolve_conflict.register(Red, Blue)(lambda red, blue: NoConflict())
    >>> testing.toy_learner(Red(), Blue()).callbacks.order  # by their names, as nothing else orders them
    ['Blue', 'Red']
    """


@frozen
class Unresolvable:
    """A resolution: the two cannot be used together.

    >>> Grow, Prune = (type(name, (Callback,), {"writes": ("model",)}) for name in ("Grow", "Prune"))
    >>> rule = resolve_conflict.register(Grow, Prune)(lambda grow, prune: Unresolvable())
    >>> testing.toy_learner(Grow(), Prune())
    Traceback (most recent call last):
    fluxloop.errors.CallbackConflictError: ...
    """


Resolution = RunFirst | NoConflict | Unresolvable

resolve_conflict = Dispatcher(
    "resolve_conflict",
    doc="""Return how two callbacks that touch the same path get along.

Register a function for two callback types; it is looked up in both directions and returns
`RunFirst(callback)`, `NoConflict()` or `Unresolvable()`:

>>> Scale, Shift = (type(name, (Callback,), {"writes": ("step.xs",)}) for name in ("Scale", "Shift"))
>>> @resolve_conflict.register(Shift, Scale)
... def _(shift, scale):
...     return RunFirst(scale)
>>> resolve_conflict(Shift(), Scale())
RunFirst(callback=Scale(...))
""",
)


@resolve_conflict.register(Callback, Callback)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _not_said(a: Callback, b: Callback) -> None:
    """Nothing was said about these two."""


def _show_pair(signature: tuple[type, ...]) -> str:
    return f"@resolve_conflict.register({', '.join(cls.__name__ for cls in signature)})"


def resolution(a: Callback, b: Callback) -> Resolution | None:
    """Ask `resolve_conflict` about two callbacks in both directions; None where nothing was said.

    Raises:
        HandlerError: The two directions contradict each other, or the answer is no resolution.
        AmbiguousHandlerError: Two rules fit the pair equally well.
    """
    a, b = a.unwrapped, b.unwrapped
    answers = []
    for first, second in ((a, b), (b, a)):
        types = (type(first), type(second))
        rule = most_specific("resolve_conflict has two rules", resolve_conflict.funcs, types, _show_pair)
        answers.append(rule(first, second))
    said = [answer for answer in answers if answer is not None]
    for answer in said:
        named = answer.callback if isinstance(answer, RunFirst) else None
        if not isinstance(answer, (RunFirst, NoConflict, Unresolvable)) or (
            named is not None and named is not a and named is not b
        ):
            raise HandlerError(
                f"resolve_conflict({type(a).__name__}, {type(b).__name__}) returned {answer!r}; expected "
                "RunFirst(one of the two), NoConflict() or Unresolvable()"
            )
    if len(said) == 2 and (
        type(said[0]) is not type(said[1])
        or (isinstance(said[0], RunFirst) and said[0].callback is not said[1].callback)
    ):
        raise HandlerError(
            f"resolve_conflict says {said[0]!r} for ({type(a).__name__}, {type(b).__name__}) and "
            f"{said[1]!r} the other way round; keep one of the two"
        )
    return said[0] if said else None
