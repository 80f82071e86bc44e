"""Public names that are loaded when they are first asked for (PEP 562), so that importing fluxloop costs little."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

T = TypeVar("T")

_homes: dict[str, tuple[str, ...]] = {}
"""The modules with public names of each package that loads them lazily."""


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Give a package's ``__getattr__`` and ``__dir__``: its names and modules are loaded when asked for.

    Args:
        package: Its name.
        homes: By module of the package, the public names that it has, separated by spaces.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}
    _homes[package] = tuple(homes)

    def get(name: str) -> Any:
        if name in home:
            thing = getattr(import_module(f"{package}.{home[name]}"), name)
        elif name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            thing = import_module(f"{package}.{name}")
        else:
            from fluxloop.errors import did_you_mean

            raise AttributeError(f"{package} has no {name!r}{did_you_mean(name, sys.modules[package].__all__)}")
        setattr(sys.modules[package], name, thing)  # from now on it is found without asking
        return thing

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})

    return get, names


def all_subclasses(base: type[T], package: str) -> list[type[T]]:
    """List a class and all classes made of it: users' own, and those that come with fluxloop, loaded or not yet.

    Args:
        base: The class.
        package: The one that loads fluxloop's subclasses lazily, by name.
    """
    import_module(package)
    for module in _homes[package]:
        import_module(f"{package}.{module}")
    found = [base]
    for cls in found:  # which grows meanwhile
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return found
