"""Whether what a thing holds is still what it held: by identity where that is enough, else by type and bits."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fluxloop.persist.plain import is_simple


class Opaque:
    """Stands for a value that is no plain data: equal to one that stands for the same value.

    Attributes:
        value: The value.
        path: Where it was found; "" where it needs no mention, as somebody else keeps it.
    """

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str) -> None:
        self.value = value
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]  # compared only


def opaque_in(written: Any) -> Iterator[Opaque]:
    """Yield what of a written value is no plain data."""
    if isinstance(written, Opaque):
        yield written
    elif isinstance(written, dict):
        for item in written.values():
            yield from opaque_in(item)
    elif isinstance(written, (list, tuple)) and not is_simple(written):
        for item in written:
            yield from opaque_in(item)


def identical(items: Any, raw: Any) -> bool:
    """Return whether two series hold the very same items; two sets, whether they are equal."""
    if isinstance(items, set):
        return bool(items == raw)
    return len(items) == len(raw) and all(map(is_, items, raw))


def same_bits(a: Any, b: Any) -> bool:  # noqa: PLR0911  # one per kind of value
    """Return whether plain data is the same: of the same types, to the bit, in the same order."""
    if a is b:
        return True
    if type(a) is not type(b) and not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_on_host(a), _on_host(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same_bits(k, m) and same_bits(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return False
        if is_simple(a):  # by repr where they are no longer the same objects: 1 is not True, NaN is NaN
            return a == b and (all(map(is_, a, b)) or repr(a) == repr(b))
        return all(map(same_bits, a, b))
    if isinstance(a, (int, float)):
        return repr(a) == repr(b)
    return bool(a == b)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_cpu else tensor.detach().cpu()


def is_of_one_number(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are the same one, so that one tells them all."""
    if tensor.is_complex() or not tensor.numel() or tensor.layout is not torch.strided:
        return False
    low, high = torch.aminmax(tensor.detach())
    return bool(low == high)


def digest(array: Any) -> Any:
    """Return a checksum of an array of NumPy's; of one that lies in a file, of a thousand of its rows."""
    rows = array if type(array).__name__ != "memmap" else array[:: max(len(array) // 1000, 1)]
    return array.shape, str(array.dtype), zlib.crc32(rows.tobytes())
