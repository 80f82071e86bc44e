"""Processes begin with the same weights and the same seed, and are compared before they train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from fluxloop.errors import ModelError, ProcessError
from fluxloop.processes.group import Group

Named = Sequence[tuple[str, Tensor]]
"""Parameters and buffers with their names, in one order."""

Optimizers = TypeVar("Optimizers", bound=Mapping[Any, torch.optim.Optimizer])

CHUNK = 2**24
"""How many elements are sent at a time, so that a large model is not copied as a whole."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types as which the bits of others are read, by how many bytes an element has."""


def agree_on_seed(group: Group | None, seed: int, given: bool) -> int:
    """Return the run's seed: where it was drawn, what the first process drew is everybody's.

    Args:
        group: The processes; None for one.
        seed: What this one was given, or drew.
        given: Whether it was given.

    Raises:
        ValueError: It was given, and differs, or was not given to all.
    """
    if group is None:
        return seed
    said: list[tuple[int, bool]] = group.gather_objects((seed, given))
    for rank, (other, other_given) in enumerate(said):
        if other_given != said[0][1] or (other_given and other != said[0][0]):
            first, second = (f"seed={number if was else None}" for number, was in (said[0], (other, other_given)))
            raise ValueError(
                f"Learner({first}) was made on process 0, and Learner({second}) on process {rank}; expected one seed "
                "on all: what each process draws for itself in a step differs all the same (docs/randomness.md)"
            )
    return said[0][0]


def whole(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return those that each process has as a whole, and that have been made: no shards, and nothing lazy."""
    return [tensor for tensor in tensors if not is_lazy(tensor) and not hasattr(tensor, "device_mesh")]


def begin_alike(group: Group | None, named: Named) -> None:
    """Give every process the weights and buffers of the first one.

    Args:
        group: The processes; None for one.
        named: Parameters and buffers.

    Raises:
        ModelError: The processes have different models, or one whose weights are only made in its first step.
    """
    if group is None:
        return
    for name, tensor in named:
        if is_lazy(tensor):
            raise ModelError(
                f"{name!r} is lazy: each process would draw weights of its own in its first step; expected a batch "
                "to run through the model before the learner is made: model(xs)"
            )
    said = [(name, f"{tuple(tensor.shape)}, {tensor.dtype}") for name, tensor in named]
    if len(set(group.gather_objects(_digest(said)))) > 1:
        everybody: list[list[tuple[str, str]]] = group.gather_objects(said)
        for rank, others in enumerate(everybody):
            if others != everybody[0]:
                raise ModelError(
                    f"process {rank} has another model than process 0: {_difference(others, everybody[0])}; expected "
                    "the same model on all, made without regard to the number of the process"
                )
    send(group, whole(tensor for _, tensor in named))


def _difference(others: list[tuple[str, str]], first: list[tuple[str, str]]) -> str:
    """Say in words where a list of parameters and buffers begins to differ from that of the first process."""
    there, here = dict(first), dict(others)
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return f"{name} is {here.get(name, 'not there')} on it, and {there.get(name, 'not there')} on process 0"
    return "its parts are in another order"


def states_alike(group: Group | None, optimizers: Optimizers) -> Optimizers:
    """Give optimizers that were made beforehand the state that they have on the first process; return them."""
    if group is None:
        return optimizers
    for optimizer in optimizers.values():
        if any(group.gather_objects(bool(optimizer.state))):
            state = group.broadcast(optimizer.state_dict() if group.is_main else None)
            if not group.is_main:
                optimizer.load_state_dict(state)
    return optimizers


def send(group: Group, tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process, in as few messages as there are types."""
    with torch.no_grad():
        for chunk in _chunks(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in chunk]).to(group.device)
            dist.broadcast(flat, src=0, group=group.process_group)
            if not group.is_main:
                for tensor, part in zip(chunk, torch.split(flat, [each.numel() for each in chunk]), strict=True):
                    tensor.detach().copy_(part.view_as(tensor))


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type and device together, up to so many elements."""
    kind = [(tensor.dtype, tensor.device) for tensor in tensors]
    places = sorted(range(len(tensors)), key=lambda place: (str(kind[place]), place))
    for _, group in groupby(places, key=lambda place: kind[place]):
        chunk: list[Tensor] = []
        for place in group:
            if chunk and sum(each.numel() for each in chunk) + tensors[place].numel() > CHUNK:
                yield chunk
                chunk = []
            chunk.append(tensors[place])
        yield chunk


def check_asked_alike(group: Group, asked: dict[str, Any]) -> None:
    """Raise where the processes are about to run different fits: they would wait for one another, without end.

    Args:
        group: The processes.
        asked: What the fit of this one is, by words for it.

    Raises:
        ProcessError: Says what differs.
    """
    everybody: list[dict[str, Any]] = group.gather_objects(asked)
    for rank, others in enumerate(everybody):
        differing = [
            f"{what}: {first} on process 0, {others[what]} on process {rank}"
            for what, first in everybody[0].items()
            if others[what] != first
        ]
        if differing:
            raise ProcessError(
                f"the processes are about to run different fits ({'; '.join(differing)}). Expected learner.fit with "
                "the same arguments on all, and a folder for resume= that all of them see"
            )


BEGIN = (
    "the processes are about to train different weights: {}. Were they loaded or changed on some of them alone? "
    "Expected learner.load(file), and any change by hand, on every process"
)
"""What is said of weights that differ as a fit begins."""
APART = (
    "the weights of the processes have come apart in the epoch that has just ended: {}. Something in a step changes "
    "gradients or weights by random numbers, or by rows, of which each process has its own. Expected the same change "
    "on all: draws = True in a callback's class, a generator seeded alike in a phase, accelerator.all_gather, or "
    "Accelerator(seed_per_process=False)"
)
"""What is said of weights that differ as an epoch ends."""


def check_alike(group: Group, named: Named, said: str = BEGIN) -> None:
    """Raise where the processes do not have the same weights, to the bit.

    Args:
        group: The processes.
        named: Parameters.
        said: The message, with a place for names.

    Raises:
        ProcessError: Names some that differ.
    """
    named = [(name, tensor) for name, tensor in named if whole([tensor])]
    if not named:
        return
    sums = torch.stack([_sum_of_bits(tensor, said is BEGIN).to(group.device) for _, tensor in named])
    most = group.all_reduce(torch.cat([sums, -sums]), "max")
    bad = (most[: len(sums)] != -most[len(sums) :]).tolist()
    if any(bad):
        names = [name for (name, _), differs in zip(named, bad, strict=True) if differs]
        raise ProcessError(said.format(f"{', '.join(names[:3])}{', …' * (len(names) > 3)}"))


def _sum_of_bits(tensor: Tensor, places: bool) -> Tensor:
    """Return a number that depends on each bit of a tensor, and not on the order in which a device adds up.

    Args:
        tensor: The tensor.
        places: Whether it depends on where they stand too, which takes much longer.
    """
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().view(-1)
    if not places:
        octets = flat.view(torch.uint8)
        octets = octets.clone() if octets.storage_offset() % 8 else octets
        most = len(octets) // 8 * 8  # those of 64 bits are added up 50 times as fast as others
        return (octets[:most].view(torch.int64).sum() + octets[most:].long().sum()) & (2**62 - 1)
    bits = flat.view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.long, device=bits.device)
    for begin in range(0, len(bits), CHUNK):
        part = bits[begin : begin + CHUNK].long()
        factors = torch.arange(begin + 1, begin + len(part) + 1, device=bits.device) % 65521  # an exchange is seen
        total = (total + (part * factors).sum()) & (2**62 - 1)
    return total


def _digest(said: Any) -> str:
    return blake2b(repr(said).encode(), digest_size=8).hexdigest()
