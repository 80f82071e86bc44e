"""The rows of all processes as one tensor, with gradient, also where processes have different numbers of them.

In a training step the gradients of all processes are averaged, each weighted by its rows. A loss of
gathered rows has the gradient of one process on the joined batch then, with no factor to put in:
where each process computes the mean over its own rows against everybody's, and where all compute
the same loss of all rows. Gradients of gathered rows are added up over the processes on their way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from fluxloop.errors import BatchError, describe
from fluxloop.processes.group import Group


@frozen
class Rows:
    """How many rows each process has.

    Args:
        counts: By the number of the process; 0 for one whose rows do not count.
        rank: The number of this process.
    """

    counts: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """The place of this process's rows among all; nothing lies there where they do not count."""
        ends = list(accumulate(self.counts))
        return slice(ends[self.rank] - self.counts[self.rank], ends[self.rank])

    @property
    def total(self) -> int:
        """How many there are in all."""
        return sum(self.counts)


def compare_rows(tensor: Tensor, group: Group) -> Rows:
    """Tell each other how many rows there are, in one message.

    Args:
        tensor: Its first dimension are the rows; the others, and its type, have to be the same in all processes.
        group: The processes.

    Raises:
        BatchError: In all processes, where the tensors of two cannot be joined.
    """
    if not tensor.ndim:
        raise BatchError(
            "a tensor without rows, of shape (), was given to be gathered; expected one whose first dimension are "
            "rows: tensor.reshape(1)"
        )
    kind = crc32(f"{tuple(tensor.shape[1:])} {tensor.dtype}".encode())
    told = torch.tensor([len(tensor), kind, group.spare], dtype=torch.int64, device=host_of(group))
    counts, kinds, spare = zip(*_gathered(told[None], group).tolist(), strict=True)
    if len(set(kinds)) > 1:
        given = group.gather_objects(f"{describe(tensor)} and {tensor.dtype}")
        listed = "; ".join(f"process {rank}: {each}" for rank, each in enumerate(given))
        raise BatchError(
            f"tensors were given to be gathered that cannot be joined: {listed}. Expected one type, and one shape "
            "apart from the number of rows"
        )
    return Rows(tuple(0 if out else count for count, out in zip(counts, spare, strict=True)), group.rank)


@cache
def host_of(group: Group) -> torch.device:
    """Return where numbers that the host needs are sent from: itself where it can, so that no device is waited for."""
    on_host = group.device.type == "cpu" or "cpu" in dist.get_backend_config(group.process_group)
    return torch.device("cpu") if on_host else group.device


def all_gather(tensor: Tensor, group: Group, rows: Rows | None = None) -> Tensor:
    """Return the rows of all processes, in the order of their numbers; with gradient, second derivatives too.

    All processes have to call it, and those that compute gradients through it have to do so together.
    The rows of a step that is only there so that all have as many (`Group.spare`) are left out; no
    gradient goes to them.

    Args:
        tensor: The rows of this process, which may be more or fewer than another's.
        group: The processes.
        rows: What `compare_rows` returned for a tensor with as many rows; left out, it is asked for first.

    Raises:
        BatchError: In all processes, where the tensors of two cannot be joined.
    """
    rows = compare_rows(tensor, group) if rows is None else rows
    gathered: Tensor = _AllGather.apply(tensor, group, rows)  # type: ignore[no-untyped-call]  # torch has no types
    return gathered


def join_rows(group: Group, *tensors: Tensor) -> tuple[list[Tensor], Rows]:
    """Return several tensors of this process's rows with those of all, with gradient, in two messages.

    Args:
        group: The processes.
        tensors: Of one type, and with the same rows.

    Returns:
        The tensors, and which of their rows are whose.
    """
    flat = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
    rows = compare_rows(flat, group)
    widths = [tensor[:1].numel() for tensor in tensors]
    parts = torch.split(all_gather(flat, group, rows), widths, dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)], rows


def mean_of_rows(tensor: Tensor, group: Group | None) -> Tensor:
    """Return the mean of the rows of all processes, without gradient, in one message; of this one's without a group.

    Args:
        tensor: Shape (N, ...), of which N may be another in each process.
        group: The processes.
    """
    if group is None:
        return tensor.mean(0)
    rows = 0 if group.spare else len(tensor)
    exact = tensor if tensor.dtype == torch.float64 else tensor.float()
    total = exact.sum(0) if rows else torch.zeros_like(exact[0])
    return mean_of_sum(total, rows, group).to(tensor.dtype)


def mean_of_sum(total: Tensor, rows: int, group: Group | None) -> Tensor:
    """Return the mean of rows of all processes of which each has a sum, as `mean_of_rows` does.

    Args:
        total: The sum of this process's rows.
        rows: How many they are; they may be 0 in some processes.
        group: The processes.
    """
    if group is None:
        return total / rows
    summed = _summed(torch.cat([total.flatten(), total.new_tensor([rows])]), group)
    return (summed[:-1] / summed[-1]).reshape(total.shape)


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Return the sum of a tensor of each process, the same on all, with gradient.

    That of a step that is only there so that all have as many (`Group.spare`) is left out. Gradients are added up over
    the processes on their way back, as those of gathered rows are.

    Args:
        tensor: Of one shape and type on all processes.
        group: The processes.
    """
    summed: Tensor = _Sum.apply(tensor, group, group.spare)  # type: ignore[no-untyped-call]  # torch has no types
    return summed


def gather_equal(tensor: Tensor, group: Group) -> Tensor:
    """Return tensors of one shape, one from each process, joined along the first dimension; without gradient.

    Args:
        tensor: Of one shape and type on all processes.
        group: The processes.
    """
    return _gathered(tensor.detach(), group)


def average_gradients(parameters: Sequence[Tensor], rows: int, group: Group) -> None:
    """Average the gradients of a small model over processes, each weighted by its rows, in one message.

    Args:
        parameters: Those with the same shapes and types in all processes, and with gradients.
        rows: How many rows this process's gradients are a mean over.
        group: The processes.
    """
    weight = 0 if group.spare else rows
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) * weight
    summed = _summed(torch.cat([flat, flat.new_tensor([weight])]), group)
    means = torch.split(summed[:-1] / summed[-1], [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


class _AllGather(torch.autograd.Function):
    """Join the rows of all; backward, each process gets the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, rows: Rows) -> Tensor:
        ctx.group, ctx.rows, ctx.length = group, rows, len(tensor)
        return _joined(tensor, group, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _AddUpOwn.apply(gradients[0], ctx.group, ctx.rows, ctx.length), None, None  # type: ignore[no-untyped-call]  # as above


class _AddUpOwn(torch.autograd.Function):
    """Add up a tensor of all rows over the processes and keep one's own rows; backward, the rows of all are joined."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, group: Group, rows: Rows, length: int) -> Tensor:
        ctx.group, ctx.rows = group, rows
        total = _summed(gradient, group)
        # rows that do not count were left out: no gradient goes to them
        return total[rows.own] if rows.counts[rows.rank] else total.new_zeros(length, *total.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _AllGather.apply(gradients[0], ctx.group, ctx.rows), None, None, None  # type: ignore[no-untyped-call]  # as above


class _Sum(torch.autograd.Function):
    """Add up a tensor over the processes, of those that are not left out; backward, its gradient.

    Who is left out takes part in both: the others wait for it.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, left_out: bool) -> Tensor:
        ctx.group, ctx.left_out = group, left_out
        return _summed(torch.zeros_like(tensor) if left_out else tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = _Sum.apply(gradients[0], ctx.group, False)  # type: ignore[no-untyped-call]  # as above
        return torch.zeros_like(total) if ctx.left_out else total, None, None


def _joined(tensor: Tensor, group: Group, rows: Rows) -> Tensor:
    """Join the rows of all: fewer ones are filled up to the longest, as collectives want them, and cut again."""
    longest = max(rows.counts)
    if min(rows.counts) == longest:
        return _gathered(tensor, group)
    count = rows.counts[rows.rank]
    filled = torch.cat([tensor[:count], tensor.new_zeros(longest - count, *tensor.shape[1:])])
    parts = torch.split(_gathered(filled, group), longest)
    return torch.cat([part[:count] for part, count in zip(parts, rows.counts, strict=True)])


# The operators of torch.distributed._functional_collectives, which a compiled step can hold as well, without the
# wrappers around them; dist.all_gather_into_tensor warns in torch 2.13, and its successor is new there.


def _gathered(tensor: Tensor, group: Group) -> Tensor:
    """Return tensors of one shape, one from each process, joined along the first dimension."""
    joined: Tensor
    if not hasattr(torch.ops._c10d_functional, "all_gather_into_tensor"):  # another torch
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, tensor.contiguous(), group=group.process_group)
        return torch.cat(parts)
    functional: Any = torch.ops._c10d_functional
    name = group.process_group.group_name
    joined = functional.wait_tensor(functional.all_gather_into_tensor(tensor.contiguous(), group.size, name))
    return joined


def _summed(tensor: Tensor, group: Group) -> Tensor:
    """Return the sum of tensors of one shape, one from each process."""
    if not hasattr(torch.ops._c10d_functional, "all_reduce"):  # another torch
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group.process_group)
        return total
    functional: Any = torch.ops._c10d_functional
    name = group.process_group.group_name
    summed: Tensor = functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", name))
    return summed
