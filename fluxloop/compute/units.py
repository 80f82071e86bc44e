"""Which modules are sharded, and which of their parts are gathered together."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fluxloop.errors import ModelError


def has_parameters(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, has a parameter."""
    return next(module.parameters(), None) is not None


def can_run(module: nn.Module) -> bool:
    """Return whether a module has a forward of its own."""
    return type(module).forward is not nn.Module.forward


def runnable(path: str, part: nn.Module) -> Iterator[str]:
    """Yield the path of a part, or, as that of a list of modules is nothing that runs, those of what is in it."""
    if can_run(part):
        yield path
    else:
        for name, child in part.named_children():
            if has_parameters(child):
                yield from runnable(f"{path}.{name}", child)


def roots_of(name: str, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is sharded of a model: itself, or its parts where these are called in its place.

    Raises:
        ModelError: It has parameters that no forward uses.
    """
    if not has_parameters(model):
        return
    if can_run(model):
        yield name, model
        return
    if any(parameter is not None for parameter in model._parameters.values()):
        raise ModelError(
            f"{name} ({type(model).__name__}) has parameters of its own and no forward, so that nothing says when they "
            "have to be whole; expected a forward, or a module of their own that has one"
        )
    for child_name, child in model.named_children():
        yield from roots_of(f"{name}.{child_name}", child)


def by_size(root: nn.Module, least: int) -> set[str]:
    """Choose the smallest parts with enough parameters that are in no smaller one."""
    chosen: set[str] = set()
    counts: dict[nn.Module, int] = {}
    for path, part in reversed([*root.named_modules()]):  # what is inside comes before what it is in
        own = sum(parameter.numel() for parameter in part._parameters.values() if parameter is not None)
        count = own + sum(counts.get(child, 0) for child in part.children())
        if path and count >= least:
            chosen.add(path)
            count = 0
        counts[part] = count
    return chosen


def shared_beyond(root: nn.Module, path: str) -> tuple[str, str] | None:
    """Return a parameter of a part, and what holds it as well outside of it; None where there is none."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append((name, name.rpartition(".")[0]))
    for held in places.values():
        inside = [name for name, _ in held if name.startswith(f"{path}.")]
        outside = [owner for name, owner in held if not name.startswith(f"{path}.")]
        if inside and outside:
            return inside[0], outside[0]
    return None
