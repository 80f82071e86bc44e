"""Explain the order of callbacks: as text, and as a diagram."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from fluxloop.events import FIT_EVENTS, GRADIENT_EVENTS, Event, event_types
from fluxloop.order.access import dotted, parse
from fluxloop.order.graph import CallbackGraph, touches
from fluxloop.phase import FittingPhase, Phase

if TYPE_CHECKING:
    from fluxloop.screen.pages import Markup


@frozen(repr=False)
class Explanation:
    """What `Callbacks.explain` found: prints as text, shows with a diagram in a notebook.

    Args:
        text: What it says.
        mermaid: The diagram in Mermaid's language.
        order: Ids of the callbacks in their order.
        arrows: Who goes before whom, and why.
        marks: What the diagram says behind an id.
    """

    text: str
    mermaid: str
    order: tuple[str, ...] = ()
    arrows: tuple[tuple[str, str, str], ...] = ()
    marks: Mapping[str, str] = {}

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def __contains__(self, words: str) -> bool:
        return words in self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        markdown = f"```text\n{self.text}\n```\n\n```mermaid\n{self.mermaid}\n```"
        return {"text/plain": self.text, "text/markdown": markdown, "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        """Return a page for notebooks: a diagram of the order, and below it the text."""
        from fluxloop.screen.pages import arcs, page, preformatted

        diagram = [arcs(self.order, self.arrows, self.marks)] if self.order else []
        return page(*diagram, preformatted(self.text))


def explanation(graph: CallbackGraph, lines: Iterable[str], path: str | None) -> Explanation:
    """Return lines about a graph with its diagram, in which those who touch a path are marked."""
    touching: dict[str, list[str]] = {}
    for node in graph.nodes if path is not None else ():
        for mode, _ in touches(node, parse(path or "", "explain")):
            touching.setdefault(node.id, []).append(mode)
    marks = {id: " and ".join(dict.fromkeys(modes)) for id, modes in touching.items()}
    order = tuple(node.id for node in graph.nodes)
    return Explanation("\n".join(lines), draw_mermaid(graph), order, tuple(_arrows(graph)), marks)


def fired_with(phase: type[Phase]) -> list[type[Event]]:
    """List the events that may be fired with a phase type, in firing order."""
    if issubclass(phase, FittingPhase):
        return list(FIT_EVENTS)
    never = FIT_EVENTS if phase.gradients else (*FIT_EVENTS, *GRADIENT_EVENTS)
    return [event for event in event_types() if event not in never]


def explain_order(
    graph: CallbackGraph,
    phases: Iterable[type[Phase]],
    handlers: Callable[[type[Phase], type[Event]], list[str]],
    obstacles: Callable[[type[Phase]], list[str]],
) -> Iterator[str]:
    """Write who handles each event of each phase, in order, and why in that order.

    Args:
        graph: The callbacks, in their order.
        phases: The phase types to explain.
        handlers: Returns the ids of those who handle an event of a phase, in order.
        obstacles: Returns what keeps the steps of a phase from being one graph.
    """
    named: set[str] = set()
    for phase in phases:
        yield phase.__name__
        for event in fired_with(phase):
            ids = handlers(phase, event)
            if ids:
                named.update(ids)
                yield f"  {event.__name__}: {' → '.join(ids)}"
        if phase.data_key:
            found = obstacles(phase)
            fusable = "fusable as far as callbacks go; the body is tried when it is compiled"
            yield f"  steps are {'not fusable:' if found else fusable}"
            yield from (f"    {obstacle}" for obstacle in found)
    edges = [edge for edge in graph.edges if edge.before in named and edge.after in named]
    if edges:
        yield "because"
        yield from (f"  {edge}" for edge in edges)
    if named:
        yield "Callbacks that nothing orders run in the order of their names, not of the list."


def explain_path(graph: CallbackGraph, path: str, optimizers: Callable[[tuple[str, ...]], Iterable[str]]) -> list[str]:
    """Write who touches a path, how and when.

    Args:
        graph: The callbacks.
        path: A dotted path, such as ``"model.G"``.
        optimizers: Returns what the optimizers do to a parsed path.

    Raises:
        CallbackError: The path has an unknown root.
    """
    wanted = parse(path, "explain")
    found = list(optimizers(wanted))
    for node in graph.nodes:
        when = ", ".join(sorted({f"{e.__name__} ({p.__name__})" for e, p in node.callback.handles()})) or "init"
        found += [f"{node.id} {mode} '{dotted(declared)}' at {when}" for mode, declared in touches(node, wanted)]
        if not node.is_safe:
            found.append(f"{node.id} may touch anything (unsafe) at {when}")
    return [f"'{path}' is touched by:", *(f"  {line}" for line in found or ["nobody"])]


def draw_mermaid(graph: CallbackGraph) -> str:
    """Draw a graph in Mermaid's language."""
    lines = ["flowchart TD"]
    # Numbers stand for the ids, which may be words of the language: a node that is called "end" breaks a flowchart
    number = {node.id: f"n{index}" for index, node in enumerate(graph.nodes)}
    lines += [f'    {number[node.id]}["{in_mermaid(node.id)}"]' for node in graph.nodes]
    for before, after, reasons in _arrows(graph):
        text = "<br/>".join(map(in_mermaid, reasons.splitlines()))
        lines.append(f'    {number[before]} -->|"{text}"| {number[after]}')
    return "\n".join(lines)


def draw_arcs(graph: CallbackGraph) -> Markup:
    """Draw a graph for a notebook."""
    from fluxloop.screen.pages import arcs

    return arcs([node.id for node in graph.nodes], _arrows(graph))


def draw_dot(graph: CallbackGraph) -> str:
    """Draw a graph in Graphviz' language."""
    lines = ["digraph callbacks {"]
    lines += [f'    "{_in_dot(node.id)}";' for node in graph.nodes]
    for before, after, reasons in _arrows(graph):
        text = "\\n".join(map(_in_dot, reasons.splitlines()))
        lines.append(f'    "{_in_dot(before)}" -> "{_in_dot(after)}" [label="{text}"];')
    return "\n".join([*lines, "}"])


def _arrows(graph: CallbackGraph) -> list[tuple[str, str, str]]:
    """Return one arrow per pair of callbacks, with all its reasons, a line each."""
    pairs = dict.fromkeys((edge.before, edge.after) for edge in graph.edges)
    return [(b, a, "\n".join(e.reason for e in graph.edges if (e.before, e.after) == (b, a))) for b, a in pairs]


def in_mermaid(text: str) -> str:
    """Return a text as Mermaid's language shows it: for a sign that means something there, the sign's number.

    >>> in_mermaid('a "good" <name>')
    'a #34;good#34; #60;name#62;'
    """
    return "".join(f"#{ord(sign)};" if sign in _SIGNS else sign for sign in " ".join(text.splitlines()))


_SIGNS = frozenset('"#&;<>`%$\\')


def _in_dot(text: str) -> str:
    """Return a text as Graphviz' language quotes it."""
    return " ".join(text.splitlines()).replace("\\", "\\\\").replace('"', '\\"')
