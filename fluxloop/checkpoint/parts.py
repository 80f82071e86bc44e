"""Checkpoints of sharded tensors: a file of parts from each process, and an index that makes them one checkpoint.

The index is the checkpoint's own file, as any other is: plain data, in which each sharded tensor is a note of its type
and shape. It is written last, once all have said that their parts are on the disk. So a checkpoint whose index is there
is complete; parts without one are of a process that has died.

What is read is whole again, and goes into any number of processes, or into one.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import CheckpointError

State = dict[str, Any]

PARTS = "parts"
"""The entry of an index that lists the files of parts and the sharded tensors."""
NOTE = "sharded tensor"
"""The only entry of what stands in an index in the place of a sharded tensor: its number."""
PART_NAME = re.compile(r"(epoch-\d+-step-\d+-phase-\d+)\.parts-([0-9a-f]{8})-(\d+)-of-(\d+)\.pt")
"""The name of a file of parts: of which checkpoint, of which writing of it, and of which process."""


def is_sharded(value: Any) -> bool:
    """Return whether a value is a tensor of which each process holds a part."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return plain data with something else in the place of each sharded tensor; containers are new ones.

    Args:
        value: The data.
        change: Gives what takes the place of a tensor.
    """
    if is_sharded(value):
        return change(value)
    if type(value) in (dict, OrderedDict):
        made = type(value)((key, replaced(item, change)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(replaced(item, change) for item in value)
    return value


def has_sharded(value: Any) -> bool:
    """Return whether there is a sharded tensor in plain data."""
    if type(value) in (dict, OrderedDict):
        return any(map(has_sharded, value.values()))
    if type(value) in (list, tuple):
        return any(map(has_sharded, value))
    return is_sharded(value)


def made_whole(state: State, keep: bool = True) -> State:
    """Return plain data with whole tensors, on the CPU; all processes have to call this together.

    Args:
        state: The data, with sharded tensors in it.
        keep: Whether this process needs them; in others an empty tensor stands for each.
    """

    def gathered(tensor: Any) -> Tensor:
        whole: Tensor = tensor.detach().full_tensor()
        return whole.cpu() if keep else torch.empty(0, dtype=whole.dtype)

    made: State = replaced(state, gathered)
    return made


def taken_apart(state: State, names: list[str]) -> tuple[State, State]:
    """Return the index of a state, and the parts that this process writes.

    Args:
        state: With sharded tensors in it.
        names: Of the files of parts, one for each process.
    """
    notes: list[State] = []
    parts: State = {}

    def note(tensor: Any) -> State:
        number = len(notes)
        notes.append({"shape": tuple(tensor.shape), "dtype": tensor.dtype})
        begin = begin_of(tensor)
        if begin is not None:
            parts[str(number)] = {"begin": begin, "tensor": tensor.detach().to_local().cpu()}
        return {NOTE: number}

    index = replaced(state, note)
    index[PARTS] = {"files": names, "tensors": notes}
    return index, {"parts of": names, "parts": parts}


def begin_of(tensor: Any) -> tuple[int, ...] | None:
    """Return where in a sharded tensor this process's part begins; None where another process has the same part."""
    begin = [0] * tensor.ndim
    coordinate = tensor.device_mesh.get_coordinate()
    for place, placement, number in zip(coordinate, tensor.placements, tensor.device_mesh.shape, strict=True):
        if placement.is_shard():
            length = tensor.shape[placement.dim]
            begin[placement.dim] = min(place * -(-length // number), length)
        elif place:
            return None
    return tuple(begin)


def put_together(path: Path, index: State, read: Callable[[Path], State]) -> State:
    """Return a state with whole tensors, from its index and the files of parts beside it.

    Args:
        path: That of the index.
        index: What is in it.
        read: Reads a file of parts, and looks whether it is as it was written.

    Raises:
        CheckpointError: A file is not there, is damaged, or belongs to another checkpoint; or an element is in none.
    """
    told = index[PARTS]
    wholes = [torch.empty(note["shape"], dtype=note["dtype"]) for note in told["tensors"]]
    missing = [whole.numel() for whole in wholes]
    for name in told["files"]:
        file = path.with_name(name)
        if not file.is_file():
            raise CheckpointError(f"the checkpoint {path} has parts in {name}, which is not there")
        held = read(file)
        if held.get("parts of") != told["files"]:
            raise CheckpointError(f"{file} has parts of another checkpoint than {path}")
        for number, part in held["parts"].items():
            whole, tensor = wholes[int(number)], part["tensor"]
            ends = zip(part["begin"], tensor.shape, strict=True)
            whole[tuple(slice(begin, begin + length) for begin, length in ends)].copy_(tensor)
            missing[int(number)] -= tensor.numel()
    if any(missing):
        raise CheckpointError(f"the checkpoint {path} has tensors of which parts are in none of its files")

    def found(value: Any) -> Any:
        if type(value) in (dict, OrderedDict):
            if list(value) == [NOTE]:
                return wholes[value[NOTE]]
            return type(value)((key, found(item)) for key, item in value.items())
        return type(value)(map(found, value)) if type(value) in (list, tuple) else value

    state: State = found({key: value for key, value in index.items() if key != PARTS})
    return state


def names_of_parts(name: str, token: str, processes: int) -> list[str]:
    """Return the names of the files of parts of a checkpoint.

    Args:
        name: Of the checkpoint.
        token: Tells this writing of it from others.
        processes: How many write.

    >>> names_of_parts("epoch-0003-step-00000120-phase-1.pt", "0a1b2c3d", 2)[1]
    'epoch-0003-step-00000120-phase-1.parts-0a1b2c3d-2-of-2.pt'
    """
    stem = name.removesuffix(".pt")
    return [f"{stem}.parts-{token}-{rank + 1}-of-{processes}.pt" for rank in range(processes)]


def parts_of(folder: Path, name: str) -> Iterable[Path]:
    """Yield the files of parts of a checkpoint that are in a folder, of whichever writing."""
    stem = name.removesuffix(".pt")
    for entry in folder.glob(f"{stem}.parts-*.pt"):
        found = PART_NAME.fullmatch(entry.name)
        if found is not None and found[1] == stem:
            yield entry


def remove_orphans(folder: Path) -> None:
    """Remove files of parts whose checkpoint has no index."""
    for entry in folder.glob("*.parts-*.pt"):
        found = PART_NAME.fullmatch(entry.name)
        if found is not None and not (folder / f"{found[1]}.pt").exists():
            entry.unlink(missing_ok=True)
