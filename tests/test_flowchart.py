"""Flowcharts of the pages are drawn for the site, with each box and each arrow, and without a script."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```mermaid" in page.read_text("utf-8")]
SVG = "{http://www.w3.org/2000/svg}"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flowchart", DOCS / "site" / "flowchart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_with_a_flowchart_has_a_picture_of_all_of_it_in_its_place(page: Path) -> None:
    text = page.read_text("utf-8")
    (block,) = re.findall(r"^```mermaid\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shown = load().with_pictures(text)
    assert "mermaid" not in shown.lower()
    (svg,) = re.findall(r"<svg.*</svg>", shown)
    drawn = ET.fromstring(svg)
    assert sorted(each.text or "" for each in drawn.iter(f"{SVG}text")) == sorted(re.findall(r'\["(.*?)"\]', block))
    assert len(list(drawn.iter(f"{SVG}path"))) == 2 * block.count("-->")  # a line and a head


def test_the_architecture_is_one_of_them() -> None:
    assert DOCS / "architecture.md" in PAGES


def middles(svg: str) -> dict[str, tuple[float, float]]:
    return {
        each.text or "": (float(each.attrib["x"]), float(each.attrib["y"]))
        for each in ET.fromstring(svg).iter(f"{SVG}text")
    }


def test_each_arrow_leads_down_and_no_box_covers_another() -> None:
    chart = load()
    text = 'flowchart TB\n  a["<first>"] --> b["second & third"]\n  a --> c["last"]\n  b --> c\n  a --> d["beside"]\n'
    svg = chart.draw(text)
    place = middles(svg)
    labels, arrows = chart.parse(text)
    assert [*place] == ["<first>", "second & third", "last", "beside"]
    for before, after in arrows:
        assert place[labels[before]][1] < place[labels[after]][1]
    boxes = [
        {key: float(value) for key, value in each.attrib.items() if key in ("x", "y", "width")}
        for each in ET.fromstring(svg).iter(f"{SVG}rect")
    ]
    for one in boxes:
        for other in boxes:
            if one is not other and one["y"] == other["y"]:
                assert one["x"] + one["width"] < other["x"] or other["x"] + other["width"] < one["x"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sequenceDiagram\n a->>b: hello", "begins with 'sequenceDiagram'; expected 'flowchart TB'"),
        ("flowchart TB\n a --- b", "has the line 'a --- b'"),
        ("flowchart TB\n a --> b\n b --> a", "lead in a circle"),
    ],
)
def test_what_it_cannot_draw_is_an_error_of_the_build(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        load().draw(text)


def test_an_arrow_over_a_row_passes_beside_its_boxes() -> None:
    svg = load().draw('flowchart TB\n  a["first"] --> b["second"]\n  b --> c["third"]\n  a --> c\n')
    (box,) = [each.attrib for each in ET.fromstring(svg).iter(f"{SVG}rect") if float(each.attrib["y"]) == 80]
    (long,) = (each.attrib["d"] for each in ET.fromstring(svg).iter(f"{SVG}path") if each.attrib["d"].count("C") == 2)
    between = float(long.split("C")[1].split()[-2].split(",")[0])  # where the first bend ends
    assert not float(box["x"]) <= between <= float(box["x"]) + float(box["width"])
