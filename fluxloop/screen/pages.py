"""Pages for notebooks: tables, small curves and a diagram of who runs after whom, as HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite

CELL = "text-align: {}; padding: 0.15em 0.7em"
WIDTH, HEIGHT = 96, 20
"""Of a curve, in pixels."""
STEP, LETTER = 26, 8
"""Of a diagram, in pixels: from one line to the next, and the width of a letter."""


class Markup(str):
    """A text that is HTML already, and is put into a page as it is."""

    __slots__ = ()


def element(what: object) -> str:
    """Return something as HTML: `Markup` as it is, other texts with their signs as they are read.

    >>> element("a < b"), element(Markup("<b>c</b>"))
    ('a &lt; b', '<b>c</b>')
    """
    return what if isinstance(what, Markup) else escape(str(what))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Markup:
    """Return a table.

    Args:
        head: What stands above the columns.
        rows: What stands in them.
        numbers: The columns that are aligned to the right.

    >>> table(["name", "count"], [["a", 1]], numbers=[1]).count("<td")
    2
    """
    right = set(numbers)
    styles = [f'style="{CELL.format("right" if n in right else "left")}"' for n in range(len(head))]

    def line(kind: str, cells: Sequence[object]) -> str:
        told = (f"<{kind} {style}>{element(c)}</{kind}>" for style, c in zip(styles, cells, strict=True))
        return f"<tr>{''.join(told)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return Markup(f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>")


def page(*parts: object) -> str:
    """Return parts below each other; texts as paragraphs.

    >>> page("a < b", preformatted("c"))
    '<p>a &lt; b</p><pre style="overflow-x: auto; line-height: 1.3">c</pre>'
    """
    return "".join(part if isinstance(part, Markup) else f"<p>{element(part)}</p>" for part in parts)


def titled(title: str, inside: str) -> Markup:
    """Return a part, HTML already, that can be folded up, with a title."""
    return Markup(f"<details open><summary><b>{escape(title)}</b></summary>{inside}</details>")


def preformatted(text: str) -> Markup:
    """Return a text in letters of one width, as it is."""
    return Markup(f'<pre style="overflow-x: auto; line-height: 1.3">{escape(text)}</pre>')


def drawn(svg: str) -> Markup:
    """Return a picture, for a page whose HTML may be cleaned.

    JupyterLab takes the tags of pictures out of a notebook that was not run there, and leaves the words: with each on a
    line of its own they can be read.
    """
    return Markup(f'<pre style="overflow-x: auto; line-height: 1.3">{svg}</pre>')


def curve(points: Sequence[tuple[float, float]]) -> Markup:
    """Return a small curve through points, those that are not finite left out; of fewer than two, nothing.

    >>> curve([(1, 0.5), (2, 0.25)]).count("<polyline")
    1
    """
    finite = [(x, y) for x, y in points if isfinite(x) and isfinite(y)]
    if len(finite) < 2:
        return Markup("")
    (left, right), (low, high) = ((min(each), max(each)) for each in zip(*finite, strict=True))
    across, up = (WIDTH - 4) / ((right - left) or 1), (HEIGHT - 4) / ((high - low) or 1)
    told = " ".join(f"{2 + (x - left) * across:.1f},{HEIGHT - 2 - (y - low) * up:.1f}" for x, y in finite)
    return Markup(
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="its course">'
        f'<polyline points="{told}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def arcs(
    names: Sequence[str], arrows: Iterable[tuple[str, str, str]], marks: Mapping[str, str] | None = None
) -> Markup:
    """Return a diagram of an order: names from top to bottom, and an arc from each to those that wait for it.

    Args:
        names: In their order.
        arrows: Who goes before whom, and why: shown where the pointer rests on the arc.
        marks: What stands behind a name.

    >>> diagram = arcs(["Recorder", "Metrics"], [("Recorder", "Metrics", "Metrics reads what Recorder writes")])
    >>> diagram.count("<path d="), "Metrics reads" in diagram
    (1, True)
    """
    marks = marks or {}
    height = {name: 18 + STEP * number for number, name in enumerate(names)}

    def bulge(before: str, after: str) -> float:
        return min(0.45 * abs(height[after] - height[before]), 180)

    known = [(before, after, why) for before, after, why in arrows if before in height and after in height]
    left = 16 + max((bulge(before, after) for before, after, _ in known), default=0)
    lines = []
    for name, y in height.items():
        mark = f' <tspan fill-opacity="0.6">{escape(marks[name])}</tspan>' if name in marks else ""
        lines.append(
            f'<text x="{left + 8:g}" y="{y + 4}" fill="currentColor" font-size="13">{escape(name)}{mark}</text>'
        )
    lines += [
        f'<path d="M {left:g} {height[before]} C {(x := left - 8 - bulge(before, after)):.0f} {height[before]}, '
        f'{x:.0f} {height[after]}, {left - 7:g} {height[after]}" fill="none" stroke="currentColor" '
        f'stroke-opacity="0.45" stroke-width="1.5"><title>{escape(f"{before} → {after}: {why}")}</title></path>'
        for before, after, why in known
    ]
    # Heads of arrows are drawn, not referred to: two diagrams of a notebook may not have a marker of one name
    lines.append(
        "".join(
            f'<path fill="currentColor" fill-opacity="0.6" d="M {left:g} {y} l -7 -3.5 v 7 z"/>'
            for y in sorted({height[after] for _, after, _ in known})
        )
    )
    longest = max((len(name) + len(marks.get(name, "")) for name in names), default=0)
    size = f'width="{left + 40 + LETTER * longest:.0f}" height="{18 + STEP * len(names)}"'
    body = "\n".join(lines)
    return drawn(
        f'<svg {size} role="img" aria-label="the order of {len(names)}" font-family="monospace">\n{body}\n</svg>'
    )
