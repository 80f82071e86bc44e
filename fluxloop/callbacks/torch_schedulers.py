"""Schedulers of ``torch.optim``: what a factory says of them, how they are stepped, saved and compared.

What torch leaves open is here: a scheduler cannot be asked what it was made with, warns of steps that it has not
seen, and keeps functions in its state. The callback is in ``lr_scheduler.py``.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import CheckpointError
from fluxloop.persist.arguments import arguments_of, changed
from fluxloop.persist.plain import from_plain, to_plain

NOT_GIVEN = ("_last_lr",)
"""What a torch scheduler has when it is made and nobody gave it: the optimizer's present rates."""


def mentioned(factory: Any) -> set[str]:
    """Return the names that a factory's code mentions: the class's, where it is one or a partial of one."""
    while isinstance(factory, partial):
        factory = factory.func
    code = getattr(factory, "__code__", None)
    return {getattr(factory, "__name__", ""), *(code.co_names if code is not None else ())}


def says_mode(factory: Any) -> bool:
    """Return whether a factory gives its scheduler a `mode`, as far as its arguments and its code show."""
    while isinstance(factory, partial):
        if factory.args or "mode" in factory.keywords:  # `mode` is the first argument after the optimizer
            return True
        factory = factory.func
    code = getattr(factory, "__code__", None)
    constants = code.co_consts if code is not None else ()  # a call's keywords are a tuple of texts there
    return any("mode" in (each if isinstance(each, tuple) else (each,)) for each in constants)


def takes_metrics(scheduler: Any) -> bool:
    """Return whether a scheduler's ``step`` takes a metric's value, as that of `ReduceLROnPlateau` does."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def wants_count(scheduler: Any) -> bool:
    """Return whether ``step`` takes how far the training is, as timm's schedulers do: ``step(epoch)``."""
    epoch = inspect.signature(scheduler.step).parameters.get("epoch")
    return epoch is not None and epoch.default is epoch.empty


def _stepped() -> None:
    """Stand for an optimizer's ``step`` while a scheduler looks at it."""


_stepped._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # where torch looks


def advance(scheduler: Any, *metrics: float, count: int = 0, updates: bool = False) -> None:
    """Step a torch scheduler, without its warning that the optimizer has not been stepped before.

    Args:
        scheduler: The scheduler.
        metrics: The metric's value, for one that takes it.
        count: How many epochs, or updates, have ended, for one that takes that.
        updates: Whether `count` counts updates: ``step_update(count)``.
    """
    optimizer = scheduler.optimizer
    if wants_count(scheduler):
        (scheduler.step_update if updates else scheduler.step)(count)
        return
    # The warning would be wrong: an epoch may have had no update. And torch sees only the steps that go through
    # its wrapper of `step`, which costs every update 15 µs; so the wrapper is taken away, and stood for here.
    wrapped = "step" in vars(optimizer)
    if not wrapped:
        optimizer.step = _stepped
    optimizer._opt_called = True
    try:
        scheduler.step(*metrics)
    finally:
        if not wrapped:
            del optimizer.step


def state_when_made(scheduler: Any) -> dict[str, Any]:
    """Return what tells how a scheduler was made: its state, and what it put into the parameter groups."""
    optimizer = scheduler.optimizer
    known = {*optimizer.defaults, "params", "param_names"}
    added = [{k: v for k, v in group.items() if k not in known} for group in optimizer.param_groups]
    return {**state_of(scheduler), "param_groups": from_plain(to_plain(added, "the parameter groups"))}


def state_of(scheduler: Any) -> Any:
    """Copy a scheduler's state, without functions: they come from the script.

    Raises:
        CheckpointError: Something in it cannot be kept.
    """
    state = {key: value for key, value in scheduler.state_dict().items() if not callable(value)}
    return from_plain(to_plain(state, type(scheduler).__name__))


def with_counters(kept: Any, present: Any) -> Any:
    """Return kept data with Counters where a scheduler has them: a checkpoint keeps them as dicts."""
    if isinstance(kept, dict):
        old = present if isinstance(present, dict) else {}
        items = {key: with_counters(value, old.get(key)) for key, value in kept.items()}
        return Counter(items) if isinstance(present, Counter) else items
    if isinstance(kept, list):
        among = present if isinstance(present, list) else []
        return [with_counters(*pair) for pair in zip_longest(kept, among[: len(kept)])]
    return kept


def functions_of(scheduler: Any, where: str = "") -> dict[str, Any]:
    """Return what the functions in a scheduler were made with: its state has nothing of them."""
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name == "_schedulers":
            for index, inner in enumerate(value):
                found |= functions_of(inner, f"{where}{name}[{index}].")
        elif callable(value) or (isinstance(value, (list, tuple)) and value and all(map(callable, value))):
            found |= arguments_of(value, f"{where}{name}")
    return found


def check_same(scheduler: Any, made: dict[str, Any], functions: dict[str, Any], kept: dict[str, Any]) -> None:
    """Raise for a scheduler that was made otherwise than the one in a checkpoint.

    Raises:
        CheckpointError: Names the arguments, with both values.
    """
    name = type(scheduler).__name__
    if kept["class"] != name:
        raise CheckpointError(f"the checkpoint's scheduler is a {kept['class']}, this one a {name}; make it as it was")
    found = [f"{where}={old!r}, now {where}={new!r}" for where, old, new in _differences(kept["made"], made, "")]
    found += [each for each in changed(kept.get("functions", {}), functions) if each not in found]
    if found:
        raise CheckpointError(
            f"the checkpoint's {name} was made with {'; '.join(found[:3])}. Make it with the old values to go on; for "
            "new ones begin a new training from the weights"
        )


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two states differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in NOT_GIVEN:
                yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif isinstance(old, Tensor) or isinstance(new, Tensor):
        if not torch.equal(torch.as_tensor(old).cpu(), torch.as_tensor(new).cpu()):
            yield where, old, new
    elif old != new:
        yield where, old, new
