"""The pages of the reference: every public name, grouped as people look for it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

GROUPS = {
    "learner": (
        "Learner",
        "What trains, and what it has recorded.",
        "learner run.accelerator compute.shard history order.diagram",
    ),
    "phases": (
        "Phases",
        "What a step does, and the heads that papers put on encoders. The abstract phases come first.",
        "phase loop phases heads",
    ),
    "events": ("Events", "The moments at which handlers act.", "events"),
    "callbacks": ("Callbacks", "What acts at events, and how to write one.", "callback callbacks multipledispatch"),
    "stopping": ("Stopping", "When a fit has learned enough.", "stopping"),
    "metrics": ("Metrics", "What is measured in each epoch.", "metrics"),
    "schedules": ("Schedules", "Hyperparameters over time.", "schedules hyperparameters run.lr_finder"),
    "data": ("Data", "Where batches come from, and views of them.", "data augment"),
    "logging": ("Logging", "Where numbers and pictures go.", "logging"),
    "losses": ("Losses", "As functions, for any phase.", "losses"),
    "devices": (
        "Memory, processes and random numbers",
        "What a device and several processes need.",
        "compute processes run.batch_size_finder randomness",
    ),
    "testing": ("Testing", "For tests of phases and callbacks of your own.", "testing"),
    "errors": ("Errors", "What goes wrong, and what each of them means.", "errors"),
}
"""Pages of the reference: title, what they hold, and the modules of fluxloop whose public names they list."""


def public() -> dict[str, Any]:
    """Return everything public by its name in the reference, in the order of its definition."""
    import fluxloop

    found = {name: getattr(fluxloop, name) for name in fluxloop.__all__}
    things = {named(thing, name): thing for name, thing in found.items() if not inspect.ismodule(thing)}
    for module in (
        fluxloop.losses,
        fluxloop.augment,
        fluxloop.heads,
        fluxloop.testing,
    ):  # what is used by its module's name as well
        made_here = [
            name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__
        ]
        for name in getattr(module, "__all__", made_here):
            if hasattr(getattr(module, name), "__module__") and not name.startswith("_"):
                things.setdefault(named(getattr(module, name), name), getattr(module, name))
    return things


def named(thing: Any, name: str) -> str:
    """Return the full name under which a thing is defined; an object is defined in the first module that has it."""
    own = getattr(thing, "__qualname__", name)
    modules = [key for key, module in sys.modules.items() if key.startswith("fluxloop.") and module]
    for module in (thing.__module__, *modules):
        if module in sys.modules and vars(sys.modules[module]).get(own) is thing and module.startswith("fluxloop."):
            return f"{module}.{own}"
    raise LookupError(f"no module of fluxloop has {name}")


def page_of(name: str) -> str | None:
    """Return the page of the reference on which a full name stands; the longest module that fits decides."""
    path = name.removeprefix("fluxloop.")
    places = [
        (len(m), page) for page, (_, _, ms) in GROUPS.items() for m in ms.split() if f"{path}.".startswith(f"{m}.")
    ]
    return max(places)[1] if places else None


def reference() -> Iterator[tuple[str, str]]:
    """Yield the pages of the reference, each with its text."""
    things = public()
    names = sorted(things, key=lambda name: place(name, things[name]))
    index = ["# Reference\n\nEvery public name. All but the losses and what tests use are in `fluxloop` itself.\n"]
    for page, (title, about, modules) in GROUPS.items():
        order = modules.split()
        own = [name for name in names if page_of(name) == page]
        own.sort(
            key=lambda name: next(i for i, m in enumerate(order) if f"{name.removeprefix('fluxloop.')}.".startswith(m))
        )
        lines = [f"# {title}\n\n{about}\n"]
        for name in own:
            lines.append(f"::: {name}\n    options: {{inherited_members: {str(name.endswith('.Learner')).lower()}}}\n")
        yield f"reference/{page}.md", "\n".join(lines)
        index.append(f"## [{title}]({page}.md)\n\n{about}\n")
        index.append("\n".join(f"- [{name.rpartition('.')[2]}][{name}]" for name in own) + "\n")
    yield "reference/index.md", "\n".join(index)


def place(name: str, thing: Any) -> tuple[str, int]:
    """Return where a thing is defined: its module, and the line there."""
    try:
        return name.rpartition(".")[0], inspect.getsourcelines(inspect.unwrap(thing))[1]
    except (OSError, TypeError):
        return name.rpartition(".")[0], 0
