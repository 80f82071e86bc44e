"""Tensors and arrays in memory whose first dimension are rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import DataError, describe
from fluxloop.nested import tensors


def as_tensors(data: Any) -> Any:
    """Turn every array in a nest of arrays and tensors into a tensor that shares its memory.

    Raises:
        DataError: There is something else in it, or a tensor of which no rows can be taken.
    """
    if isinstance(data, Tensor):
        _check_rows_can_be_taken(data)
        return data
    if isinstance(data, Mapping):
        return {key: as_tensors(value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        items = [as_tensors(value) for value in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    if hasattr(data, "__array__") and len(getattr(data, "shape", ())) > 0:
        try:
            return torch.as_tensor(data.__array__())
        except TypeError as error:
            raise DataError(
                f"{describe(data)} of {data.dtype} was given as data; expected tensors or arrays, a tuple or dict of "
                f"them, all of numbers: {error}"
            ) from error
    raise DataError(
        f"{describe(data)} was given as data; expected tensors or arrays, a tuple or dict of them, "
        "a Dataset, or an iterable of batches such as a DataLoader"
    )


def _check_rows_can_be_taken(data: Tensor) -> None:
    """Raise for a tensor of which torch gives no rows in any order: a nested or a sparse one."""
    if data.is_nested:
        raise DataError(
            f"a nested tensor of {data.size(0)} rows was given as data, which torch cannot cut into batches; expected "
            "tensors whose rows have one shape (torch.nested.to_padded_tensor(data, 0.0)), or a loader that makes "
            "batches of rows:\n    DataLoader(data.unbind(), batch_size=32, shuffle=True, "
            "collate_fn=partial(torch.nested.as_nested_tensor, layout=torch.jagged))"
        )
    if data.layout is not torch.strided:
        raise DataError(
            f"a tensor of the layout {data.layout} was given as data, which torch cannot cut into batches; expected a "
            "dense one (data.to_dense()), or a Dataset that makes its rows dense one by one"
        )


def count_rows(data: Any) -> int:
    """Return the number of rows that all tensors in `data` share.

    Raises:
        DataError: They differ.
    """
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors(data)}
    if len(lengths) != 1:
        raise DataError(
            f"the tensors have {sorted(lengths) or 'no'} rows; expected the same number of rows in all "
            "of them: shape (rows, …)"
        )
    return lengths.pop()
