"""Several views of one row: for a dataset, or for a batch that is already on the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.utils.data import Dataset

from fluxloop.errors import DataError, describe, warn_user
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import called, check_called, number

Transform = Callable[[Any], Any]


def draws_once(transform: Any) -> bool:
    """Return whether a transform draws once for all that it is called with: torchvision's do, and chains of them.

    Example:
        >>> draws_once(lambda images: images.flip(-1))
        False
    """
    if isinstance(transform, nn.Sequential):
        return any(map(draws_once, transform))
    if isinstance(transform, partial):
        return draws_once(transform.func)
    kind = transform if isinstance(transform, type) else type(transform)
    return f"{kind.__module__}.".startswith("torchvision.")


def tell_that_it_draws_once(name: str, transform: Any) -> None:
    """Warn of a transform that is called with a batch and draws once for all of it.

    Args:
        name: Of what it was given to.
        transform: What was given.
    """
    if draws_once(transform):
        warn_user(
            f"{name} was given a transform of torchvision, which draws once for a whole batch, so that all rows are "
            "changed alike; expected one that draws for each row, such as those of fluxloop.augment, or "
            "lambda rows: torch.stack([transform(row) for row in rows])"
        )


def may_draw_once(transform: Any) -> bool:
    """Return whether a function, or an object that can be called, has or names something that draws once.

    Such a function may call it with each row in turn, so that only its author knows.
    """
    if draws_once(transform):
        return False  # it is known
    function = transform
    held: list[Any] = []
    if not isinstance(transform, FunctionType):
        function = type(transform).forward if isinstance(transform, nn.Module) else type(transform).__call__
        held = [*getattr(transform, "__dict__", {}).values(), *getattr(transform, "_modules", {}).values()]
    if isinstance(function, FunctionType):
        names, used = function.__code__.co_names, inspect.getclosurevars(function)
        held += [*used.nonlocals.values(), *used.globals.values()]
        modules = [each for each in held if isinstance(each, ModuleType)]
        held += [vars(module)[name] for module in modules for name in names if name in vars(module)]
    return any(draws_once(each) for each in held if not isinstance(each, (FunctionType, ModuleType)))


def _views_of(xs: Any, transforms: Sequence[Transform], maker: TwoViews | MultiCrop) -> tuple[Any, ...]:
    """Make a view of a batch or a row by each transform, see `TwoViews`."""
    is_batch = isinstance(xs, Tensor) and xs.ndim == 4
    if maker.per_row is None and maker._unsure and is_batch:
        name = type(maker).__name__
        warn_user(
            f"{name} was given a function that uses a transform of torchvision, which draws once for a whole batch, so "
            f"that all rows get the same crop, flip and colour; expected one that draws for each row. Say "
            f"{name}(..., per_row=True) to have it called with each row, or per_row=False if it draws for each itself"
        )
        object.__setattr__(maker, "_unsure", False)  # said once
    return tuple(
        _view(each, xs, maker.per_row if maker.per_row is not None else is_batch and draws_once(each))
        for each in transforms
    )


def _view(transform: Transform, xs: Any, per_row: bool) -> Any:
    if not per_row:
        return transform(xs)
    if not isinstance(xs, Tensor) or not xs.ndim:
        raise DataError(f"views were to be made row by row of {describe(xs)}; expected a tensor of shape (N, …)")
    return torch.stack([transform(row) for row in xs])


@fields_of_the_class
@frozen
class TwoViews:
    """Make two views of what it is called with, each by a transform of its own draw.

    For a phase it makes the views of a batch on the device, ``SimCLRPhase(TwoViews(augment))``; for
    a `ViewDataset` those of one row.

    Args:
        transform: Makes a view; draws random numbers. Of a batch it draws for each row: functions such as
            ``random_affine`` do, torchvision's transforms draw once for the whole batch.
        second: Makes the second one, where it differs (BYOL's pair of distributions).
        per_row: Whether a batch is given to the transforms row by row. Left out: images (N, C, H, W) are given so to
            torchvision's transforms, alone and in ``nn.Sequential``; of a function that uses these it is not known, and
            a warning asks you to say it.

    Raises:
        DataError: Row by row was asked for, and it is called with no tensor.

    Example:
        >>> views = TwoViews(lambda images: images + torch.randn_like(images))
        >>> first, second = views(torch.zeros(8, 1, 4, 4))
        >>> first.shape, torch.equal(first, second)
        (torch.Size([8, 1, 4, 4]), False)
    """

    transform: Transform = field(validator=called("a function that makes a view"))
    second: Transform | None = None
    per_row: bool | None = field(default=None, kw_only=True)
    _unsure: bool = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_unsure", may_draw_once(self.transform) or may_draw_once(self.second))

    def __call__(self, xs: Any) -> tuple[Any, Any]:
        """Return the two views."""
        first, second = _views_of(xs, (self.transform, self.transform if self.second is None else self.second), self)
        return first, second


@fields_of_the_class
@frozen
class MultiCrop:
    """Make global and local crops of what it is called with, the global ones first.

    SwAV's and DINO's views (Caron et al., 2020, 2021), for a phase or a `ViewDataset`.

    Args:
        global_crop: Makes a crop that shows most of an image.
        local_crop: Makes one that shows a small part of it, and may be smaller.
        num_local: How many local crops.
        num_global: How many global crops.
        per_row: Whether a batch is given to the transforms row by row; see `TwoViews`.

    Raises:
        DataError: Row by row was asked for, and it is called with no tensor.

    Example:
        >>> from functools import partial
        >>> from fluxloop.augment import random_affine
        >>> large, small = (partial(random_affine, scale=(1.0, 3.0), size=size) for size in (8, 4))
        >>> [tuple(crop.shape) for crop in MultiCrop(large, small, num_local=2)(torch.rand(16, 3, 12, 12))]
        [(16, 3, 8, 8), (16, 3, 8, 8), (16, 3, 4, 4), (16, 3, 4, 4)]
    """

    global_crop: Transform = field(validator=called("a function that makes a crop"))
    local_crop: Transform = field(validator=called("a function that makes a crop"))
    num_local: int = field(default=4, validator=number(least=0, whole=True))
    num_global: int = field(default=2, validator=number(least=1, whole=True))
    per_row: bool | None = field(default=None, kw_only=True)
    _unsure: bool = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_unsure", may_draw_once(self.global_crop) or may_draw_once(self.local_crop))

    def __call__(self, xs: Any) -> tuple[Any, ...]:
        """Return all crops."""
        return _views_of(xs, [self.global_crop] * self.num_global + [self.local_crop] * self.num_local, self)


class ViewDataset(Dataset[Any]):
    """A dataset of several views of another's rows: ``(views, label)``, or ``views`` where there is none.

    A loader over it gives the batches that phases such as `SimCLRPhase` take without `views`.

    Args:
        dataset: A map-style dataset of rows ``x`` or ``(x, label, ...)``, or tensors in a tuple.
        views: Makes the views of one row, such as ``TwoViews(augment)``.

    Raises:
        DataError: The dataset has no rows to be asked for by number.

    Example:
        >>> images, labels = torch.rand(10, 1, 4, 4), torch.arange(10)
        >>> rows = ViewDataset((images, labels), TwoViews(lambda image: image + torch.randn_like(image)))
        >>> (first, second), label = rows[3]
        >>> len(rows), first.shape, int(label)
        (10, torch.Size([1, 4, 4]), 3)
    """

    def __init__(self, dataset: Any, views: Callable[[Any], tuple[Any, ...]]) -> None:
        check_called("ViewDataset", "views", views, "what makes the views of a row: TwoViews(augment)")
        if isinstance(dataset, tuple):
            dataset = torch.utils.data.TensorDataset(*dataset)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"ViewDataset was given {describe(dataset)}; expected a dataset with __getitem__ and __len__. For "
                "batches give the phase what makes the views: SimCLRPhase(views=TwoViews(augment))"
            )
        self.dataset = dataset
        if isinstance(views, (TwoViews, MultiCrop)) and views.per_row is None:
            views = evolve(views, per_row=False)  # it is called with one row
        self.views = views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        if not isinstance(row, (tuple, list)):
            return self.views(row)
        views = self.views(row[0])
        return (views, *row[1:]) if len(row) > 1 else views
