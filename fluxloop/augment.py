"""Several views of one row: for a dataset, or for a batch that is already on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset

from fluxloop.errors import DataError, describe
from fluxloop.guard.given import called, check_called, number

Transform = Callable[[Any], Any]


def draws_once(transform: Any) -> bool:
    """Return whether a transform draws once for all that it is called with: torchvision's do, and chains of them.

    Example:
        >>> draws_once(random_affine)  # it draws for each row
        False
    """
    if isinstance(transform, nn.Sequential):
        return any(map(draws_once, transform))
    return f"{type(transform).__module__}.".startswith("torchvision.")


def _view(transform: Transform, xs: Any, per_row: bool | None) -> Any:
    """Make a view of a batch or a row, see `TwoViews`."""
    if per_row is None:
        per_row = isinstance(xs, Tensor) and xs.ndim == 4 and draws_once(transform)
    if not per_row:
        return transform(xs)
    if not isinstance(xs, Tensor) or not xs.ndim:
        raise DataError(f"views were to be made row by row of {describe(xs)}; expected a tensor of shape (N, …)")
    return torch.stack([transform(row) for row in xs])


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
            torchvision's transforms, alone and in ``nn.Sequential``; say True for functions that call these.

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

    def __call__(self, xs: Any) -> tuple[Any, Any]:
        """Return the two views."""
        second = self.transform if self.second is None else self.second
        return _view(self.transform, xs, self.per_row), _view(second, xs, self.per_row)


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
        >>> large, small = (partial(random_affine, scale=(1.0, 3.0), size=size) for size in (8, 4))
        >>> [tuple(crop.shape) for crop in MultiCrop(large, small, num_local=2)(torch.rand(16, 3, 12, 12))]
        [(16, 3, 8, 8), (16, 3, 8, 8), (16, 3, 4, 4), (16, 3, 4, 4)]
    """

    global_crop: Transform = field(validator=called("a function that makes a crop"))
    local_crop: Transform = field(validator=called("a function that makes a crop"))
    num_local: int = field(default=4, validator=number(least=0, whole=True))
    num_global: int = field(default=2, validator=number(least=1, whole=True))
    per_row: bool | None = field(default=None, kw_only=True)

    def __call__(self, xs: Any) -> tuple[Any, ...]:
        """Return all crops."""
        crops = [self.global_crop] * self.num_global + [self.local_crop] * self.num_local
        return tuple(_view(crop, xs, self.per_row) for crop in crops)


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


def random_affine(
    images: Tensor,
    *,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    size: int | None = None,
) -> Tensor:
    """Turn, move and scale each image by an amount of its own, drawn evenly.

    With a scale above 1 it shows a part of the image, enlarged: a random crop.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image.
        degrees: Largest angle, to either side.
        translate: Largest shift to either side, as a share of the image's size.
        scale: Smallest and largest factor.
        size: Height and width of the result; left out, the images'.

    Returns:
        Shape (N, C, size, size) or (C, size, size); what comes from outside is 0.

    Raises:
        TypeError: The images are of whole numbers.

    Example:
        >>> images = torch.rand(8, 1, 12, 12)
        >>> random_affine(images, degrees=15, translate=0.1, scale=(0.9, 1.2), size=6).shape
        torch.Size([8, 1, 6, 6])
    """
    if images.ndim == 3:
        batch = images.unsqueeze(0)
        return random_affine(batch, degrees=degrees, translate=translate, scale=scale, size=size).squeeze(0)
    if not images.is_floating_point():
        raise TypeError(f"random_affine was given images of {images.dtype}; expected floating point: images.float()")
    n, device = len(images), images.device
    angle, factor, dx, dy = torch.rand(4, n, device=device, dtype=images.dtype)
    angle = (2 * angle - 1) * math.radians(degrees)
    factor = scale[0] + (scale[1] - scale[0]) * factor
    cos, sin = angle.cos() / factor, angle.sin() / factor
    right, down = (2 * (2 * move - 1) * translate for move in (dx, dy))
    tall, wide = images.shape[2:]  # the map is in shares of each side: an angle is not, where they differ
    rows = [cos, -sin * tall / wide, right, sin * wide / tall, cos, down]
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    height, width = (size, size) if size is not None else (tall, wide)
    grid = affine_grid(theta, [n, images.shape[1], height, width], align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def add_noise(images: Tensor, deviation: float) -> Tensor:
    """Add normal noise.

    Args:
        images: Any shape.
        deviation: Standard deviation, in the images' units.

    Example:
        >>> add_noise(torch.zeros(2, 1, 4, 4), 0.1).shape
        torch.Size([2, 1, 4, 4])
    """
    return images + deviation * torch.randn_like(images)
