"""Draw Mermaid's flowcharts of the pages as pictures, so that the site loads no script from elsewhere.

It knows what docs/architecture.md uses: ``flowchart TB``, and lines ``one["its label"] --> other["its label"]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from itertools import pairwise

BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r'(\w+)(?:\["([^"]*)"\])? --> (\w+)(?:\["([^"]*)"\])?')
LETTER, PAD, GAP, HEIGHT, ROW = 7.3, 12, 24, 34, 78
"""Pixels: a letter, beside a label, between two boxes, the height of a box, from one row to the next."""


Arrows = list[tuple[str, str]]


def with_pictures(markdown: str) -> str:
    """Return a page with a picture in place of each of its flowcharts."""
    return BLOCK.sub(lambda block: f'<div class="flowchart">{draw(block[1])}</div>', markdown)


def parse(text: str) -> tuple[dict[str, str], Arrows]:
    """Return the label of each box, and which arrows there are.

    Raises:
        ValueError: A line is no arrow from one box to another.
    """
    first, *lines = (line.strip() for line in text.strip().splitlines())
    if first != "flowchart TB":
        raise ValueError(
            f"a diagram begins with {first!r}; expected 'flowchart TB', as docs/site/flowchart.py draws it"
        )
    labels: dict[str, str] = {}
    arrows = []
    for line in lines:
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f'a flowchart has the line {line!r}; expected one["its label"] --> other["its label"]')
        for name, label in ((found[1], found[2]), (found[3], found[4])):
            labels[name] = label or labels.get(name, name)
        arrows.append((found[1], found[3]))
    return labels, arrows


def depths(names: Iterable[str], arrows: Arrows) -> dict[str, int]:
    """Return in which row each box stands: below all that lead to it.

    Raises:
        ValueError: The arrows lead in a circle.
    """
    depth = dict.fromkeys(names, 0)
    for _ in depth:
        moved = [(after, depth[before] + 1) for before, after in arrows if depth[after] <= depth[before]]
        if not moved:
            return depth
        depth.update(moved)
    raise ValueError("the arrows of a flowchart lead in a circle; expected an order from top to bottom")


def ways(depth: dict[str, int], arrows: Arrows) -> list[list[str]]:
    """Return for each arrow what it passes, its ends too; ``depth`` gets a place in each row between them."""
    found = []
    for before, after in arrows:
        between = {f"{before} > {after}, {level}": level for level in range(depth[before] + 1, depth[after])}
        depth.update(between)
        found.append([before, *between, after])
    return found


def rows(depth: dict[str, int], passed: list[list[str]]) -> list[list[str]]:
    """Return what stands in each row, near the middle of what leads to it."""
    above: dict[str, list[str]] = {name: [] for name in depth}
    for way in passed:
        for before, after in pairwise(way):
            above[after].append(before)
    found: list[list[str]] = []
    place: dict[str, float] = {}
    for level in range(max(depth.values()) + 1):
        row = [name for name in depth if depth[name] == level]
        row.sort(key=lambda name: sum(place[each] for each in above[name]) / max(len(above[name]), 1))
        place.update({name: (index + 0.5) / len(row) for index, name in enumerate(row)})
        found.append(row)
    return found


def line(points: list[tuple[float, float]]) -> str:
    """Return an arrow that leaves the first box below, passes between others, and comes to the last one from above."""
    path = f"M{points[0][0]:g},{points[0][1] + HEIGHT / 2:g}"
    for (x, top), (to, bottom) in pairwise(points):
        begin, end = top + HEIGHT / 2, bottom - HEIGHT / 2 - (7 if (to, bottom) == points[-1] else 0)
        bend = (end - begin) / 2
        path += f" V{begin:g} C{x:g},{begin + bend:g} {to:g},{end - bend:g} {to:g},{end:g}"
    x, y = points[-1]
    head = f'<path d="M{x:g},{y - HEIGHT / 2:g} l-4,-7 h8 z" fill="currentColor"/>'
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.6"/>{head}'


def draw(text: str) -> str:
    """Return a flowchart as a picture, in the colours of the page around it."""
    labels, arrows = parse(text)
    depth = depths(labels, arrows)
    passed = ways(depth, arrows)
    levels = rows(depth, passed)
    wide = {name: LETTER * len(labels[name]) + 2 * PAD if name in labels else 0.0 for name in depth}
    width = max(sum(wide[name] + GAP for name in row) for row in levels)
    middle: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(levels):
        x = (width - sum(wide[name] + GAP for name in row)) / 2
        for name in row:
            middle[name] = (x + GAP / 2 + wide[name] / 2, level * ROW + HEIGHT / 2 + 2)
            x += wide[name] + GAP
    parts = [line([middle[name] for name in way]) for way in passed]
    for name in labels:
        x, y = middle[name]
        box = f'x="{x - wide[name] / 2:g}" y="{y - HEIGHT / 2:g}" width="{wide[name]:g}" height="{HEIGHT}" rx="5"'
        parts.append(
            f'<rect {box} fill="var(--md-default-bg-color, #fff)" stroke="currentColor"/>'
            f'<text x="{x:g}" y="{y + 4:g}" text-anchor="middle" fill="currentColor">{escape(labels[name])}</text>'
        )
    size = f'width="{width:g}" height="{len(levels) * ROW - ROW + HEIGHT + 4:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12" role="img" '
        f'aria-label="what calls what">{"".join(parts)}</svg>'
    )
