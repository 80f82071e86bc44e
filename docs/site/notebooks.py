"""Notebooks as pages of the site, from the outputs that they hold.

Run as a script it executes them anew, each in a kernel of its own, and keeps what their cells show:
python docs/site/notebooks.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


def notebooks() -> list[Path]:
    """List the notebooks of the docs."""
    return sorted(FOLDER.glob("*.ipynb"))


def page_of(path: Path) -> str:
    """Return a notebook in Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown(output) for output in cell.get("outputs", [])]
    parts.append(f'---\n\nThe notebook itself, to run it: <a href="{path.name}" download>{path.name}</a>')
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """Return what a cell has shown: a picture or a page where there is one, else the text."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = {kind: "".join(text) for kind, text in output["data"].items()}
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        return f'<img class="notebook-output" alt="what the cell shows" src="data:image/png;base64,{picture}">'
    if "text/html" in data:  # Markdown would end it at an empty line, and read what follows as its own
        return f'<div class="notebook-output">{data["text/html"].replace(chr(10), "&#10;")}</div>'
    return f"```text\n{data['text/plain'].rstrip()}\n```"


def execute(path: Path, folder: Path) -> None:
    """Run a notebook in a kernel, and write it with what its cells show into a folder, in which it runs too.

    Raises:
        CellExecutionError: A cell has raised something.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, record_timing=False, resources=resources, timeout=300)
    client.execute(env=surroundings())
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version that it ran on
    (folder / path.name).write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def joined(outputs: list[Any]) -> list[Any]:
    """Return outputs of which those of one stream that follow each other are one, as a notebook shows them.

    nbclient can join them too, but takes carriage returns away: nobody would see that something writes them.
    """
    found: list[Any] = []
    for output in outputs:
        if output["output_type"] == "stream" and found and found[-1].get("name") == output["name"]:
            found[-1]["text"] += output["text"]
        else:
            output.get("data", {}).pop("image/jpeg", None)  # of a picture that is there as PNG too
            found.append(output)
    return found


def surroundings() -> dict[str, str]:
    """Return an environment in which any machine shows the same: nothing is silenced, and the CPU computes."""
    kept = {name: value for name, value in os.environ.items() if name != "FLUXLOOP_QUIET"}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Execute the notebooks, and keep what their cells show.")
    parser.add_argument("names", nargs="*", help="such as gan.ipynb; left out, all")
    parser.add_argument("--into", type=Path, default=FOLDER, help="another folder to write them to")
    given = parser.parse_args()
    for notebook in [FOLDER / name for name in given.names] or notebooks():
        execute(notebook, given.into)
