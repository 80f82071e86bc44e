"""Every code block in the README, the docs and the docstrings runs."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

import fluxloop

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
EXAMPLES = ROOT / "docs" / "examples"
ELSEWHERE = {"common.py", "digits.py", "plain_digits.py"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = sorted(module.name for module in pkgutil.walk_packages(fluxloop.__path__, "fluxloop."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    namespace: dict[str, Any] = {"__name__": "docs"}
    printed = ""
    for match in FENCE.finditer(page.read_text()):
        language, code = match.groups()
        if language == "python":
            out = io.StringIO()
            line = page.read_text()[: match.start()].count("\n") + 1
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "output":
            assert [line.rstrip() for line in printed.strip().splitlines()] == code.strip().splitlines()


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    names = {key: getattr(fluxloop, key) for key in fluxloop.__all__}
    globs = {**names, **vars(module), "torch": torch}
    assert doctest.testmod(module, globs=globs, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


TWO_EPOCHS = ["digits.py", "plain_digits.py"]
ONE_EPOCH = sorted({path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE)


def run_example(script: str, out: Path, epochs: int) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / script), "--epochs", str(epochs), "--seed", "1", "--out", str(out)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=600, env=alone)
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert result["epochs"] == epochs
    assert result["seed"] == 1
    return result


@pytest.mark.parametrize("script", TWO_EPOCHS)
def test_the_digits_are_learned_in_two_epochs(script: str, tmp_path: Path) -> None:
    assert run_example(script, tmp_path, epochs=2)["accuracy"] > 0.9
    assert matplotlib.image.imread(tmp_path / "history.png").std() > 0


@pytest.mark.parametrize("script", ONE_EPOCH)
def test_an_example_runs_and_writes_its_results_and_pictures(script: str, tmp_path: Path) -> None:
    assert len(run_example(script, tmp_path, epochs=1)) > 2
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures
    for picture in pictures:
        assert matplotlib.image.imread(picture).std() > 0


def test_the_file_tree_in_the_readme_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text().split("## The files")[1]
    listed: set[str] = set()
    folder = ""
    for indent, name in re.findall(r"^( {2,4})(\w+(?:\.py|/))", tree, re.MULTILINE):
        folder = name if name.endswith("/") else folder if len(indent) == 4 else ""
        if not name.endswith("/"):
            listed.add(folder + name)
    package = ROOT / "fluxloop"
    assert listed == {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
