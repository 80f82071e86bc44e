"""Public names that are loaded when they are first asked for (PEP 562), so that importing fluxloop costs little."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

Homes = Mapping[str, str]
"""By module of a package, its public names, separated by spaces; "" has those that are modules themselves."""

homes_of: dict[str, Homes] = {}
"""By name, the packages that load their names lazily. Type checkers read the stubs that are written from this."""


def lazily(package: str, homes: Homes) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's ``__getattr__``, ``__dir__`` and ``__all__``: names and modules are loaded when asked for.

    Args:
        package: Its name.
        homes: The only place where its public names are written.
    """
    home = {name: module for module, names in homes.items() for name in names.split() if module}
    homes_of[package] = homes
    public = sorted(" ".join(homes.values()).split(), key=lambda name: (not name.isupper(), name))

    def get(name: str) -> Any:
        if name in home:
            thing = getattr(import_module(f"{package}.{home[name]}"), name)
        elif name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            thing = import_module(f"{package}.{name}")
        else:
            from fluxloop.errors import did_you_mean

            raise AttributeError(f"{package} has no {name!r}{did_you_mean(name, public)}")
        setattr(sys.modules[package], name, thing)  # from now on it is found without asking
        return thing

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return get, names, public


def all_but(package: ModuleType, *names: str) -> str:
    """Return the public names of a package within, less some, for a package that has them too."""
    return " ".join(name for name in package.__all__ if name not in names)


def all_subclasses(base: type[T], package: str) -> list[type[T]]:
    """List a class and all its subclasses: users' own, and those that come with fluxloop, loaded or not yet.

    Args:
        base: The class.
        package: The name of the package that loads fluxloop's subclasses lazily.
    """
    import_module(package)
    for module in filter(None, homes_of[package]):
        import_module(f"{package}.{module}")
    found = [base]
    for cls in found:  # which grows meanwhile
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return found
