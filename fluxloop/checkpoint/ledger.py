"""What checkpoints keep of a learner beside its tensors and counts, and which warnings it has given of that."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from torch import nn

from fluxloop.persist.walk import Walk
from fluxloop.persist.watched import Watched


@define(eq=False)
class Ledger:
    """What checkpoints keep of a learner beside its tensors and counts.

    Args:
        modules: By model, and by loss function that is one: attributes of its parts that are no parameters, buffers
            or parts.
        loss: The loss function, where it is no module.
        phases: The phases that have run.
        waiting: Loaded states of phases that have not run yet, by class and name.
        loaded: Whether a state was loaded: phases of which it has none begin as they were first used.
        begun_data: Keys of the data that a fit has run on.
        told_lengths: Data of which it was said that an epoch has not as many batches as its length says.
        told_lost: The paths of which it was said that no checkpoint keeps them.
    """

    modules: dict[nn.Module, Walk] = field(factory=dict)
    loss: Watched | None = None
    phases: list[Watched] = field(factory=list)
    waiting: dict[str, list[Any]] = field(factory=dict)
    loaded: bool = False
    begun_data: set[str] = field(factory=set)
    told_lengths: set[str] = field(factory=set)
    told_lost: set[str] = field(factory=set)
