"""What stands where in a checkpoint, so that a file that was changed or mixed up is refused before it is restored.

A rule says what is wrong with a value. Parts that a later version adds are not looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluxloop.checkpoint.open_windows import OPEN
from fluxloop.errors import describe
from fluxloop.persist.plain import from_plain
from fluxloop.randomness import MASK

Rule = Callable[[Any, str], Iterator[str]]


def _a(what: str, fits: Callable[[Any], bool]) -> Rule:
    def rule(value: Any, where: str) -> Iterator[str]:
        if not fits(value):
            yield f"{where} is {describe(value)}; expected {what}"

    return rule


def _maybe(inner: Rule) -> Rule:
    def rule(value: Any, where: str) -> Iterator[str]:
        if value is not None:
            yield from inner(value, where)

    return rule


def _each(inner: Rule) -> Rule:
    def rule(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, (list, tuple)):
            yield f"{where} is {describe(value)}; expected a list"
            return
        for index, item in enumerate(value):
            yield from inner(item, f"{where}[{index}]")

    return rule


def _table(inner: Rule) -> Rule:
    def rule(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where} is {describe(value)}; expected a dict"
            return
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {key!r}; expected texts"
            yield from inner(item, f"{where}[{key!r}]")

    return rule


def _entries(needed: dict[str, Rule], more: dict[str, Rule] | None = None) -> Rule:
    """Make a rule for a dict with certain entries; those in `more` may be missing."""

    def rule(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where or 'the state'} is {describe(value)}; expected a dict"
            return
        for name, inner in {**needed, **(more or {})}.items():
            if name in value:
                yield from inner(value[name], f"{where}.{name}".lstrip("."))
            elif name in needed:
                yield f"{f'{where}.{name}'.lstrip('.')} is missing"

    return rule


def _generators(value: Any, where: str) -> Iterator[str]:
    """Yield a line where states of the global generators cannot be restored; tried on other generators."""
    try:
        states = from_plain(value)
        torch.Generator().set_state(states["torch"])
        random.Random().setstate(states["python"])
        if states["numpy"] is not None:
            import numpy

            numpy.random.RandomState().set_state(states["numpy"])
        if states["cuda"] is not None:
            list(map(Tensor.numel, states["cuda"]))
    except Exception as error:
        yield f"{where} are no states of random generators ({error!r})"


ANY: Rule = _a("anything", lambda value: True)
# By type, here and below: True is an instance of int
COUNT = _a("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
TEXT = _a("a text", lambda value: isinstance(value, str))
FLAG = _a("True or False", lambda value: isinstance(value, bool))
TENSOR = _a("a tensor", lambda value: isinstance(value, Tensor))
DICT = _a("a dict", lambda value: isinstance(value, dict))
GENERATOR = _a(
    "the state of a random generator", lambda value: isinstance(value, Tensor) and value.dtype is torch.uint8
)

MODULE = _entries(
    {
        "state": _table(ANY),
        "metadata": DICT,
        "buffers": _table(TENSOR),
        "frozen": _each(TEXT),
        "attributes": _table(DICT),
    }
)
SOURCE: dict[str, Rule] = {
    "own_generators": _each(GENERATOR),
    "walk": DICT,
    "samplers": _each(DICT),
    "private": _each(ANY),
    "private_now": _each(ANY),
    "fingerprint": DICT,
    "of_processes": _each(DICT),
}
FEED = _entries(
    {"key": TEXT, "batch": COUNT, "length": _maybe(COUNT), "global_generators": _generators},
    {**SOURCE, "processes": COUNT, "out": FLAG},
)
PLACE = _entries(
    {"phases": _each(TEXT), "index": COUNT, "feed": _maybe(FEED), "script": _generators},
    {"steps_per_epoch": _maybe(COUNT)},
)
OPTIMIZER = _entries({"class": TEXT, "defaults": DICT, "state": DICT}, {"names": _each(_each(TEXT))})
NUMBER = _a("a number", lambda value: type(value) in (int, float))
WINDOW = _entries(
    {
        "size": COUNT,
        "count": COUNT,
        "weight": NUMBER,
        "current": _maybe(NUMBER),
        "scale": NUMBER,
        "complete": FLAG,
        "finite": FLAG,
    }
)
WINDOWS = _entries({"windows": _table(_each(WINDOW)), "gradients": _table(TENSOR)})
SCALE = _entries({"value": NUMBER, "growth": COUNT, "largest": NUMBER, "reference": _maybe(NUMBER)})
# The second dict of each: parts that files of older versions lack
SLOT = _entries(
    {"consumed": FLAG, "waiting": FLAG, "in_block": FLAG},
    {"train_mode": FLAG, "phase": _maybe(TEXT), "num_batches": COUNT, "window": WINDOW},
)
CALLBACK = _entries({"class": TEXT, "state": DICT, "around": _each(DICT)})


def _loss_function(value: Any, where: str) -> Iterator[str]:
    rule = MODULE if isinstance(value, dict) and "state" in value else _entries({"attributes": DICT})
    yield from _maybe(rule)(value, where)


STATE = _entries(
    {
        "seed": _a(f"a whole number from 0 to {MASK}", lambda value: type(value) is int and 0 <= value <= MASK),
        "models": _table(MODULE),
        "loss_fn": _loss_function,
        "views": _table(_table(ANY)),
        "optimizers": _table(OPTIMIZER),
        "updates": _entries({"slots": _table(SLOT), "gradients": _table(TENSOR)}, {"scale": SCALE, OPEN: WINDOWS}),
        "streams": _table(COUNT),
        "history": _entries({"cycles": COUNT, "stop_reason": _maybe(TEXT)}),
        "cbstate": _table(ANY),
        "callbacks": _table(CALLBACK),
        "phases": _table(_each(DICT)),
        "data": _table(_entries({}, SOURCE)),
        "place": _maybe(PLACE),
    },
    {"present": _table(TEXT), "precision": TEXT},
)


def misplaced(state: Any) -> Iterator[str]:
    """Yield a line for each part of a learner's state that is missing, or of another kind than it has to be."""
    yield from STATE(state, "")
    place = state.get("place")
    if isinstance(place, dict) and not list(PLACE(place, "")):  # else its parts cannot be compared with each other
        phases, feed = place["phases"], place["feed"]
        if place["index"] > len(phases) or (feed is not None and place["index"] == len(phases)):
            yield f"place.index is {place['index']}; expected that of one of the {len(phases)} phases"
        if feed is not None and feed["length"] is not None and feed["batch"] > feed["length"]:
            yield f"place.feed.batch is {feed['batch']} of {feed['length']} batches"


def kinds_differ(live: Any, kept: Any, where: str) -> Iterator[str]:
    """Yield a line where plain data is of another kind than what is there now: counts are counts, texts are texts.

    Args:
        live: What is there now; where it is None, anything may come.
        kept: What a checkpoint has, made from plain data.
        where: What it is called in messages.
    """
    if isinstance(live, bool):  # before int, which it is too
        fits, what = isinstance(kept, bool), "True or False"
    elif isinstance(live, int):
        fits, what = kept is None or (type(kept) is int and (kept >= 0 or live < 0)), "a whole number, 0 or more"
    elif isinstance(live, float):
        fits, what = isinstance(kept, (int, float, Tensor, type(None))), "a number"
    elif isinstance(live, str):
        fits, what = isinstance(kept, (str, type(None))), "a text"
    elif isinstance(live, dict):
        fits, what = isinstance(kept, dict), "a dict"
        for key in live.keys() & kept.keys() if fits else ():
            yield from kinds_differ(live[key], kept[key], f"{where}[{key!r}]")
    else:
        fits, what = not isinstance(live, list) or isinstance(kept, list), "a list"
    if not fits:
        yield f"{where} is {describe(kept)} in the checkpoint; expected {what}"
