"""The notebooks of the docs show what their cells give, and their pages on the site show that."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from read_pages import read_page

SITE = Path(__file__).parents[1] / "docs" / "site"
NOTEBOOKS = sorted((SITE.parent / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"-?(\d[\d,.:]*(e[+-]?\d+)?|nan)")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", SITE / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(path: Path) -> list[Any]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def cell_with(words: str, path: Path) -> Any:
    return next(cell for cell in code_of(path) if words in "".join(cell["source"]))


def parts_of(output: Any) -> dict[str, str]:
    """Return what one output has, by its kind."""
    data = output.get("data", {output.get("name", ""): output.get("text", "")})
    return {kind: "".join(text) for kind, text in data.items()}


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", NUMBER.sub("#", text))


def told(kind: str, what: str) -> Any:
    """Return what an output tells without its numbers: they are others on another machine."""
    if kind == "image/png":
        return Image.open(BytesIO(base64.b64decode(what))).size
    if kind == "text/html":
        page = read_page(what)
        return [tag for tag, _ in page.elements], [without_numbers(word) for word in page.words]
    return without_numbers(what)


def test_numbers_alone_are_left_out_of_what_is_compared() -> None:
    assert without_numbers("epoch 1/5  loss 1.7e-05   in 00:01") == without_numbers("epoch 2/5 loss -nan in 1:00:02")
    assert without_numbers("loss 1.0 acc 0.5") != without_numbers("loss 1.0 accuracy 0.5")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_its_cells_show_when_it_is_run(path: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(SITE / "notebooks.py"), path.name, "--into", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other among other tests
    run = subprocess.run(script, capture_output=True, text=True, env=one_thread)
    assert run.returncode == 0, run.stderr
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # the cells leave nothing
    assert r"\r" not in (tmp_path / path.name).read_text("utf-8")
    kept, found = code_of(path), code_of(tmp_path / path.name)
    assert [cell["source"] for cell in found] == [cell["source"] for cell in kept]
    for old, new in zip(kept, found, strict=True):
        shown = [
            [
                {kind: told(kind, what) for kind, what in parts_of(output).items()}
                for output in cell["outputs"]
                if any(parts_of(output).values())  # a bar that a slow machine showed for a while leaves nothing to see
            ]
            for cell in (old, new)
        ]
        assert shown[0] == shown[1], "run docs/site/notebooks.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_fit_leaves_one_clean_line_in_a_saved_notebook_and_nothing_goes_wrong(path: Path) -> None:
    outputs = cell_with("learner.fit(", path)["outputs"]
    assert [list(parts_of(output)) for output in outputs] == [["text/html", "text/plain"], ["stdout"]]
    assert re.fullmatch(r"\d+ epochs in \d\d:\d\d", parts_of(outputs[0])["text/plain"])
    assert read_page(parts_of(outputs[0])["text/html"]).words == [parts_of(outputs[0])["text/plain"]]
    for cell in code_of(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert "stderr" not in parts_of(output)
            assert not any("\r" in what or "\x1b" in what for what in parts_of(output).values())


@pytest.mark.parametrize(
    ("name", "words"), [("gan", "Image.fromarray"), ("first-steps", "sweep.plot()"), ("first-steps", "history.plot()")]
)
def test_a_cell_with_a_picture_shows_it(name: str, words: str) -> None:
    output = cell_with(words, SITE.parent / "notebooks" / f"{name}.ipynb")["outputs"][-1]
    picture = base64.b64decode(parts_of(output)["image/png"])
    assert len(picture) < 60_000
    low, high = Image.open(BytesIO(picture)).convert("L").getextrema()
    assert high - low > 200


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_words_its_code_and_what_was_shown_in_order(path: Path) -> None:
    page, place = load().page_of(path), 0
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        place = page.index("".join(cell["source"]), place)
        for output in cell.get("outputs", []):
            parts = parts_of(output)
            kind = next(kind for kind in ("image/png", "text/html", "text/plain", "stdout") if kind in parts)
            what = parts[kind].strip()
            place = page.index(what.replace("\n", "&#10;") if kind == "text/html" else what, place)
    assert f'<a href="{path.name}" download>' in page
    for block in re.findall(r'^<div class="notebook-output">.*', page, re.MULTILINE):
        read_page(block)  # closed on its line: Markdown takes none of it for its own


def test_every_notebook_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"- notebooks/([\w-]+)\.md", (SITE / "mkdocs.yml").read_text("utf-8"))
    assert sorted(listed) == [path.stem for path in NOTEBOOKS] == ["first-steps", "gan"]
