"""Objects that accumulate by themselves, joined over processes: as if one had seen what all have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxloop.errors import warn_user


def keep_apart(metric: Any) -> None:
    """Have one of torchmetrics, and its parts, compute what it has seen here, rather than ask other processes."""
    for part in _parts(metric):
        if hasattr(part, "distributed_available_fn"):
            part.distributed_available_fn = _not_available


def _not_available() -> bool:
    """Say that there are no other processes."""
    return False


def merged(whole: Any, others: Sequence[Any]) -> bool:
    """Have an object take in what others of its class have seen; return whether it says how.

    Those of torchmetrics say for each of their states how it is reduced; wrappers and collections have such
    parts. Any other says so by ``merge_state(others)``, as torcheval's do.
    """
    if any(cls.__module__.split(".")[0] == "torchmetrics" for cls in type(whole).__mro__):
        for same in zip(*map(_parts, (whole, *others)), strict=True):
            _reduce(same)
        return True
    if callable(getattr(whole, "merge_state", None)):
        whole.merge_state(list(others))
        return True
    return False


def _parts(metric: Any) -> list[Any]:
    return list(metric.modules()) if isinstance(metric, nn.Module) else [metric]


def _reduce(same: Sequence[Any]) -> None:
    """Reduce the states of one metric in several processes, into the first, as torchmetrics does to join them."""
    first = same[0]
    own = vars(first)  # a wrapper shows the reductions and states of its part, which comes later
    for name, reduction in own.get("_reductions", {}).items():
        if name not in own:
            continue
        states = [getattr(part, name) for part in same]
        joined: Any
        if isinstance(states[0], Tensor):
            joined = torch.stack(states)
        else:
            joined = [value for state in states for value in (state if isinstance(state, list) else [state])]
        empty = isinstance(joined, list) and not joined
        setattr(first, name, joined if reduction is None or empty else reduction(joined))
    if hasattr(first, "_computed"):
        first._computed = None  # what it computed of its own rows


_told: set[str] = set()
"""Names of metrics of which it was said that they count the rows of one process alone."""


def tell_apart(name: str, metric: Any) -> None:
    """Warn once of an object that cannot take in what those of other processes have seen."""
    if name not in _told:
        _told.add(name)
        warn_user(
            f"the metric {name!r} counts the rows of the first process alone: its class, {type(metric).__name__}, does "
            "not say how to take in what others have seen. Write in it:\n"
            "    def merge_state(self, others):\n"
            "        for other in others:\n"
            "            self.total += other.total"
        )
