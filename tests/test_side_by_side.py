from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "side-by-side.md").read_text()
script: Any = runpy.run_path(str(ROOT / "benchmarks" / "compare" / "side_by_side.py"))


def test_the_small_training_of_the_page_ends_with_the_bits_of_plain_pytorch() -> None:
    assert script["compare"]("Plain PyTorch", PAGE) == "same bits"
    without = PAGE.replace(", GradientClip(0.3)", "")
    assert re.match(r"weights differ by up to 0\.\d+", script["compare"]("Plain PyTorch", without))


@pytest.mark.parametrize("section", ["Lightning", "Ignite", "fastai"])
def test_what_stands_beside_another_framework_trains_the_bits_of_plain_pytorch(section: str) -> None:
    plain, _ = script["sections"](PAGE)["Plain PyTorch"].split(script["SPLIT"])
    _, ours = script["sections"](PAGE)[section].split(script["SPLIT"])
    page = PAGE.split("\n## ")[0] + f"\n## {section}\n{plain}{script['SPLIT']}{ours}"
    assert script["compare"](section, page) == "same bits"


def test_code_of_other_frameworks_in_python_stands_where_the_script_runs_it() -> None:
    shown = {head for head, text in script["sections"](PAGE).items() if "```py\n" in text}
    assert shown | {"Plain PyTorch"} == script["FRAMEWORKS"].keys()
    for head in shown:
        assert "```py\n" not in script["sections"](PAGE)[head].split(script["SPLIT"])[1]
