"""Which tensors of a model and of its average belong together, remembered while both hold the same ones."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from fluxloop.errors import ModelError

HELD = attrgetter("_parameters", "_buffers", "_modules")
DTYPE = attrgetter("dtype")


@frozen(eq=False)
class Paired:
    """Parameters, or buffers, of an average with the live ones of their names.

    Args:
        moved: Those of the average that are moved.
        towards: Of each, the live one.
        whole: Pairs of what has no mean, such as counts.
        one_type: Whether those to be moved and the live ones are of the same type, each.
    """

    moved: list[Tensor]
    towards: list[Tensor]
    whole: list[tuple[Tensor, Tensor]]
    one_type: bool

    def move(self, share: float | Tensor) -> None:
        """Move the average; without gradients.

        Args:
            share: How far, 0 to 1; 1 copies the live ones. A scalar tensor is not looked at.
        """
        copied = self.whole
        if not isinstance(share, Tensor) and share == 1:
            copied = [*copied, *zip(self.moved, self.towards, strict=True)]
        for average, live in copied:
            average.copy_(live)
        if len(copied) > len(self.whole) or not self.moved:
            return
        towards = self.towards
        if not self.one_type:
            towards = [live.to(average.dtype) for average, live in zip(self.moved, towards, strict=True)]
        if isinstance(share, Tensor):
            for average, live in zip(self.moved, towards, strict=True):
                _lerp_by_tensor(average, live, share)
        else:
            torch._foreach_lerp_(self.moved, towards, share)  # one kernel for all, and the bits of swa_utils


def paired(averages: dict[str, Tensor], live: dict[str, Tensor], whose: str) -> Paired:
    """Pair tensors by their names.

    Args:
        averages: Those of the average.
        live: The live ones.
        whose: What computes the average, for the message.

    Raises:
        ModelError: Only one of the two has one of the names.
    """
    if averages.keys() != live.keys():
        raise ModelError(
            f"{whose} cannot average {sorted(averages.keys() ^ live.keys())}: only one of the two, the model and its "
            "average, has them; expected parameters and buffers that stay those of the first step"
        )
    moved = {name: each for name, each in averages.items() if each.is_floating_point() or each.is_complex()}
    return Paired(
        [*moved.values()],
        [live[name] for name in moved],
        [(each, live[name]) for name, each in averages.items() if name not in moved],
        all(each.dtype is live[name].dtype for name, each in moved.items()),
    )


def _lerp_by_tensor(average: Tensor, live: Tensor, weight: Tensor) -> None:
    """Move an average as torch does by a number: a weight is never rounded to 16 bits."""
    if average.is_floating_point() and average.itemsize < 4:
        average.copy_(torch.lerp(average.float(), live.float(), weight.float()))
    else:
        average.lerp_(live, weight.to(average.dtype))


class Pairs:
    """Moves an average of weights towards the live ones, step after step.

    To name them anew, as torch does by a walk through both modules, takes longer in a small model than to move them. So
    what was found is remembered, and who stands where is compared: in C, without a call for each.
    """

    def __init__(self) -> None:
        self._of: tuple[nn.Module, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Pairs:
        """Return a new one: a copied average is another module."""
        return Pairs()

    def move(self, average: nn.Module, live: nn.Module, weight: float, buffers: float, whose: str) -> None:
        """Move an average towards the live weights; see `fluxloop.compute.models.move_towards`.

        Raises:
            ModelError: Only one of the two modules has one of the parameters or buffers.
        """
        if not self._is_known(average, live) or (buffers and self._buffers is None):
            self._find(average, live, bool(buffers), whose)
        with torch.no_grad():
            self._parameters.move(weight)
            if buffers and self._buffers is not None:
                self._buffers.move(buffers)

    def _is_known(self, average: nn.Module, live: nn.Module) -> bool:
        """Return whether both modules hold the very tensors that were found, of the types that they had.

        Lengths are compared first, since `map` ends with the shorter one.
        """
        if self._of is None or self._of[0] is not average or self._of[1] is not live:
            return False
        return (
            all(map(is_, chain.from_iterable(map(HELD, self._modules)), self._dicts))
            and [*map(len, self._dicts)] == self._lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values))
            and [*map(DTYPE, self._tensors)] == self._types
        )

    def _find(self, average: nn.Module, live: nn.Module, buffers_too: bool, whose: str) -> None:
        self._of = None
        self._parameters = paired(dict(average.named_parameters()), dict(live.named_parameters()), whose)
        self._buffers = (
            paired(dict(average.named_buffers()), dict(live.named_buffers()), whose) if buffers_too else None
        )
        self._modules = [*average.modules(), *live.modules()]
        self._dicts: list[dict[str, Any]] = [*chain.from_iterable(map(HELD, self._modules))]
        self._lengths = [*map(len, self._dicts)]
        self._values = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._types = [*map(DTYPE, self._tensors)]
        self._of = average, live
