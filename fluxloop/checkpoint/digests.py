"""Checksums that bind a checkpoint's tensors to their names, and what may stand in a file at all.

The zip file that ``torch.save`` writes has a checksum for each piece of memory, whoever it belongs
to: two tensors of one size that are exchanged still have them. These are of name, type, shape and
bytes together.
"""

from __future__ import annotations

import ctypes
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fluxloop.errors import CheckpointError, describe

WRITABLE = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
)
"""The types, no subclasses, that every file may hold beside tensors and containers."""

Named = tuple[str, Tensor]


def named_tensors(value: Any, path: str = "") -> Iterator[Named]:
    """Yield the tensors in plain data with their paths, in order.

    Raises:
        CheckpointError: There is something else, which could be written and never read again.
    """
    kind = type(value)
    if isinstance(value, Tensor) and not is_lazy(value):
        yield path, value
    elif kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in WRITABLE and not (type(key) is tuple and set(map(type, key)) <= WRITABLE):
                raise _foreign(f"the key {key!r} of {path}", key)
            if type(item) not in WRITABLE:
                yield from named_tensors(item, ".".join(filter(None, (path, str(key)))))
    elif kind in (list, tuple, set):
        if not set(map(type, value)) <= WRITABLE:  # known at once of a long series
            for index, item in enumerate(value):
                if type(item) not in WRITABLE:
                    yield from named_tensors(item, f"{path}[{index}]")
    elif kind not in WRITABLE:
        raise _foreign(path, value)


def _foreign(path: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which torch.load(weights_only=True) would "
        "not read again; expected numbers, texts, tensors, and containers of them"
    )


def checksum(name: str, tensor: Tensor) -> int:
    """Return a 32-bit checksum of a tensor's name, type, shape and bytes."""
    number = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return number
    # A conjugated or negated tensor only notes that it is: its memory holds the numbers of the other one
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not data.nbytes:
        return number
    # from the memory itself: to make bytes of it would copy each tensor
    return zlib.crc32((ctypes.c_char * data.nbytes).from_address(data.data_ptr()), number)


def checksums(tensors: Iterable[Named]) -> Tensor:
    """Return the checksums of tensors, in their order."""
    return torch.tensor([checksum(*each) for each in tensors], dtype=torch.int64)


def check_sums(state: Any, sums: Any) -> Iterator[str]:
    """Yield a line for each tensor that does not have the checksum that it was written with."""
    tensors = list(named_tensors(state))
    if not isinstance(sums, Tensor) or tuple(sums.shape) != (len(tensors),):
        yield f"it has {len(tensors)} tensors and {describe(sums)} for their checksums"
        return
    for (name, tensor), number in zip(tensors, sums.tolist(), strict=True):
        if checksum(name, tensor) != number:
            yield f"{name!r} (shape {tuple(tensor.shape)}) is not the tensor that was written"


def first_difference(written: Any, read: Any, path: str = "the state") -> str | None:
    """Return where plain data that was read is not what was written, or None; `check_sums` compares the tensors."""
    if isinstance(written, Tensor) and isinstance(read, Tensor):
        return None
    if type(written) is not type(read):
        return f"{path} was {describe(written)} and is {describe(read)}"
    if isinstance(written, dict):
        if list(written) != list(read):
            return f"the keys of {path} are {list(read)[:5]}, and were {list(written)[:5]}"
        pairs = [(written[key], read[key], f"{path}[{key!r}]") for key in written]
    elif isinstance(written, (list, tuple)):
        if len(written) != len(read):
            return f"{path} has {len(read)} items, and had {len(written)}"
        pairs = [(*both, f"{path}[{index}]") for index, both in enumerate(zip(written, read, strict=True))]
    else:
        return None if repr(written) == repr(read) else f"{path} was {written!r} and is {read!r}"  # NaN is NaN
    return next((found for pair in pairs if (found := first_difference(*pair)) is not None), None)
