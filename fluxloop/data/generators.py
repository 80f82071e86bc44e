"""The random generators that a loader, its samplers, its data set and its functions keep for themselves."""

from __future__ import annotations

import random
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fluxloop.persist.attributes import attributes
from fluxloop.persist.plain import SCALARS, is_numpy_generator


def own_generators(source: Any) -> list[torch.Generator]:
    """List the generators of a loader, its sampler and its batch sampler."""
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    owners = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(found.values())


def samplers(source: Any) -> list[Any]:
    """List a loader's samplers that are not torch's own."""
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    found = (sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    own = {id(each): each for each in found if each is not None and type(each).__module__ != "torch.utils.data.sampler"}
    return list(own.values()) if isinstance(source, DataLoader) else []


KINDS = (torch.Generator, random.Random)


MOST = 500
"""How many objects are looked at for generators."""


def private_generators(source: Any, samplers_too: bool = True) -> list[Any]:
    """List the random generators that a loader's dataset, functions and samplers keep for themselves."""
    if not isinstance(source, DataLoader):
        return []
    return generators_of([source.dataset, source.collate_fn, *(samplers(source) if samplers_too else ())])


def generators_of(things: list[Any]) -> list[Any]:
    """List the random generators that objects and functions keep for themselves.

    They are looked for in attributes, containers, partial functions and what functions close over.
    """
    found: list[Any] = []
    seen: set[int] = set()
    todo = list(things)
    # Bounded, as a data set may hold millions of rows as objects: this is asked before each pass.
    while todo and len(seen) < MOST:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (Tensor, type, ModuleType, *SCALARS)):
            continue
        seen.add(id(thing))
        if isinstance(thing, KINDS) or is_numpy_generator(thing):
            found.append(thing)
        else:
            todo.extend(_inside(thing))
    return found


def _inside(thing: Any) -> list[Any]:
    """List what an object holds, as far as generators may be there."""
    if isinstance(thing, (list, tuple, set)):
        return list(thing) if len(thing) <= MOST else []
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= MOST else []
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__]
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]  # some are still empty
    return list(attributes(thing).values())
