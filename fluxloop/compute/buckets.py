"""Gradients that are sent to other processes in one message."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxloop.errors import LossError
from fluxloop.processes.sums import Sums


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


if hasattr(torch._C._nn, "flatten_dense_tensors"):  # private names: the same, in one operator each
    _flatten, _unflatten = torch._C._nn.flatten_dense_tensors, torch._C._nn.unflatten_dense_tensors

_DENSE = torch.strided
_NOTHING = torch.empty(0)

KEPT = 1 << 18
"""From how many bytes on a CPU's message is written where the last one was: new memory of that size costs the system as
much time as filling it twice."""

_holders: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)  # no public name


def _held(tensor: Tensor) -> int:
    """Return how many hold the memory of a tensor, among them the object by which it is asked."""
    return 0 if _holders is None else _holders(tensor.untyped_storage()._cdata)


_HELD_ONCE = _held(_NOTHING)


class BucketSizes(NamedTuple):
    """How many bytes are sent in one message.

    Attributes:
        first: Of the first one: little, so that sending begins early.
        others: Of the others.
        whole: Parameters that are no more than this are sent at once.
    """

    first: int = 1 << 20
    others: int = 25 << 20
    whole: int = 8 << 20


class Bucket:
    """Parameters of one type whose gradients are sent in one message.

    Args:
        parameters: The parameters.
        dtype: Of the message.

    Attributes:
        unused: The places of those that had no gradient when it was sent.
        refused: Whether one of them is of a kind that cannot be sent, and was left out.
        orders: In which order the dimensions of each lie in memory; None where it is theirs.
        flat: What was sent, and then the sums of it: of the gradients, and of the tail.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = tuple(parameters)
        self.dtype = dtype
        self.unused: list[int] = []
        self.refused = False
        self.flat = _NOTHING
        self.armed = False
        self.turn = 0
        """How many times it was armed; by it a hook knows that it was called twice in one."""
        self._left = 0
        self._full: Callable[[], None] = _nothing
        self._pieces: list[Tensor] = []
        self._work: Any = None
        self._handles: list[Any] = []
        self._complex = bool(parameters) and parameters[0].is_complex()
        self.orders = [_order(parameter) for parameter in self.parameters]
        self._plain = not self._complex and not any(self.orders)
        size = sum(parameter.nbytes for parameter in self.parameters)
        self._keeps = size >= KEPT and self.parameters[0].is_cpu and _holders is not None
        self._kept = _NOTHING

    # ---------------------------------------------------------------- while a backward pass runs

    def hook(self) -> None:
        """Have the parameters tell when their gradients are complete."""
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_Hook(self))  # type: ignore[no-untyped-call]  # torch has none
            for parameter in self.parameters
        ]

    def forget(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arm(self, full: Callable[[], None]) -> None:
        """Count the gradients that are complete from now on.

        Not where somebody else's hooks follow: they may change a gradient after it was sent.

        Args:
            full: Called when all are.
        """
        self._left, self._full = len(self.parameters), full
        self.turn += 1
        self.armed = not any(map(_has_other_hooks, self.parameters))

    def disarm(self) -> None:
        """Count no longer."""
        self.armed, self._full = False, _nothing  # a hook that outlives its learner holds nothing of it

    @property
    def is_full(self) -> bool:
        """Whether all gradients are complete."""
        return self._left == 0

    def complete(self) -> None:
        """Count a gradient."""
        self._left -= 1
        if self._left == 0:
            self._full()

    # ---------------------------------------------------------------- sending and receiving

    def collect(self) -> None:
        """Take the gradients as they stand; zeros for those that are None, or that cannot be sent."""
        gradients = [parameter.grad for parameter in self.parameters]
        self.unused = [i for i, gradient in enumerate(gradients) if gradient is None or gradient.layout is not _DENSE]
        self.refused = False
        for place in self.unused:
            self.refused = self.refused or gradients[place] is not None
            gradients[place] = torch.zeros_like(self.parameters[place])
        self._pieces = gradients  # type: ignore[assignment]  # none is None any more
        if not self._plain:
            self._pieces = [self.laid_out(piece, order) for piece, order in zip(self._pieces, self.orders, strict=True)]

    def send(self, sums: Sums, tail: Sequence[Tensor] = ()) -> None:
        """Send the gradients that were collected.

        Args:
            sums: Adds up.
            tail: What is sent after them.
        """
        self._pieces += tail
        flat = self._joined()
        if flat.dtype != self.dtype or flat.requires_grad:  # as gradients do that were computed with create_graph
            flat = flat.detach().to(self.dtype)
        self.flat = flat
        if self._keeps:
            self._kept = flat
        self._work = sums.begin(flat, waits=bool(tail))

    def _joined(self) -> Tensor:
        """Return the pieces one after the other: in the memory of the last message, where nobody holds a part of it."""
        pieces, kept = self._pieces, self._kept
        if self._keeps and _held(kept) == _HELD_ONCE and kept.numel() == sum(piece.numel() for piece in pieces):
            with torch.no_grad():
                return torch.cat([piece.reshape(-1) for piece in pieces], out=kept)
        # Of a single tensor torch's operator returns the tensor itself, and the sums would overwrite it.
        return _flatten(pieces) if len(pieces) > 1 else pieces[0].reshape(-1).clone()

    def receive(self) -> None:
        """Wait for the sums."""
        self._work.wait()

    def hand_out(self, unused: Collection[int], divisor: float | Tensor | None) -> None:
        """Put the sums into ``grad``.

        Args:
            unused: The places of the parameters that no process has a gradient for.
            divisor: What they are divided by.
        """
        if divisor is not None:
            self.flat /= divisor
        sums = _unflatten(self.flat, self._pieces)
        if self._plain and not unused:
            for parameter, total in zip(self.parameters, sums, strict=False):  # the tail follows
                parameter.grad = total
        else:
            for place, (parameter, order) in enumerate(zip(self.parameters, self.orders, strict=True)):
                parameter.grad = None if place in unused else self.as_gradient(sums[place], order)
        self.flat, self._pieces, self._work = _NOTHING, [], None  # an update may free them

    def laid_out(self, gradient: Tensor, order: tuple[int, ...] | None) -> Tensor:
        """Return a gradient so that it is contiguous where its layout is that of its parameter; as real numbers."""
        if order is not None:
            gradient = gradient.permute(order)
        return torch.view_as_real(gradient.resolve_conj().resolve_neg()) if self._complex else gradient

    def as_gradient(self, total: Tensor, order: tuple[int, ...] | None) -> Tensor:
        """Return a sum in the layout of its parameter."""
        if self._complex:
            total = torch.view_as_complex(total)
        return total if order is None else total.permute([order.index(i) for i in range(len(order))])


class _Hook:
    """What a parameter calls when its gradient is complete."""

    __slots__ = ("bucket", "turn")

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.turn = 0

    def __call__(self, parameter: Tensor) -> None:
        bucket = self.bucket
        if bucket.armed:
            if self.turn == bucket.turn:
                raise LossError(
                    f"a parameter of shape {tuple(parameter.shape)} got its gradient twice in one backward pass, the "
                    "second time after it may have been sent to the other processes: is its layer used by two parts "
                    "that are checkpointed with use_reentrant=True? Expected torch.utils.checkpoint.checkpoint(..., "
                    "use_reentrant=False)"
                )
            self.turn = bucket.turn
            bucket.complete()


def _has_other_hooks(parameter: nn.Parameter) -> bool:
    """Return whether somebody else is told when a gradient is complete."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(type(hook) is not _Hook for hook in hooks.values())


def fill(parameters: Sequence[nn.Parameter], sizes: BucketSizes) -> list[Bucket]:
    """Put parameters into buckets, the last ones first, as a backward pass completes them.

    The last bucket can hold exact counts: its type is not of half precision. Where all parameters are, it holds none.

    Args:
        parameters: All on one device.
        sizes: How large they become.
    """
    whole = sum(parameter.nbytes for parameter in parameters) <= sizes.whole
    buckets: list[Bucket] = []
    opened: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        members = opened.setdefault(getattr(parameter, "grad_dtype", None) or parameter.dtype, [])
        members.append(parameter)
        limit = sizes.first if not buckets else sizes.others
        if not whole and sum(member.nbytes for member in members) >= limit:
            buckets.append(Bucket(members, _dtype_of(members)))
            members.clear()
    buckets += [Bucket(members, _dtype_of(members)) for members in opened.values() if members]
    exact = [bucket for bucket in buckets if bucket.dtype in (torch.float32, torch.float64)]
    last = exact[-1] if exact else Bucket((), torch.float32)
    return [bucket for bucket in buckets if bucket is not last] + [last]


def _dtype_of(members: Sequence[nn.Parameter]) -> torch.dtype:
    """Return the type of a message with their gradients."""
    dtype: torch.dtype = getattr(members[0], "grad_dtype", None) or members[0].dtype
    return dtype.to_real()


def _order(parameter: nn.Parameter) -> tuple[int, ...] | None:
    """Return in which order the dimensions of a parameter lie in memory; None where it is theirs."""
    if parameter.is_contiguous():
        return None
    strides = parameter.stride()
    order = tuple(sorted(range(parameter.dim()), key=lambda i: (-strides[i], i)))
    return order if parameter.permute(order).is_contiguous() else None


def _nothing() -> None:
    """Stand for what is called when a bucket is full."""
