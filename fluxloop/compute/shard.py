"""What a user says of sharded parameters; what torch does about it is in `sharding`, loaded where it is needed."""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import define, field
from torch import nn

from fluxloop.errors import describe
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_plain, is_number


def _as_tuple(units: Any) -> Any:
    units = as_plain(units)
    return units if isinstance(units, tuple) else tuple(units) if isinstance(units, list) else (units,)


@fields_of_the_class
@define(frozen=True)
class Shard:
    """How parameters are sharded: ``Accelerator(strategy=Shard(units=Block))``; ``strategy="shard"`` is ``Shard()``.

    A *unit* is a part of a model whose parameters are gathered together when it begins to compute, and
    given up when it ends: the larger the units, the more memory and the fewer messages. What is in no unit
    is gathered with the model itself. A part that is called by itself (``model.encoder(xs)``) has to be one.
    In one process nothing is sharded.

    Args:
        units: Classes of modules, or names of parts as in ``learner.weights`` ("encoder", "G.blocks.*"); left out,
            the children of each model, or what `min_parameters` says.
        min_parameters: The smallest parts with at least so many parameters, that are in no smaller one, are units.
        replicas: In how many complete copies the parameters are held: 1, a number that divides that of the
            processes, or ``"nodes"``, a copy in each node, so that parameters are gathered inside of nodes alone.
        offload: Whether parameters, gradients and the optimizers' state are kept in the memory of the host.

    Raises:
        ValueError: Something else was given.

    Example:
        >>> block = torch.nn.TransformerEncoderLayer
        >>> accelerator = Accelerator("cpu", strategy=Shard(units=block, replicas="nodes"))
        >>> accelerator.strategy.units[0].__name__
        'TransformerEncoderLayer'
    """

    units: tuple[type[nn.Module] | str, ...] = field(default=(), converter=_as_tuple)
    min_parameters: int | None = field(default=None, kw_only=True)
    replicas: int | Literal["nodes"] = field(default=1, kw_only=True)
    offload: bool = field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        for unit in self.units:
            if not isinstance(unit, str) and not (isinstance(unit, type) and issubclass(unit, nn.Module)):
                raise ValueError(
                    f"Shard(units=...) was given {describe(unit)}; expected classes of modules, or names of parts: "
                    "Shard(units=(Block, 'head'))"
                )
        if self.units and self.min_parameters is not None:
            raise ValueError("Shard was given units and min_parameters, which both say what is a unit; expected one")
        least = self.min_parameters
        if least is not None and (not is_number(least, whole=True) or least < 1):
            raise ValueError(
                f"Shard(min_parameters={self.min_parameters!r}) was given; expected a whole number, such as 1_000_000"
            )
        replicas: Any = self.replicas
        if replicas != "nodes" and (not is_number(replicas, whole=True) or replicas < 1):
            raise ValueError(
                f"Shard(replicas={self.replicas!r}) was given; expected a whole number from 1, or 'nodes', a copy in "
                "each node"
            )
        if type(self.offload) is not bool:
            raise ValueError(f"Shard(offload={self.offload!r}) was given; expected True or False")

    def num_replicas(self, processes: int) -> int:
        """Return in how many copies the parameters are held.

        Raises:
            ValueError: The processes cannot be divided into so many.
        """
        if self.replicas == "nodes":
            replicas = processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        else:
            replicas = int(self.replicas)
        if replicas < 1 or processes % replicas:
            raise ValueError(
                f"Shard(replicas={self.replicas!r}) was given, and there are {processes} processes; expected a number "
                "that divides it"
            )
        return replicas
