"""Describe what Python sees of an object, so that a later description is equal where nothing has changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.persist.attributes import attributes

CONSTANTS = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size)
MOST_BYTES = 4096
"""Up to how many bytes an array of NumPy's is compared by its numbers."""


class Same:
    """Equal to another one of the same object; holds it, so that no other object takes its place."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def seen(value: Any, depth: int = 4) -> Any:  # noqa: PLR0911  # one per kind of value
    """Describe a value: numbers, texts and containers by what they say, objects by who they are and their attributes.

    Tensors, modules, optimizers and functions are described by who they are alone.

    Args:
        value: Anything.
        depth: How far to go into objects that hold objects.
    """
    if isinstance(value, CONSTANTS):
        return type(value), value
    if isinstance(value, float):
        return float, repr(value)  # NaN is NaN
    if isinstance(value, (Tensor, nn.Module, Optimizer, type, ModuleType)) or depth == 0:
        return Same(value)
    if isinstance(value, Mapping):
        return type(value), [(key, seen(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [seen(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), value.copy()
    if isinstance(value, partial):
        return partial, [seen(part, depth - 1) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return MethodType, Same(value.__func__), seen(value.__self__, depth - 1)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return Same(value), value.tobytes() if value.nbytes <= MOST_BYTES else None
    return Same(value), {name: seen(item, depth - 1) for name, item in attributes(value).items()}
