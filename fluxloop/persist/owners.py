"""Who keeps a value that a walk comes upon: what belongs to somebody else is written as that one's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.errors import CheckpointError
from fluxloop.nested import local_part


class Owners:
    """Knows what somebody else keeps: models and their parts, optimizers, callbacks, phases, data.

    Args:
        names: What belongs to somebody, by its name; "" where it has none.
        places: Where the memory of models' tensors begins: any tensor there is theirs.
        kinds: Types of which everything belongs to somebody.
    """

    def __init__(
        self, named: Iterable[tuple[str, Any]] = (), places: Iterable[int] = (), kinds: tuple[type, ...] = ()
    ) -> None:
        self._kinds = kinds
        self._named = list(named)
        self._names = {id(value): name for name, value in reversed(self._named)}  # the first name counts
        self._places = frozenset(places)

    def __call__(self, value: Any) -> str | None:
        """Return the name of a value that somebody else keeps, "" where it has none, None for others."""
        name = self._names.get(id(value))
        if name is None and self._places and isinstance(value, Tensor) and value.layout is torch.strided:
            theirs = (
                not is_lazy(value) and value.numel() and local_part(value).untyped_storage().data_ptr() in self._places
            )
            return "" if theirs else None
        return "" if name is None and isinstance(value, self._kinds) else name

    def find(self, name: str, path: str) -> Any:
        """Return what has a name.

        Raises:
            CheckpointError: Nothing has it now.
        """
        for known, value in self._named:
            if known == name:
                return value
        raise CheckpointError(f"the checkpoint has {name} as {path}, and there is no {name} now; make it as it was")


nobody = Owners()
"""Where everything belongs to what is walked."""

of_learners: WeakSet[nn.Module] = WeakSet()
"""The parts of all models, which data sets may use."""


class ModelsApart(Owners):
    """Knows that learners keep their models."""

    def __call__(self, value: Any) -> str | None:
        """Return the empty text for a part of a learner's model, None for anything else."""
        return "" if isinstance(value, nn.Module) and value in of_learners else None


models_apart = ModelsApart()


@frozen
class Restoring:
    """What is to be known where a state is restored.

    Args:
        owners: Find what somebody else keeps.
        begun: Whether what begins with a fit has begun. Where it has not, an object that callbacks make then need not
            be there, and its state is skipped.
        running: Whether a fit that is resumed has just made its objects again: what no checkpoint holds is left as it
            is.
        phases: The phase types that there are.
        device: Where tensors belong that were on a device.
    """

    owners: Owners = nobody
    begun: bool = True
    running: bool = False
    phases: tuple[type, ...] = ()
    device: torch.device | None = None
