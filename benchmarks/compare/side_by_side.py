"""Run the small training of docs/side-by-side.md in each framework that is installed, and compare the weights.

    python benchmarks/compare/side_by_side.py

The code is the page's own, so that what was run is what is shown: in each section the blocks before
``**In fluxloop**`` leave ``model``, and those after it ``learner``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "side-by-side.md"
FRAMEWORKS = {
    "Plain PyTorch": ("torch", "torch"),
    "Lightning": ("lightning", "lightning"),
    "Ignite": ("ignite", "pytorch-ignite"),
    "fastai": ("fastai", "fastai"),
}
"""The module and the distribution of each section's framework."""

SPLIT = "**In fluxloop**"
BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: str) -> dict[str, str]:
    """Give the page's sections by their heads; what stands before the first one has the head ''."""
    before, *rest = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return {"": before, **dict(zip(rest[::2], rest[1::2], strict=True))}


def code(text: str) -> str:
    """Give the blocks of Python in a text as one."""
    return "\n".join(BLOCK.findall(text))


def run(source: str, scope: dict[str, Any]) -> None:
    """Run code in an empty folder, without what it prints."""
    with contextlib.ExitStack() as around:
        folder = around.enter_context(tempfile.TemporaryDirectory())
        around.callback(os.chdir, Path.cwd())  # Python 3.10 has no contextlib.chdir
        os.chdir(folder)
        around.enter_context(contextlib.redirect_stdout(io.StringIO()))
        around.enter_context(contextlib.redirect_stderr(io.StringIO()))
        around.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        exec(source, scope)


def both(section: str, page: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run both sides of a section, and give the weights that they end with: theirs, and those of fluxloop."""
    found = sections(page)
    theirs, ours = found[section].split(SPLIT)
    scope: dict[str, Any] = {"__name__": "side_by_side"}
    run(code(found[""]), scope)
    run(code(theirs), scope)
    weights = list(scope["model"].parameters())
    run(code(ours), scope)
    return weights, list(scope["learner"].model.parameters())


def compare(section: str, page: str) -> str:
    """Say how far the weights of the two sides are from each other."""
    theirs, ours = both(section, page)
    if all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True)):
        return "same bits"
    most = max((one - other).abs().max().item() for one, other in zip(theirs, ours, strict=True))
    return f"weights differ by up to {most:.2g}"


def main() -> None:
    logging.disable(logging.WARNING)  # Lightning's advice
    page = PAGE.read_text()
    for section, (module, distribution) in FRAMEWORKS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{section}: not installed (pip install {distribution})")
        else:
            print(f"{section} {version(distribution)}: {compare(section, page)}")


if __name__ == "__main__":
    main()
