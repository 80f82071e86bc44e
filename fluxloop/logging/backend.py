"""The base of backends, to which things are logged, and `log_to`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

from attrs import define, field
from multipledispatch import Dispatcher

from fluxloop.errors import LogExistsError, describe, warn_user
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.logging.loggables import Loggable
from fluxloop.processes.group import current

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


_writers: WeakValueDictionary[str, Backend] = WeakValueDictionary()
"""The backend that writes to each file or folder, by its name."""


@fields_of_the_class
@define(eq=False, slots=False)
class Backend:
    """Base of backends. A subclass says how to write; this class decides when, and what happens if that fails.

    A backend is opened when something is first written, flushed at the end of each epoch, and closed at
    the end of a fit in every outcome; written to again it is opened again, and goes on. One that
    fails (disk full, no network, no rights) warns once and is left alone after that: the training
    goes on. A deep copy, such as that of a learner's copy, writes nothing; nor do processes other than the first.

    What it has logged belongs to the state of a training: ``fit(resume=...)`` cuts the log to what it was
    at the checkpoint, so that what the stopped run logged later is not there twice. A new run does not
    write into another's log, nor does one that branches off with ``learner.load``, unless this
    backend wrote that log itself.

    A subclass registers a function per kind of `Loggable` with `log_to`, and overrides what it needs:

    - ``_open()``, ``_flush()``, ``_close()``: open the log at its end; write what waits; close it.
    - ``_place()``: the name of the file or folder that no other backend may write, or None.
    - ``_found()``: the name of another run's log where a new one would be written, or None.
    - ``_position()``: how far it is written, after a flush, as plain data; ``_rewind(position)``: go
      back to that, None being the very beginning, before it is opened.

    Example:
        >>> from fluxloop.logging import Backend, Scalar, log_to
        >>> class Printer(Backend):
        ...     def __repr__(self):
        ...         return "Printer()"
        >>> @log_to.register(Printer, Scalar)
        ... def _(backend, scalar, name, step, group):
        ...     print(step, *group, name, scalar.value)
        >>> log_to(Printer(), Scalar(0.5), "loss", 1, ("epoch", "validation"))
        1 epoch validation loss 0.5
    """

    muted: ClassVar[bool] = True
    """Whether a deep copy writes nothing, and a process other than the first."""

    _opened: bool = field(default=False, init=False, repr=False)
    _is_own: bool = field(default=False, init=False, repr=False)
    _silent: bool = field(default=False, init=False, repr=False)
    _rewinds: bool = field(default=False, init=False, repr=False)
    _noted: Any = field(default=None, init=False, repr=False)
    _refused: set[type] = field(factory=set, init=False, repr=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields_of_the_class(cls)

    def _open(self) -> None: ...

    def _flush(self) -> None: ...

    def _close(self) -> None: ...

    def _place(self) -> str | None:
        return None

    def _found(self) -> str | None:
        return None

    def _position(self) -> Any:
        return None

    def _rewind(self, position: Any) -> None: ...

    def begin(self, resumed: bool = False) -> None:
        """Get ready for a run.

        Args:
            resumed: Whether the run of the loaded state goes on itself (``FitBegin.resumed``), and no branch of it.

        Raises:
            LogExistsError: There is a log already, and this run does not continue it, or another
                backend writes it.
        """
        if self._opened or self._silent:
            return
        if self.muted and (group := current()) is not None and not group.is_main:  # the first process writes for all
            self._silent = True
            return
        self._is_own = self._is_own or (resumed and self._rewinds)
        found = None if self._is_own else self._attempt("look for an earlier log", self._found)
        if found is not None:
            raise LogExistsError(
                f"{self!r} would write into an earlier run's log, {found}; give another place, remove it, or continue "
                "that run: learner.fit(..., resume=folder)"
            )
        if not self._is_own:
            self._noted, self._rewinds = None, False  # a loaded state is of another log
        place = self._place()
        if place is not None and _writers.setdefault(place, self) is not self:
            raise LogExistsError(
                f"two backends would write {place}; share one: log = {self!r}, and give 'log' to both callbacks"
            )

    def write(self, function: Callable[..., object], thing: Loggable, name: str, step: int, group: Any) -> None:
        """Call a function registered with `log_to`, opening this before where needed.

        Raises:
            LogExistsError: There is a log already, and this run does not continue it.
        """
        self.begin()
        if not self._opened and not self._silent:
            self._attempt("be opened", self._start)
        if not self._silent:
            self._attempt(f"write {name!r}", lambda: function(self, thing, name, step, group))

    def flush(self) -> None:
        """Write what waits."""
        if self._opened and not self._silent:
            self._attempt("be flushed", self._flush)

    def close(self) -> None:
        """Write what waits, and close; closing it twice does no harm, and writing opens it again."""
        if self._opened and not self._silent:
            self._attempt("be closed", self._stop)
        self._opened = False
        place = self._place()
        if place is not None and _writers.get(place) is self:
            del _writers[place]

    def state_dict(self) -> dict[str, Any]:
        """Return how far the backend has written, as plain data."""
        if self._opened and not self._silent:
            self._attempt("be flushed", self._note_position)
        return {"position": self._noted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load how far it had written: a run that is resumed removes what was logged later, before it writes.

        Another run, which has a new log, leaves that state out.
        """
        self.close()
        self._noted, self._rewinds = state["position"], True

    def refuse(self, kind: type[Loggable], held: Sequence[str]) -> None:
        """Warn once that the backend cannot hold a kind of loggable."""
        if kind not in self._refused and not self._silent:
            self._refused.add(kind)
            warn_user(
                f"{self!r} cannot hold {kind.__name__}, which is left out; it holds {', '.join(held) or 'nothing'}"
            )

    def _start(self) -> None:
        if self._rewinds:
            self._rewind(self._noted)
            self._rewinds = False
        self._open()
        self._opened = self._is_own = True

    def _note_position(self) -> None:
        self._flush()
        self._noted = self._position()

    def _stop(self) -> None:
        try:
            self._note_position()
        finally:
            self._close()

    def _attempt(self, what: str, do: Callable[[], T]) -> T | None:
        """Do something that may fail; warn, and be silent from then on, where it does."""
        try:
            return do()
        except Exception as error:
            self._silent = True
            warn_user(
                f"{self!r} failed to {what}, and is left alone from now on; the training goes on: "
                f"{type(error).__name__}: {error}"
            )
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._opened, copied._silent = False, self.muted
        return copied


class LogTo(Dispatcher):  # type: ignore[misc]  # multipledispatch has no types
    """``log_to(backend, loggable, name, step, group=())``: log something to a backend.

    The function that is called is found by the types of the backend and of the loggable; one for the
    loggable's own type goes before those for its bases. Teach a backend, or a
    loggable of your own, with one function::

        @log_to.register(TensorBoard, PointCloud)
        def _(backend, cloud, name, step, group):
            backend.writer.add_mesh("/".join((*group, name)), cloud.points, global_step=step)

    What a backend cannot hold is left out, with one warning.

    Example:
        >>> from fluxloop.logging import Memory, Text
        >>> memory = Memory()
        >>> log_to(memory, Text("the rate was halved"), "notes", step=10)
        >>> memory.records[0].name, memory.records[0].step
        ('notes', 10)
    """

    def register(self, *types: type) -> Callable[[F], F]:
        """Register a function ``(backend, loggable, name, step, group)`` for a backend type and a loggable type."""
        if len(types) != 2 or not issubclass(types[0], Backend) or not issubclass(types[1], Loggable):
            raise TypeError(
                f"log_to.register({', '.join(map(describe, types))}) was given; expected the class of a backend and "
                "that of a loggable: @log_to.register(TensorBoard, Scalar)"
            )

        def add(function: F) -> F:
            self.add(types, function)
            return function

        return add

    def __call__(self, backend: Any, loggable: Loggable, name: str, step: int, group: str | Sequence[str] = ()) -> None:
        """Log to a backend.

        Args:
            backend: Or several, a tuple or list.
            loggable: What to log.
            name: Its name in the group.
            step: Where it stands on the x axis: a training step or an epoch.
            group: Names from the outermost in, ``("epoch", "validation")``; or one.

        Raises:
            TypeError: It is no backend, or nothing that can be logged.
            LogExistsError: There is a log already, and this run does not continue it.
        """
        if isinstance(backend, (tuple, list)):
            for each in backend:
                self(each, loggable, name, step, group)
            return
        if not isinstance(backend, Backend):
            raise TypeError(f"{describe(backend)} was given as a backend; expected one such as CSV('metrics.csv')")
        if not isinstance(loggable, Loggable):
            raise TypeError(f"{describe(loggable)} was given to log; expected a loggable such as Scalar(0.5)")
        function = self.dispatch(type(backend), type(loggable))
        if function is None:
            backend.refuse(type(loggable), self.held_by(type(backend)))
        else:
            backend.write(function, loggable, name, step, (group,) if isinstance(group, str) else tuple(group))

    def dispatch(self, backend: type, loggable: type) -> Callable[..., Any] | None:
        """Find what is registered for the types, or None: the loggable's own type goes before the backend's."""
        for kind in loggable.__mro__:
            for cls in backend.__mro__:
                if (cls, kind) in self.funcs:
                    function: Callable[..., Any] = self.funcs[cls, kind]
                    return function
        return None

    def held_by(self, backend: type[Backend]) -> list[str]:
        """Name the loggables that a backend can hold."""
        return [kind.__name__ for cls, kind in self.funcs if issubclass(backend, cls)]


log_to = LogTo("log_to")


def key(name: str, group: Sequence[str]) -> str:
    """Return the full name of what is logged, ``"epoch/validation/loss"``."""
    return "/".join((*group, name))
