from __future__ import annotations

import math
import re
from html import unescape

import pytest

from fluxloop.screen.pages import Markup, arcs, curve, page, preformatted, table, titled
from read_pages import read_page

SIGNS = "<b> & \"c\" 'd'"


def test_a_text_is_shown_with_its_signs_wherever_it_stands() -> None:
    parts = [SIGNS, table([SIGNS], [[SIGNS]]), titled(SIGNS, preformatted(SIGNS)), arcs([SIGNS], [], {SIGNS: SIGNS})]
    found = read_page(page(*parts))
    assert found.count("b") == 1  # of the title
    assert found.rows == [[SIGNS], [SIGNS]]
    assert [word.strip() for word in found.words if word.strip()] == [SIGNS] * 7


def test_markup_is_put_into_a_table_as_it_is() -> None:
    found = read_page(table(["name"], [[Markup("<i>a</i>")]]))
    assert (found.rows, found.count("i")) == ([["name"], ["a"]], 1)


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    cells = [attrs["style"] for tag, attrs in read_page(table(["a", "b"], [["c", 1]], [1])).elements if tag == "td"]
    assert ["right" in str(style) for style in cells] == [False, True]


def test_a_row_that_does_not_fit_the_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        table(["a", "b"], [["c"]])


def corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    drawn = next(attrs["points"] for tag, attrs in read_page(curve(points)).elements if tag == "polyline")
    return [(float(x), float(y)) for x, y in (corner.split(",") for corner in str(drawn).split())]


def test_a_curve_falls_where_its_numbers_do_and_stays_in_its_frame() -> None:
    (left, high), (middle, between), (right, low) = corners([(1, 3.0), (2, 2.0), (3, 1.0)])
    assert 0 < left < middle < right < 96
    assert 0 < high < between < low < 20  # pixels are counted from the top


def test_a_curve_leaves_out_what_is_not_finite_and_keeps_the_others_where_they_are() -> None:
    whole = corners([(1, 3.0), (2, 2.0), (3, 2.5), (5, 1.0)])
    assert corners([(1, 3.0), (2, math.nan), (3, 2.5), (4, math.inf), (5, 1.0)]) == [whole[0], *whole[2:]]


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(1, math.nan), (2, 0.5)]])
def test_fewer_than_two_points_are_no_curve(points: list[tuple[float, float]]) -> None:
    assert curve(points) == ""


def test_a_level_curve_is_drawn_too() -> None:
    assert corners([(1, 0.5), (2, 0.5)]) == [(2.0, 18.0), (94.0, 18.0)]


def test_each_arrow_is_an_arc_that_says_why_and_each_name_a_line_below_the_one_before() -> None:
    found = read_page(arcs(["a", "b", "c"], [("a", "b", "one"), ("a", "c", "two"), ("a", "gone", "three")]))
    assert [word for word in found.words if "→" in word] == ["a → b: one", "a → c: two"]
    lines = [float(str(attrs["y"])) for tag, attrs in found.elements if tag == "text"]
    assert lines == sorted(lines)
    assert len(lines) == 3
    assert not any("id" in attrs for _, attrs in found.elements)  # several stand in one notebook


def test_what_is_marked_is_told_behind_its_name() -> None:
    found = read_page(arcs(["a", "b"], [], {"b": "writes"}))
    assert [word.strip() for word in found.words if word.strip()] == ["a", "b", "writes"]


def test_a_diagram_whose_tags_are_taken_out_is_lines_of_names_and_reasons() -> None:
    """JupyterLab does so in a notebook that was not run there."""
    diagram = arcs(["a", "b", "c"], [("a", "b", "one\ntwo"), ("a", "c", SIGNS)], {"c": "writes"})
    words = unescape(re.sub(r"</?(svg|path|text|tspan|title)\b[^>]*>", "", diagram))
    assert words.startswith("<pre ")
    lines = [line for line in words.splitlines()[1:-1] if line]
    assert lines == ["a", "b", "c writes", "a → b: one", "two", f"a → c: {SIGNS}"]
