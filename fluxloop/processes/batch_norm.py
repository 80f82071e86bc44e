"""Batch norm over the rows of all processes, on any device; torch's own takes tensors of GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from fluxloop.errors import CompileError, ModelError, describe
from fluxloop.processes.gather import Rows, all_gather
from fluxloop.processes.group import Group, current

if TYPE_CHECKING:
    Base = _BatchNorm
else:
    Base = object

_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Have each process see its own rows alone meanwhile, as where they do not run the same number of batches."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


class SynchronisedBatchNorm(Base):
    """What `synchronise_batch_norm` makes of a batch norm, beside the class that it had.

    In train mode means and variances are those of the rows of all processes that train together, of which each
    may have another number, and so are gradients, second derivatives too: what one process computes on the joined
    batch. Running statistics are the same in all processes. In eval mode, and where one process trains alone, it is the
    class that it was.

    Example:
        >>> norm = synchronise_batch_norm(torch.nn.BatchNorm2d(8))
        >>> isinstance(norm, SynchronisedBatchNorm), isinstance(norm, torch.nn.BatchNorm2d)
        (True, True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch, of shape (N, C) or (N, C, ...).

        Raises:
            ValueError: There is one value alone for each channel, of all processes.
            CompileError: The step is to be one graph.
        """
        group = current()
        if group is None or _apart or not self.training:
            return super().forward(input)
        if type(input).__name__ == "FakeTensor":  # traced: a graph would keep whether the batch was a spare one
            raise CompileError(
                "batch norm that is synchronised over processes cannot be part of one graph: each step asks how many "
                "rows there are. Say compiled = False in the phase's class, or use compile='model'"
            )
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch has no types there
        xs = input if input.dtype == torch.float64 else input.float()
        mean, variance, total = _statistics(xs, group)
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach(), total)
        shape = [1, -1] + [1] * (xs.ndim - 2)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        normalised = (xs - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            normalised = normalised + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch does: the variance without bias."""
        share = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain average
                share = 1.0 / float(self.num_batches_tracked)
        for running, now in ((self.running_mean, mean), (self.running_var, variance * total / (total - 1))):
            if running is not None:
                running.lerp_(now.to(running.dtype), share)


def _statistics(xs: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (with bias) of each channel over all processes, and how many values that is.

    Each tells its own in one message. A batch that is spare counts nothing.

    Raises:
        ValueError: It is one value alone.
    """
    channels = xs.shape[1]
    own_variance, own_mean = torch.var_mean(xs, [0, *range(2, xs.ndim)], correction=0)
    count = own_mean.new_tensor([0 if group.spare else xs.numel() // channels])
    told = all_gather(torch.cat([own_mean, own_variance, count])[None], group, Rows((1,) * group.size, group.rank))
    means, variances, counts = torch.split(told, [channels, channels, 1], dim=1)
    counts = counts.detach()
    total = counts.sum()
    if total.is_cpu and total <= 1:  # another device would be waited for
        raise ValueError(
            f"expected more than one value for each channel of all processes when training, got input of "
            f"{tuple(xs.shape)}: give batches of two rows or more, or drop_last=True"
        )
    shares = counts / total
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


class SynchronisedBatchNorm1d(SynchronisedBatchNorm, nn.BatchNorm1d):
    """A `SynchronisedBatchNorm` of rows, or of series."""


class SynchronisedBatchNorm2d(SynchronisedBatchNorm, nn.BatchNorm2d):
    """A `SynchronisedBatchNorm` of images."""


class SynchronisedBatchNorm3d(SynchronisedBatchNorm, nn.BatchNorm3d):
    """A `SynchronisedBatchNorm` of volumes."""


_made: dict[type, type[_BatchNorm]] = {
    nn.BatchNorm1d: SynchronisedBatchNorm1d,
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
}
"""By the class that it was, that of what is synchronised; those of subclasses are made when they are met."""


def _synchronised(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return the class that is synchronised and else the same."""
    if cls not in _made:
        _made[cls] = type(f"Synchronised{cls.__name__}", (SynchronisedBatchNorm, cls), {"__module__": cls.__module__})
    return _made[cls]


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Have each batch norm of a model see the rows of all processes that train together.

    The modules stay the same objects, of their classes (each gets a subclass), with their parameters, buffers, hooks
    and names in ``state_dict``: before or after an optimizer is made, and with weights that were trained without. One
    process that trains alone, and eval mode, are as before.

    Args:
        model: The model, or a batch norm itself; it is changed in place.

    Returns:
        The model.

    Raises:
        ModelError: It has no batch norm, or one that cannot be changed: lazy, or with a `forward` of its own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> synchronise_batch_norm(model) is model, isinstance(model[1], SynchronisedBatchNorm)
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"synchronise_batch_norm was given {describe(model)}; expected a module: a model of yours")
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, _BatchNorm)]
    todo = [(name, part) for name, part in found if not isinstance(part, SynchronisedBatchNorm)]
    if not found:
        raise ModelError(f"synchronise_batch_norm was given {describe(model)}, which has no batch norm")
    for name, part in todo:
        if isinstance(part, _LazyNormBase):
            raise ModelError(f"{name!r} is lazy; run a batch through the model first: model(xs)")
        if type(part).forward is not _BatchNorm.forward:
            raise ModelError(
                f"{name!r} is a {type(part).__name__}, whose forward is its own; expected one of torch's BatchNorm1d, "
                "BatchNorm2d and BatchNorm3d, or a subclass that leaves forward as it is"
            )
    for _, part in todo:
        part.__class__ = _synchronised(type(part))
    return model
