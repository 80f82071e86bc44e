"""The callback graph: conflicts, cycles and the order of a set of callbacks, each edge with a reason.

The order depends on what the callbacks declare and on nothing else: any list of the same
callbacks gives the same graph, the same order and the same digest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import combinations

from attrs import frozen

from fluxloop.callback import (
    Callback,
    NoConflict,
    RunFirst,
    Unresolvable,
    UnsafeCallback,
    resolution,
)
from fluxloop.errors import (
    CallbackConflictError,
    CallbackCycleError,
    CallbackTypeError,
    DuplicateCallbackError,
    MissingProducerError,
    describe,
)
from fluxloop.lazy import all_subclasses
from fluxloop.order.access import Access, Path, dotted, keeper, overlap, view_of


@frozen(eq=False)
class Node:
    """One callback in the graph.

    Args:
        callback: The callback, wrapped or not.
        id: What it is called in messages and checkpoints: its name, or its class's.
        key: What nodes are sorted by; it decides only where no edge does.
        access: What it declares.
    """

    callback: Callback
    id: str
    key: tuple[bool, str, str, str]
    access: Access

    @property
    def is_safe(self) -> bool:
        """Whether its handlers get a view (a callback) or the learner itself (an unsafe one)."""
        return not isinstance(self.callback.unwrapped, UnsafeCallback)


@frozen
class Edge:
    """`before` runs before `after`, for a reason.

    Args:
        before: Id of the one that goes first.
        after: Id of the one that follows.
        reason: Why, in words.
    """

    before: str
    after: str
    reason: str

    def __str__(self) -> str:
        return f"{self.before} before {self.after}: {self.reason}"


def make_nodes(callbacks: Iterable[object]) -> list[Node]:
    """Check callbacks one by one and together, and give each an id and a canonical key.

    Raises:
        CallbackTypeError: A class instead of an instance, or something that is no callback.
        DuplicateCallbackError: One instance twice, or two that nothing tells apart.
        CallbackError: A path with an unknown root.
        AmbiguousHandlerError: Two handlers of one callback fit equally well.
    """
    labels = _labelled(_checked(callbacks))
    ids: set[str] = set()
    nodes: list[Node] = []
    # Sorted before they are numbered: an id must not depend on the order of the list
    for (cls, name, identity), callback in sorted(labels.items(), key=lambda item: item[0]):
        stem = id = name or cls
        number = 1
        while id in ids:
            number += 1
            id = f"{stem}-{number}"
        ids.add(id)
        access = Access.declared(id, callback.reads, callback.writes)
        key = (access.reads_everything, cls, name, identity)  # True sorts last: who reads everything follows the others
        callback.handles()  # raises for ambiguous handlers now, and not at the first event that they fit
        nodes.append(Node(callback, id, key, access))
    return sorted(nodes, key=lambda node: node.key)


def _checked(callbacks: Iterable[object]) -> list[Callback]:
    """List callbacks, each checked by itself.

    Raises:
        CallbackTypeError: A class instead of an instance, something that is no callback, or a wrong ``run_after``.
        DuplicateCallbackError: One instance twice.
    """
    checked: list[Callback] = []
    for position, callback in enumerate(callbacks):
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise CallbackTypeError(
                f"callbacks[{position}] is the class {callback.__name__}; expected an instance: "
                f"{callback.__name__}(...)"
            )
        if not isinstance(callback, Callback):
            raise CallbackTypeError(
                f"callbacks[{position}] is {describe(callback)}; expected a Callback; a function becomes "
                "one with CustomCallback(function, StepEnd)"
            )
        for earlier, known in enumerate(checked):
            if known.unwrapped is callback.unwrapped:
                raise DuplicateCallbackError(
                    f"the same {type(callback.unwrapped).__name__} was given twice, as callbacks[{earlier}] "
                    f"and callbacks[{position}]; give it once, or make a second instance"
                )
        for cls in callback.run_after if isinstance(callback.run_after, (tuple, list)) else (None,):
            if not (isinstance(cls, type) and issubclass(cls, Callback)):
                raise CallbackTypeError(
                    f"{type(callback.unwrapped).__name__} declares run_after = {callback.run_after!r}; expected a "
                    "tuple of callback types: run_after = (Recorder,)"
                )
        checked.append(callback)
    return checked


def _labelled(callbacks: list[Callback]) -> dict[tuple[str, str, str], Callback]:
    """Return callbacks by class, name and, where two have the same of both, identity.

    Raises:
        DuplicateCallbackError: Nothing tells two of them apart.
    """
    labels: dict[tuple[str, str, str], Callback] = {}
    for callback in callbacks:
        inner = callback.unwrapped
        named = _name_of(callback)
        label = (*named, "")
        if any(c is not callback and _name_of(c) == named for c in callbacks):
            # noted when first asked for: the identity is made of the state, which changes, and ids must not
            label = (*named, vars(inner).setdefault("__identity__", callback.identity))
        if label in labels:
            raise DuplicateCallbackError(
                f"two {label[0]} callbacks cannot be told apart: {inner!r}; give each a name of its own: "
                f"{label[0]}(..., name='first')"
            )
        labels[label] = callback
    return labels


def _name_of(callback: Callback) -> tuple[str, str]:
    """Return the class and the name of a callback, of the wrapped one where it wraps."""
    inner = callback.unwrapped
    return type(inner).__name__, getattr(inner, "name", None) or ""


class CallbackGraph:
    """Callbacks in their proved order.

    Args:
        callbacks: In any order.

    Attributes:
        nodes: In the order in which they run.
        edges: Sorted; each with its reason.

    Raises:
        CallbackError: One of its kinds, see `fluxloop.errors`.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        nodes = make_nodes(callbacks)
        check_producers(nodes)
        edges = [*_declared_edges(nodes)]
        undecided = list(_access_edges(nodes, edges))  # a generator, which adds to the edges while it is gone through
        edges = _without_needless(edges, {node.id: node for node in nodes})
        self.edges = sorted(set(edges), key=lambda edge: (edge.before, edge.after, edge.reason))
        self.nodes = _sort(nodes, self.edges)
        # Only now: a chain of edges through other callbacks may order two writers that no edge of their own does
        for first, second, path, other in undecided:
            if not (self.reaches(first.id, second.id) or self.reaches(second.id, first.id)):
                raise _conflict(first, second, path, other)

    def reaches(self, before: str, after: str) -> bool:
        """Return whether a chain of edges says that `before` runs before `after`."""
        return _leads(self.edges, before, after)

    @property
    def digest(self) -> str:
        """A number for the order and its reasons: the same for any list of the same callbacks."""
        text = "\n".join([*(node.id for node in self.nodes), *map(str, self.edges)])
        return blake2b(text.encode(), digest_size=8).hexdigest()


def _declared_edges(nodes: list[Node]) -> Iterator[Edge]:
    """Yield the edges that ``run_after`` asks for."""
    for node in nodes:
        for cls in node.callback.run_after:
            for other in nodes:
                if isinstance(other.callback.unwrapped, cls):
                    yield Edge(other.id, node.id, f"{node.id} declares run_after = {cls.__name__}")


def _without_needless(edges: list[Edge], nodes: dict[str, Node]) -> list[Edge]:
    """Leave out edges that put a quick hook behind a writer only because it did not say what it reads.

    Such a hook is taken to read everything, so it runs last; one that writes something runs as late as those allow
    that read what it writes. Whoever declares that it reads everything means it.
    """

    def is_weak(edge: Edge) -> bool:
        reader = nodes[edge.after]
        left_out = getattr(reader.callback.unwrapped, "reads_left_out", False)
        # By its reason: an edge that run_after or resolve_conflict asks for stays
        return left_out and bool(reader.access.writes) and edge.reason.startswith(f"{edge.before} writes")

    kept = [edge for edge in edges if not is_weak(edge)]
    # One at a time, as each that is kept may make a cycle of the next; sorted, so that the list's order decides nothing
    for edge in sorted(filter(is_weak, edges), key=lambda edge: (edge.before, edge.after, edge.reason)):
        if not _leads(kept, edge.after, edge.before):
            kept.append(edge)
    return kept


def _leads(edges: Iterable[Edge], before: str, after: str) -> bool:
    """Return whether a chain of edges leads from one callback to another."""
    todo, seen = [before], set()
    while todo:
        current = todo.pop()
        if current == after:
            return True
        if current not in seen:
            seen.add(current)
            todo.extend(edge.after for edge in edges if edge.before == current)
    return False


def _access_edges(nodes: list[Node], edges: list[Edge]) -> Iterator[tuple[Node, Node, Path, Path]]:
    """Add the edges that follow from reads and writes; yield the pairs of writers that they leave undecided."""
    for a, b in combinations(nodes, 2):
        shared = [(p, q) for p in a.access.writes for q in b.access.writes if overlap(p, q)]
        reading = [
            (writer, reader, p, q)
            for writer, reader in ((a, b), (b, a))
            for p in writer.access.writes
            for q in reader.access.reads
            # who writes the same is no reader but a second writer: two such would be a cycle
            if overlap(p, q) and not any(overlap(p, w) for w in reader.access.writes)
        ]
        if not shared and not reading:
            continue
        answer = resolution(a.callback, b.callback)
        if isinstance(answer, Unresolvable):
            p, q = shared[0] if shared else reading[0][2:]
            raise CallbackConflictError(
                f"{a.id} and {b.id} cannot be used together: resolve_conflict says Unresolvable() "
                f"(paths '{dotted(p)}' and '{dotted(q)}'); remove one of them"
            )
        if isinstance(answer, RunFirst):
            first, second = (a, b) if answer.callback is a.callback.unwrapped else (b, a)
            edges.append(Edge(first.id, second.id, f"resolve_conflict says RunFirst({first.id})"))
            continue
        if isinstance(answer, NoConflict):
            continue
        if shared:
            yield a, b, *shared[0]
        for writer, reader, p, q in reading:
            edges.append(
                Edge(
                    writer.id,
                    reader.id,
                    f"{writer.id} writes '{dotted(p)}', {reader.id} reads '{dotted(q)}'",
                )
            )


def _is_built_in(node: Node) -> bool:
    return type(node.callback.unwrapped).__module__.startswith("fluxloop.")


def _conflict(a: Node, b: Node, p: Path, q: Path) -> CallbackConflictError:
    first, second = type(a.callback.unwrapped).__name__, type(b.callback.unwrapped).__name__
    problem = f"{a.id} writes '{dotted(p)}' and {b.id} writes '{dotted(q)}', and nothing says which goes first.\n"
    if first == second:
        return CallbackConflictError(
            f"{problem}  Say for the class whether that matters:\n"
            f"    @resolve_conflict.register({first}, {first})\n"
            "    def _(a, b):\n"
            "        return NoConflict()   # or RunFirst(min(a, b, key=lambda callback: callback.name))"
        )
    # run_after is advised to the class that the user can change
    theirs, other = (first, second) if _is_built_in(b) and not _is_built_in(a) else (second, first)
    in_class = f"  Say so in your class:   run_after = ({other},)   # in {theirs}\n  or for the pair:\n"
    return CallbackConflictError(
        problem
        + ("  Say so for the pair:\n" if _is_built_in(a) and _is_built_in(b) else in_class)
        + f"    @resolve_conflict.register({first}, {second})\n"
        "    def _(a, b):\n"
        "        return RunFirst(a)   # or NoConflict(), or Unresolvable()"
    )


def _sort(nodes: list[Node], edges: list[Edge]) -> list[Node]:
    """Sort so that every edge points forward, taking the smallest canonical key where there is a choice."""
    by_id = {node.id: node for node in nodes}
    waiting = {node.id: {edge.before for edge in edges if edge.after == node.id} for node in nodes}
    ready = [(node.key, node.id) for node in nodes if not waiting[node.id]]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(by_id[done])
        for edge in edges:
            # Two callbacks may have several edges: only the first counts, or the second would push `after` once more
            if edge.before == done and edge.before in waiting[edge.after]:
                waiting[edge.after].discard(done)
                if not waiting[edge.after]:
                    heapq.heappush(ready, (by_id[edge.after].key, edge.after))
    if len(order) < len(nodes):
        raise _cycle({id for id, before in waiting.items() if before}, edges)
    return order


def _cycle(stuck: set[str], edges: list[Edge]) -> CallbackCycleError:
    """Return the error that tells the shortest cycle among callbacks that cannot be ordered, edge by edge."""
    inside = [edge for edge in edges if edge.before in stuck and edge.after in stuck]
    best: list[Edge] | None = None
    # Breadth first, so that the first way back is the shortest. Who only follows a cycle is stuck too, with no way back
    for start in sorted(stuck):
        paths: list[list[Edge]] = [[edge] for edge in inside if edge.before == start]
        seen = {start}
        while paths:
            path = paths.pop(0)
            last = path[-1].after
            if last == start:
                if best is None or len(path) < len(best):
                    best = path
                break
            if last not in seen:
                seen.add(last)
                paths.extend([*path, edge] for edge in inside if edge.before == last)
    lines = "\n".join(f"  {edge}" for edge in best or ())
    return CallbackCycleError(
        f"the callbacks cannot be ordered, because these contradict each other:\n{lines}\n"
        "Drop one run_after, or say with resolve_conflict which of two goes first."
    )


def check_producers(nodes: list[Node]) -> None:
    """Raise for a ``cbstate`` entry, or a view of weights, that is read although no callback writes it.

    Raises:
        MissingProducerError: Names the callback classes known to write that entry.
    """
    written = [path for node in nodes for path in node.access.writes]
    for node in nodes:
        for path in node.access.reads:
            if view_of(path) and not any(overlap(path, w) for w in written):
                raise MissingProducerError(
                    f"{node.id} reads '{dotted(path)}', which no callback writes; add what keeps that view, such as "
                    f"{keeper('.'.join(path[1:]) or 'model', view_of(path))}"
                )
            if path[:1] == ("cbstate",) and len(path) > 1 and not any(overlap(path, w) for w in written):
                known = set(_providers(path))
                built_in = sorted(name for name, is_built_in in known if is_built_in) or sorted(
                    name for name, _ in known
                )
                providers = " or ".join(built_in) or "a callback that writes it"
                raise MissingProducerError(
                    f"{node.id} reads '{dotted(path)}', which no callback writes; add {providers} to the callbacks"
                )


def _providers(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names of the callback classes that declare to write `path`, and whether they are fluxloop's."""
    for cls in all_subclasses(Callback, "fluxloop.callbacks"):
        writes = vars(cls).get("writes")
        # Who may write anything is no advice: "*" and all of cbstate name no entry
        if isinstance(writes, tuple) and any(
            overlap(tuple(w.split(".")), path) for w in writes if w != "*" and w != "cbstate"
        ):
            yield f"{cls.__name__}()", cls.__module__.startswith("fluxloop.")


def touches(node: Node, path: Path) -> list[tuple[str, Path]]:
    """Return how a callback touches `path`: (``"reads"`` or ``"writes"``, its declared path)."""
    return [
        (mode, declared)
        for mode, paths in (("reads", node.access.reads), ("writes", node.access.writes))
        for declared in paths
        if overlap(declared, path)
    ]
