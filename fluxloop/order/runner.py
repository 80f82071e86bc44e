"""Run callbacks: resolve handlers once per (event type, phase type), deliver events, explain the order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Set
from inspect import signature
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn

from fluxloop.callback import EXPECTED, Callback, Handler, require_call, watchers
from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    StateAccessError,
    annotate,
    warn_user,
)
from fluxloop.events import FIT_EVENTS, Event, FitEnd
from fluxloop.guard.assign import adopt
from fluxloop.loop import Handle, locate
from fluxloop.order.access import covers, dotted, parse, view_of
from fluxloop.order.draws import drawing_apart, noticing, putting_back, with_own_stream
from fluxloop.order.graph import CallbackGraph, Node
from fluxloop.order.outlook import note_directions
from fluxloop.order.owners import owners_of
from fluxloop.order.view import make_view
from fluxloop.persist.owners import Owners
from fluxloop.persist.watched import Watched
from fluxloop.phase import FittingPhase, Phase, check_phase_type
from fluxloop.randomness import Stream

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.order.diagram import Diagram
    from fluxloop.order.explain import Explanation

Bound = tuple[Handler, Any, str]
"""What delivering one event to one callback takes: the call, its view, the callback's id."""


_versions = count()


class Table(dict[type[Event], tuple[Bound, ...]]):
    """The handlers of one phase type by event type, resolved when an event is first fired."""

    def __init__(self, callbacks: Callbacks, phase: type[Phase]) -> None:
        super().__init__()
        self._callbacks = callbacks
        self._phase = phase

    def __missing__(self, event: type[Event]) -> tuple[Bound, ...]:
        bound = self[event] = self._callbacks.resolve(event, self._phase)
        return bound

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        """Copy no handler: they are bound to the callbacks of the original."""
        return Table(copy.deepcopy(self._callbacks, memo), self._phase)


class Callbacks:
    """The callbacks of a learner in their proved order: ``learner.callbacks``.

    Iterating yields the callbacks in the order in which they run.
    """

    def __init__(self, learner: RunLearner) -> None:
        self._learner = learner
        self._graph = CallbackGraph()
        self._views: dict[str, Any] = {}
        self._tables: dict[type[Phase], Table] = {}
        self._kept: dict[str, tuple[Watched, list[Watched]]] = {}
        self._told_drawing: set[str] = set()
        self.version = next(_versions)
        """Another number, of all learners', after each change of the callbacks or their handlers."""

    # Managing

    def set(self, callbacks: Iterable[object]) -> None:
        """Prove an order for `callbacks`, then put them in place of the old ones and `init` the new.

        Raises:
            CallbackError: They have no order; the old ones stay.
            CompileError: Steps are to be compiled whole, and one of them stands in the way; the old ones stay.
        """
        callbacks = list(callbacks)
        # First: options that were assigned to a callback are checked before anything is read from it
        for callback in callbacks:
            if isinstance(callback, Callback):
                adopt(callback.unwrapped)
        graph = CallbackGraph(callbacks)
        known = [id(node.callback.unwrapped) for node in self._graph.nodes]
        before = self._graph, self._views, self._kept
        shared, weights = dict(vars(self._learner.cbstate)), self._learner.weights
        views, followers = dict(weights.views), dict(weights.followers)
        # in place before init is called, which may ask for callbacks; whatever an init can write is undone if one fails
        self._graph = graph
        self._views = {
            node.id: make_view(node.access, self._learner) if node.is_safe else self._learner for node in graph.nodes
        }
        self.forget()
        try:
            note_directions(self)
            for node in graph.nodes:
                check_handlers(node)
                if id(node.callback.unwrapped) not in known:
                    self._init(node)
            if self._learner._compiled is not None:
                self._learner._compiled.require(self._learner.phases_in_use())
            if self._learner.accelerator.optimizer_in_backward:
                self.require_in_backward(self._learner.phases_in_use())
            for node in graph.nodes:
                node.callback.unwrapped._adopted = True
            # what was watched before stays so: a second look would take the present state for the first one
            former = {id(kept.thing): kept for own, around in self._kept.values() for kept in (own, *around)}
            owners = owners_of(self._learner)
            self._kept = {node.id: watch(node, former, owners) for node in graph.nodes}
        except BaseException:
            self._graph, self._views, self._kept = before
            vars(self._learner.cbstate).clear()
            vars(self._learner.cbstate).update(shared)
            weights.views, weights.followers = views, followers
            self.forget()
            raise
        # Those that left take any option again: it is checked when a learner next takes them
        for callback in (node.callback.unwrapped for node in before[0].nodes):
            callback._adopted = any(callback is other for other in self)
        kept = {path for node in graph.nodes for path in node.access.writes}
        for path in {path for node in before[0].nodes for path in node.access.writes if view_of(path)} - kept:
            if dotted(path) in weights:  # nobody keeps that view any more
                del weights[dotted(path)]

    def _init(self, node: Node) -> None:
        init: Callable[..., None] = node.callback.init
        if node.callback.draws:
            stream = Stream(self._learner.seed, f"callback/{node.id}/init")
            init = with_own_stream(init, lambda: stream)
        elif node.callback.draws is None:
            init = putting_back(init)
        try:
            init(self._views[node.id])
        except BaseException as error:
            if isinstance(error, StateAccessError):
                error.event = "init"
            annotate(error, f"fluxloop: raised by {node.id} in init")
            raise

    def forget(self) -> None:
        """Resolve handlers anew when they are next needed: a callback or a handler was added."""
        self.version = next(_versions)
        for table in self._tables.values():
            table.clear()

    def get(self, cls: type[Callback]) -> Callback | None:
        """Return the first callback of a class, unwrapped, or None."""
        return next((callback for callback in self if isinstance(callback, cls)), None)

    def __iter__(self) -> Iterator[Callback]:
        return (node.callback.unwrapped for node in self._graph.nodes)

    def __len__(self) -> int:
        return len(self._graph.nodes)

    def given(self) -> list[Callback]:
        """Return the callbacks as they were given, wrappers included, in the order in which they run."""
        return [node.callback for node in self._graph.nodes]

    def new_objects(self) -> list[Set[str]]:
        """Return the paths of objects that callbacks have made since they were set up, callback by callback."""
        owners = owners_of(self._learner)
        return [own.walk.new_objects(owners) for own, _ in self._kept.values()]

    def note_made(self, before: list[Set[str]]) -> None:
        """Note the objects that callbacks made as something began: they make them again in a run that goes on.

        Args:
            before: What `new_objects` returned before it began.
        """
        for (own, _), former, now in zip(self._kept.values(), before, self.new_objects(), strict=True):
            own.walk.note_made(now - former)

    def kept(self, node: Node) -> tuple[Watched, list[Watched]]:
        """Return what a checkpoint keeps of a callback, and of the conditions around it."""
        return self._kept[node.id]

    # Delivering

    def table(self, phase: type[Phase]) -> Table:
        """Return the handlers for a phase type, by event type."""
        table = self._tables.get(phase)
        if table is None:
            table = self._tables[phase] = Table(self, phase)
        return table

    def handle(self, learner: RunLearner, phase: Phase) -> Handle:
        """Return the function that fires events for `phase`: one look-up, then the calls."""
        table = self.table(type(phase))

        def handle(event: Event) -> None:
            bound = table[type(event)]
            if bound:  # what `deliver` does, with a call less: there are several such events in each step
                rest = iter(bound)
                for call, view, id in rest:
                    try:
                        call(event, phase, view)
                    except BaseException as error:
                        settle(error, id, rest, event, phase, learner)

        return handle

    def resolve(self, event: type[Event], phase: type[Phase]) -> tuple[Bound, ...]:
        """Find who handles an event of a phase, in order."""
        watchers.add(self)  # a handler that is registered later makes `forget` run
        bound: list[Bound] = []
        is_main, before = self._learner.accelerator.is_main, None
        for node in self._graph.nodes:
            if node.callback.unwrapped.main_only and not is_main:
                continue
            call = node.callback.handler(event, phase)
            if call is not None:
                choose = getattr(node.callback, "_choose_after", None)
                if choose is not None:
                    call = choose(call, before)
                bound.append((self._protect(call, node, event), self._views[node.id], node.id))
                before = node.callback
        return tuple(bound)

    def _protect(self, call: Handler, node: Node, event: type[Event]) -> Handler:
        """Keep what a handler draws away from the training's random numbers."""
        draws = node.callback.draws
        if draws:  # from a stream of its own, so that it moves nobody else's numbers
            return with_own_stream(call, lambda: self._learner.streams[f"callback/{node.id}"])
        in_step = event.inside_step or event in FIT_EVENTS
        if not (in_step or event.inside_epoch):
            return call
        if node.callback.unwrapped.draws is None and changes_training(node):
            call = noticing(call, lambda: self._tell_drawing(node, event))
        if draws is None:  # nobody said whether it draws
            call = drawing_apart(call, lambda: self._learner.streams[f"callback/{node.id}/apart"], in_step)
        return call

    def _tell_drawing(self, node: Node, event: type[Event]) -> None:
        """Warn, once, that what a handler writes may rest on random numbers that others draw too."""
        if node.id in self._told_drawing:
            return
        self._told_drawing.add(node.id)
        cls, paths = type(node.callback.unwrapped), ", ".join(map(dotted, node.access.writes))
        is_argument = "draws" in signature(cls).parameters
        line = f"{cls.__name__}(..., draws=True)" if is_argument else f"draws = True in the class {cls.__name__}"
        warn_user(
            f"{node.id} draws random numbers at {event.__name__} and writes {paths}: the step, and others like it, "
            f"draw the same numbers there. For a stream of its own write {line}"
        )

    def obstacles(self, phase: type[Phase]) -> list[str]:
        """List what keeps a phase's steps from being one graph: callbacks, with their paths, or a step of its own."""
        from fluxloop.order.explain import fired_with

        found = []
        if not hasattr(phase.step, "function") or phase.step.function is not Phase.step:
            found.append(
                f"{phase.__name__} has a step of its own; say what it does in entries(batch), "
                "body(learner, handle, state) and finish(learner, state)"
            )
        for node in self._graph.nodes:
            handled = [e for e in fired_with(phase) if e.inside_epoch and node.callback.handler(e, phase) is not None]
            where = node.callback.in_compiled_step
            inside = [event.__name__ for event in handled if event.inside_step]
            paths = [f"reads '{dotted(p)}'" for p in node.access.reads]
            paths += [f"writes '{dotted(p)}'" for p in node.access.writes]
            if where in (None, "watched") and inside:
                touching = f" ({', '.join(paths)})" if paths else ""
                found.append(f"{node.id} handles {', '.join(inside)} of {phase.__name__}, inside the step{touching}")
            elif where == "never" and handled:
                found.append(f"{node.id} looks into the step while it runs ({', '.join(paths)})")
            elif where != "inside" and handled and any(path[:2] == ("step", "grads") for path in node.access.reads):
                found.append(
                    f"{node.id} reads 'step.grads' at {handled[-1].__name__}, which a compiled step does not keep"
                )
        return found

    def require_in_backward(self, phases: Iterable[type[Phase]]) -> None:
        """Raise for callbacks that need gradients which a backward pass has used and dropped.

        Raises:
            CallbackError: Names them, with event and path.
        """
        from fluxloop.order.too_late import require_in_backward  # most learners need none of it

        require_in_backward(self._graph, phases)

    # Explaining

    @property
    def order(self) -> list[str]:
        """Ids of the callbacks in the order in which they run."""
        return [node.id for node in self._graph.nodes]

    def writers(self, path: str) -> list[str]:
        """List the ids of the callbacks that declare to write all of a path: it, or what it is a part of.

        Raises:
            CallbackError: The path has an unknown root.
        """
        wanted = parse(path, "writers")
        return [node.id for node in self._graph.nodes if any(covers(w, wanted) for w in node.access.writes)]

    @property
    def digest(self) -> str:
        """A number for the order and its reasons; the same for any list of the same callbacks."""
        return self._graph.digest

    @property
    def graph(self) -> CallbackGraph:
        """The nodes in order, and the edges with their reasons."""
        return self._graph

    def explain(self, path: str | None = None, *, phases: Iterable[Phase | type[Phase]] | None = None) -> Explanation:
        """Explain who runs when and why, or who touches a path.

        Args:
            path: A dotted path such as ``"model.G"`` or ``"step.loss"``. Left out, the answer is
                for each event of each phase in use: the handlers in order, with the reasons.
            phases: Instead of those in use (those that have run): phases that are to run, or their classes.

        Returns:
            Text; a notebook shows it with the diagram of the graph.

        Raises:
            CallbackError: The path has an unknown root.
            PhaseError: Something in `phases` is no phase.
        """
        from fluxloop.order.explain import explain_order, explain_path, explanation  # a plain fit needs none of it

        chosen = self._learner.phases_in_use()
        if phases is not None:
            chosen = [FittingPhase, *(phase if isinstance(phase, type) else type(phase) for phase in phases)]
        for phase in chosen:
            check_phase_type("explain", phase)
        lines: Iterable[str]
        if path is not None:
            lines = explain_path(self._graph, path, self._learner.updates.explain)
        else:
            lines = explain_order(self._graph, chosen, self._handlers, self.obstacles)
        return explanation(self._graph, lines, path)

    def _handlers(self, phase: type[Phase], event: type[Event]) -> list[str]:
        """Return the ids of those who handle an event of a phase, in order."""
        return [id for _, _, id in self.table(phase)[event]]

    def plot(self) -> Diagram:
        """Draw the callbacks in their order, with an arrow for each pair that is ordered, and why.

        Returns:
            A diagram: ``print`` shows it as text, a notebook as a picture; ``save("graph.svg")`` keeps it, and
            ``mermaid`` is the same in Mermaid's language.

        >>> print(testing.toy_learner(Recorder(), Metrics()).callbacks.plot())
        1. Recorder
        2. Metrics
             after Recorder: Metrics declares run_after = Recorder
             after Recorder: Recorder writes 'cbstate.history', Metrics reads 'cbstate.history'
        """
        from fluxloop.order.diagram import draw_graph  # a plain fit needs none of it

        return draw_graph(self._graph)

    def to_mermaid(self) -> str:
        """Draw the graph in Mermaid's language (GitHub, notebooks and most documentation show it)."""
        from fluxloop.order.explain import draw_mermaid

        return draw_mermaid(self._graph)

    def to_dot(self) -> str:
        """Draw the graph in Graphviz' language."""
        from fluxloop.order.explain import draw_dot

        return draw_dot(self._graph)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self.explain()._repr_mimebundle_()

    def __repr__(self) -> str:
        return f"Callbacks({' → '.join(self.order)})"


def changes_training(node: Node) -> bool:
    """Return whether a callback writes more than what callbacks share."""
    return any(path[:1] != ("cbstate",) for path in node.access.writes)


def check_handlers(node: Node) -> None:
    """Raise for a handler that cannot be called as one.

    Raises:
        HandlerError: Names it, and what it is to take.
    """
    callback = node.callback.unwrapped
    for event, phase in callback.handles():
        call = callback.handler(event, phase)
        name = getattr(call, "__name__", repr(call))
        require_call(call, 3, EXPECTED, f"the handler {type(callback).__name__}.{name}, at {event.__name__},")


def watch(node: Node, former: dict[int, Watched], owners: Owners) -> tuple[Watched, list[Watched]]:
    """Look at a callback that has been set up, and at the conditions around it, so that changes are seen.

    Args:
        node: The callback.
        former: What has been looked at before.
        owners: Tell what somebody else keeps.
    """

    def look(thing: Any, name: str) -> Watched:
        return former.get(id(thing)) or Watched(thing, name, owners)

    conditions = []
    layer = node.callback
    while layer is not layer.unwrapped:
        conditions.append(look(getattr(layer, "condition", None), f"callbacks.{node.id}.condition"))
        layer = getattr(layer, "callback", layer.unwrapped)
    return look(layer, f"callbacks.{node.id}"), conditions


def deliver(bound: tuple[Bound, ...], event: Event, phase: Phase, learner: RunLearner) -> None:
    """Call handlers in order.

    At an event that ends something, a cancel waits until all have run; at `FitEnd`, so does an
    error. Elsewhere both leave at once. An error gets a note that says where it was raised.
    """
    rest = iter(bound)
    for call, view, id in rest:
        try:
            call(event, phase, view)
        except BaseException as error:
            settle(error, id, rest, event, phase, learner)


def settle(
    error: BaseException, id: str, rest: Iterator[Bound], event: Event, phase: Phase, learner: RunLearner
) -> NoReturn:
    """Raise what a handler has raised, after the rest have run where it is to wait for them; see `deliver`.

    Args:
        error: What was raised.
        id: By which callback.
        rest: The handlers that have not run.
        event: The event.
        phase: The running phase.
        learner: The learner.
    """
    held = _held(None, error, id, event, phase, learner)
    for call, view, other in rest:
        try:
            call(event, phase, view)
        except BaseException as failure:
            held = _held(held, failure, other, event, phase, learner)
    raise held


def _held(
    held: BaseException | None, error: BaseException, id: str, event: Event, phase: Phase, learner: RunLearner
) -> BaseException:
    """Return what waits for the rest of the handlers; raise what does not wait."""
    if isinstance(error, CancelSignal):
        if not event.ends_scope:
            raise error
        return _wider(held, error)
    _locate_handler(error, id, event, phase, learner)
    if not isinstance(event, FitEnd):
        raise error
    if held is None or isinstance(held, CancelSignal):
        return error
    annotate(held, f"fluxloop: {id} failed at FitEnd as well: {error!r}")
    return held


def _wider(held: BaseException | None, signal: CancelSignal) -> BaseException:
    """Return, of two cancels raised at one event, the one that ends more; an error stays."""
    if held is not None and not isinstance(held, CancelSignal):
        return held
    for widest in (CancelFittingException, CancelEpochException):
        for cancel in (held, signal):
            if isinstance(cancel, widest):
                return cancel
    return held or signal


def _locate_handler(error: BaseException, id: str, event: Event, phase: Phase, learner: RunLearner) -> None:
    name = type(event).__name__
    if isinstance(error, StateAccessError) and error.event is None and error.callback == id:
        error.event = name
    # An evaluation in a handler has handlers of its own: the note of the innermost one is there already
    if any(note.startswith("fluxloop: raised by") for note in getattr(error, "__notes__", ())):
        return
    annotate(error, f"fluxloop: raised by {id} at {name} of {phase!r}")
    locate(error, learner, phase)
