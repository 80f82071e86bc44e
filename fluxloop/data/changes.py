"""What of a source moves while it is run through: its generators, and what its parts hold for themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from fluxloop.data.generators import own_generators, private_generators, samplers
from fluxloop.data.kinds import Combined, keeps_place, parts_of
from fluxloop.data.loaders import TensorBatches
from fluxloop.data.notes import Notes
from fluxloop.persist.attributes import WATCHED
from fluxloop.persist.owners import Restoring, models_apart
from fluxloop.persist.plain import from_plain, to_plain
from fluxloop.persist.walk import Walk

_walks: Notes[Walk] = Notes()


def watch(source: Any) -> Walk | None:
    """Look at what a source consists of, so that changes are seen; None where it is plain, or cannot be looked at."""
    if isinstance(source, (list, tuple, Tensor, Combined)) or type(source) is TensorBatches:
        return None
    if keeps_place(source) and not isinstance(source, DataLoader):  # it says itself what it keeps
        return None
    known = vars(source) if not isinstance(source, DataLoader) and hasattr(source, "__dict__") else None
    walk = _walks.get(source) if known is None else known.get(WATCHED)
    if walk is None:
        walk = Walk(
            {"": source if known is not None else SimpleNamespace(**_parts(source))}, "data", models_apart, True
        )
        if known is None:
            _walks.put(source, walk)
        else:  # with it, so that it lives no longer
            known[WATCHED] = walk
    return walk


def _parts(source: Any) -> dict[str, Any]:
    """Return what of a loader may change, by name: its data set, functions and samplers."""
    if keeps_place(source):
        return {f"sampler_{number}": sampler for number, sampler in enumerate(samplers(source))}
    names = ("dataset", "collate_fn", "sampler", "batch_sampler") if isinstance(source, DataLoader) else ()
    return {name: part for name in names if (part := getattr(source, name, None)) is not None}


def changes_of(source: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what has changed of a source's parts as plain data, and the paths of what is lost."""
    walk = watch(source)
    return ({}, []) if walk is None else walk.state(models_apart)


def put_changes_back(source: Any, kept: dict[str, Any]) -> None:
    """Put a source's parts where `changes_of` found them."""
    walk = watch(source)
    if walk is not None:
        walk.restore(kept, Restoring(models_apart))


def source_state(source: Any) -> dict[str, Any]:
    """Return what of a source moves: generators, and what its data set, functions and samplers hold."""
    state = {**generators_state(source), "walk": changes_of(source)[0]}
    return {**state, "parts": [source_state(part) for part in source.parts]} if isinstance(source, Combined) else state


def generators_state(source: Any) -> dict[str, Any]:
    """Return where all generators of a source stand."""
    return {
        **({"parts": [generators_state(part) for part in source.parts]} if isinstance(source, Combined) else {}),
        "own_generators": [generator.get_state() for generator in own_generators(source)],
        "private": private_state(source),
    }


def private_state(source: Any) -> list[Any]:
    """Return where the generators stand that a loader's dataset and samplers hold for themselves."""
    return [to_plain(generator, "a generator of the data") for generator in private_generators(source)]


def put_private_back(source: Any, kept: list[Any]) -> None:
    """Put those generators where `private_state` found them."""
    for generator, state in zip(private_generators(source), kept, strict=False):
        from_plain(state, generator)


def put_generators_back(source: Any, state: dict[str, Any]) -> None:
    """Put all generators of a source where `generators_state` found them."""
    for part, of_part in zip(parts_of(source), state.get("parts", ()), strict=False):
        put_generators_back(part, of_part)
    _set_generators(source, state)


def put_source_back(source: Any, state: dict[str, Any]) -> None:
    """Put a loader where `source_state` found it."""
    for part, of_part in zip(parts_of(source), state.get("parts", ()), strict=False):
        put_source_back(part, of_part)
    put_changes_back(source, state.get("walk", {}))  # first: it may put other generators into the parts
    _set_generators(source, state)


def _set_generators(source: Any, state: dict[str, Any]) -> None:
    for generator, stood in zip(own_generators(source), state["own_generators"], strict=False):
        generator.set_state(stood)
    put_private_back(source, state["private"])
