"""Diagrams of what happens in which order: as text, in Mermaid's language, and as a picture without any library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from os import PathLike
from pathlib import Path

from attrs import field, frozen

from fluxloop.order.explain import draw_mermaid
from fluxloop.order.graph import CallbackGraph, Edge
from fluxloop.screen.pages import drawn

ROW, LANE, MARGIN = 20, 12, 16
"""Pixels: of a line of text, between two lines that run down, and around everything."""

COLORS = ("#3f51b5", "#00796b", "#c2185b", "#e65100", "#5d4037", "#7b1fa2", "#0277bd", "#558b2f")
INK, FAINT = "#212121", "#757575"
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@frozen(repr=False)
class Diagram:
    """A diagram that prints as text; a notebook shows it as a picture.

    Args:
        text: What ``print`` shows.
        mermaid: The same in Mermaid's language, which GitHub, JupyterLab and most documentation draw.
        svg: The same as a picture, for browsers and papers.

    >>> diagram = testing.toy_learner(Recorder(), Metrics()).callbacks.plot()
    >>> print(diagram.mermaid.splitlines()[0])
    flowchart TD
    >>> diagram.save("order.svg")
    """

    text: str
    mermaid: str
    svg: str = field(repr=False)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the diagram to a file, of the kind that its name ends with.

        Args:
            path: ``graph.svg`` is the picture, ``graph.mmd`` Mermaid's language, ``graph.txt`` the text.

        Raises:
            ValueError: It ends with something else; nothing is written.
        """
        kinds = {".svg": self.svg, ".mmd": self.mermaid, ".txt": self.text}
        kind = Path(path).suffix
        if kind not in kinds:
            raise ValueError(f"save({str(path)!r}) was called; expected a name that ends with {', '.join(kinds)}")
        Path(path).write_text(f"{kinds[kind]}\n", encoding="utf-8")

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return drawn(self.svg)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {
            "text/plain": self.text,
            "text/html": self._repr_html_(),
            "image/svg+xml": self.svg,
            "text/vnd.mermaid": self.mermaid,
            "text/markdown": f"```mermaid\n{self.mermaid}\n```",
        }


def draw_graph(graph: CallbackGraph) -> Diagram:
    """Draw the callbacks in their order, with an arrow and its reasons for each pair that is ordered."""
    return Diagram("\n".join(_graph_as_text(graph)), draw_mermaid(graph), _graph_as_svg(graph))


def _into(graph: CallbackGraph) -> dict[str, list[Edge]]:
    """Return the edges that lead to each callback."""
    return {node.id: [edge for edge in graph.edges if edge.after == node.id] for node in graph.nodes}


def _graph_as_text(graph: CallbackGraph) -> Iterator[str]:
    """Write a line for each callback in order, and below it what it waits for."""
    if not graph.nodes:
        yield "there are no callbacks"
    for number, (id, edges) in enumerate(_into(graph).items(), 1):
        yield f"{number}. {id}"
        yield from (f"     after {edge.before}: {edge.reason}" for edge in edges)


# Pictures


def width_of(texts: Iterable[str]) -> float:
    """Return how wide the widest text is, in pixels."""
    return max((7.3 * len(text) for text in texts), default=0.0)


def written(x: float, y: float, text: str, color: str = INK, extra: str = "") -> str:
    """Return a text of a picture; `y` is its middle."""
    return f'<text x="{x:g}" y="{y + 4:g}" fill="{color}"{extra}>{escape(text)}</text>'


def boxed(x: float, y: float, width: float, text: str, color: str) -> str:
    """Return a text in a box with round corners; `y` is its middle."""
    box = f'<rect x="{x:g}" y="{y - 11:g}" width="{width:g}" height="22" rx="5" fill="{color}" fill-opacity="0.08"'
    return f'{box} stroke="{color}"/>' + written(x + 10, y, text, color)


def picture(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """Return a picture on white, which is legible on a dark page too."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    frame = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="12" role="img">'
        f"<title>{escape(title)}</title>\n{frame}\n{body}\n</svg>"
    )


def _graph_as_svg(graph: CallbackGraph) -> str:
    """Draw the callbacks below each other, arrows beside them, and to the right of each what it waits for."""
    into = _into(graph)
    ids = list(into)
    color = {id: COLORS[index % len(COLORS)] for index, id in enumerate(ids)}
    heights = [max(1, len(edges)) * ROW + 14 for edges in into.values()]
    tops = [MARGIN + sum(heights[:index]) for index in range(len(ids))]
    middle = {id: top + height / 2 for id, top, height in zip(ids, tops, heights, strict=True)}
    right = MARGIN + width_of(ids) + 20
    lanes = _lanes(ids, graph)
    first = right + (max(lanes.values(), default=0) + 2) * LANE + 8
    parts = [boxed(MARGIN, middle[id], right - MARGIN, id, color[id]) for id in ids]
    for (before, after), lane in sorted(lanes.items(), key=lambda item: -item[1]):
        parts.append(_arrow(right, right + lane * LANE + 8, middle[before] + 5, middle[after] - 5, color[before]))
    reasons = [f"after {edge.before}: {edge.reason}" for edge in graph.edges]
    for top, edges in zip(tops, into.values(), strict=True):
        for index, edge in enumerate(edges):
            y = top + 7 + ROW * (index + 0.5)
            parts.append(f'<circle cx="{first + 3:g}" cy="{y:g}" r="3" fill="{color[edge.before]}"/>')
            parts.append(written(first + 12, y, f"after {edge.before}: {edge.reason}"))
    if not ids:
        parts.append(written(MARGIN, MARGIN + ROW / 2, "there are no callbacks"))
    width = first + 12 + width_of(reasons) + MARGIN if ids else 220
    return picture(width, max(sum(heights), ROW) + 2 * MARGIN, parts, "the order of callbacks, and why")


def _lanes(ids: list[str], graph: CallbackGraph) -> dict[tuple[str, str], int]:
    """Give each ordered pair a line that runs down beside the boxes, from 1; lines that overlap lie apart."""
    position = {id: index for index, id in enumerate(ids)}
    pairs = list(dict.fromkeys((edge.before, edge.after) for edge in graph.edges))
    taken: list[list[tuple[int, int]]] = []
    lanes = {}
    for before, after in sorted(pairs, key=lambda pair: (position[pair[1]] - position[pair[0]], position[pair[0]])):
        begin, end = position[before], position[after]
        free = (n for n, others in enumerate(taken) if all(end <= o[0] or o[1] <= begin for o in others))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((begin, end))
        lanes[before, after] = lane + 1
    return lanes


def _arrow(x: float, lane: float, begin: float, end: float, color: str) -> str:
    """Return an arrow that leaves a box to the right, runs down a lane and comes back to another box."""
    bend = 6
    path = (
        f"M{x:g},{begin:g} H{lane - bend:g} Q{lane:g},{begin:g} {lane:g},{begin + bend:g} "
        f"V{end - bend:g} Q{lane:g},{end:g} {lane - bend:g},{end:g} H{x + 2:g}"
    )
    head = f'<path d="M{x + 1:g},{end:g} l7,-3.5 v7 z" fill="{color}"/>'
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.3"/>{head}'
