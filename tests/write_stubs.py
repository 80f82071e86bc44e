"""Write what type checkers read of the packages that load their names lazily: their ``__init__.pyi``.

The names are written once, in the tables of the packages' ``__init__.py``. After a change there:
``.venv/bin/python tests/write_stubs.py``
"""

from __future__ import annotations

import importlib
from pathlib import Path

import fluxloop
from fluxloop.lazy import homes_of


def stub(package: str) -> str:
    """Return the text of a package's stub."""
    lines = []
    for module, names in homes_of[package].items():
        home = f"{package}.{module}".rstrip(".")
        lines += [(home, name, f"from {home} import {name} as {name}") for name in names.split()]

    def place(line: tuple[str, str, str]) -> tuple[str, bool, bool, str]:
        home, name, _ = line  # in the order in which the linter wants imports: constants, classes, functions
        return home, not (name.isupper() and len(name) > 1), not name[0].isupper(), name.lower()

    version = ["", "__version__: str"] if package == "fluxloop" else []
    head = "# Written by tests/write_stubs.py from the table in __init__.py, where the public names are."
    return "\n".join([head, "", *(text for *_, text in sorted(lines, key=place)), *version]) + "\n"


def path(package: str) -> Path:
    """Return where a package's stub lies."""
    return Path(str(importlib.import_module(package).__file__)).with_name("__init__.pyi")


if __name__ == "__main__":
    assert fluxloop.__all__
    for each in homes_of:
        path(each).write_text(stub(each), encoding="utf-8")
