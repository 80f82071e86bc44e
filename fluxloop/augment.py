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
from fluxloop.guard.given import called, check_called, check_number, number

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


Masks = Callable[[int, tuple[int, int], torch.device], Tensor]
"""What draws masks: of so many images with a grid of so many patches in height and width, on a device; (N, L)."""


def _spread(value: float | tuple[float, float]) -> tuple[float, float]:
    """Return the smallest and the largest of what is drawn evenly; one number is both."""
    return value if isinstance(value, tuple) else (value, value)


def _shares(least: float = 0.0, most: float = 1.0) -> Callable[[Any, Any, Any], None]:
    """Make a validator of a field: a number in a range, or a pair of them, the smaller first."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        kind, name = type(instance).__name__, attribute.name
        pair = value if isinstance(value, tuple) else (value, value)
        if len(pair) != 2:
            raise ValueError(f"{kind}({name}={value!r}) was given; expected a number, or the smallest and the largest")
        for each in pair:
            check_number(kind, name, each, least=least, most=most)
        if pair[0] > pair[1]:
            raise ValueError(f"{kind}({name}={value!r}) was given; expected the smaller number first")

    return validate


@frozen
class RandomMasks:
    """Hide patches here and there, a share of each image: masks of iBOT, MSN and DINOv2.

    Args:
        share: Share of an image's patches, from 0 to 1; of a pair, one is drawn for each image evenly in between.
        unmasked: Share of the images of which nothing is hidden, drawn for each image.

    Example:
        >>> RandomMasks(0.25)(3, (4, 4), torch.device("cpu")).sum(1)
        tensor([4, 4, 4])
    """

    share: float | tuple[float, float] = field(default=0.3, validator=_shares())
    unmasked: float = field(default=0.0, kw_only=True, validator=number(least=0, most=1))

    def __call__(self, n: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return True where a patch is hidden, shape (N, L)."""
        count = grid[0] * grid[1]
        least, most = _spread(self.share)
        shares, whole = torch.rand(2, n, 1, device=device)
        hidden = ((least + (most - least) * shares) * count).round() * (whole >= self.unmasked)
        mask: Tensor = torch.rand(n, count, device=device).argsort(1).argsort(1) < hidden
        return mask


@frozen
class BlockMasks:
    """Hide rectangles of each image, which may overlap: masks of BEiT and data2vec.

    Args:
        blocks: How many rectangles in each image.
        share: Share of the patches that one covers; of a pair, one is drawn for each evenly in between.
        ratio: Height by width, drawn so that its logarithm is even.

    Example:
        >>> BlockMasks(1, share=0.25, ratio=1.0)(3, (4, 4), torch.device("cpu")).sum(1)
        tensor([4, 4, 4])
    """

    blocks: int = field(default=5, validator=number(least=1, whole=True))
    share: float | tuple[float, float] = field(default=(0.1, 0.25), kw_only=True, validator=_shares())
    ratio: float | tuple[float, float] = field(default=(0.3, 3.3), kw_only=True, validator=_shares(1e-3, 1e3))

    def __call__(self, n: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return True where a patch is hidden, shape (N, L)."""
        (small, large), (flat, tall) = _spread(self.share), _spread(self.ratio)
        share, ratio, *corner = torch.rand(4, n, self.blocks, 1, device=device)
        area = (small + (large - small) * share) * grid[0] * grid[1]
        ratio = torch.exp(math.log(flat) + (math.log(tall) - math.log(flat)) * ratio)
        inside = []
        for side, length, begin in zip(grid, ((area * ratio).sqrt(), (area / ratio).sqrt()), corner, strict=True):
            length = length.round().clamp(1, side)
            first = (begin * (side - length + 1)).floor()
            places = torch.arange(side, device=device)
            inside.append((places >= first) & (places < first + length))
        mask: Tensor = (inside[0].unsqueeze(3) & inside[1].unsqueeze(2)).any(1).flatten(1)
        return mask


@frozen
class MultiBlock:
    """Draw blocks to be predicted and a context without them: the masks of I-JEPA (Assran et al., 2023).

    The blocks have one size for all images of a batch, and a place of their own in each; the context is one large block
    less these. Contexts are cut to the shortest one, as in the authors' code, so that they make one tensor.

    Args:
        blocks: How many blocks in each image.
        share: Share of the patches that a block covers, drawn for each batch evenly in between.
        ratio: Height by width of a block, drawn for each batch.
        context: Share of the patches that the context covers before the blocks are taken out; it is square.
        least: How many patches the context has to have: it is drawn anew, up to 20 times, where it has fewer.

    Raises:
        DataError: The blocks leave nothing of an image.

    Example:
        >>> context, blocks = MultiBlock(share=0.25, ratio=1.0, least=1)(3, (8, 8), torch.device("cpu"))
        >>> blocks.shape
        torch.Size([3, 4, 16])
    """

    blocks: int = field(default=4, validator=number(least=1, whole=True))
    share: float | tuple[float, float] = field(default=(0.15, 0.2), kw_only=True, validator=_shares())
    ratio: float | tuple[float, float] = field(default=(0.75, 1.5), kw_only=True, validator=_shares(1e-3, 1e3))
    context: float | tuple[float, float] = field(default=(0.85, 1.0), kw_only=True, validator=_shares())
    least: int = field(default=10, kw_only=True, validator=number(least=1, whole=True))

    def __call__(self, n: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the places of the context, shape (N, K), and of the blocks, shape (N, B, T), from 0, row by row."""
        longest: tuple[Tensor, Tensor] | None = None
        for _ in range(20):
            drawn = self._draw(n, grid)
            if longest is None or drawn[0].shape[1] > longest[0].shape[1]:
                longest = drawn
            if longest[0].shape[1] >= self.least:
                break
        if longest is None or not longest[0].shape[1]:
            raise DataError(
                f"{self} left nothing of an image of {grid[0]} x {grid[1]} patches as a context; expected fewer or "
                "smaller blocks: MultiBlock(2, share=0.15)"
            )
        return longest[0].to(device), longest[1].to(device)

    def _draw(self, n: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Draw once; on the host, as the length of the context has to be known there."""
        wide = grid[1]
        blocks = _places(*self._size(grid, self.share, self.ratio), n, self.blocks, grid)
        context = _places(*self._size(grid, self.context, 1.0), n, 1, grid)[:, 0]
        seen = torch.zeros(n, grid[0] * wide, dtype=torch.bool).scatter_(1, context, True)
        seen.scatter_(1, blocks.flatten(1), False)
        shortest = int(seen.sum(1).min())
        return seen.int().argsort(dim=1, descending=True, stable=True)[:, :shortest], blocks

    @staticmethod
    def _size(grid: tuple[int, int], share: Any, ratio: Any) -> tuple[int, int]:
        """Draw a height and a width."""
        (small, large), (flat, tall) = _spread(share), _spread(ratio)
        first, second = torch.rand(2).tolist()
        area, form = (small + (large - small) * first) * grid[0] * grid[1], flat + (tall - flat) * second
        height, width = round(math.sqrt(area * form)), round(math.sqrt(area / form))
        return min(max(height, 1), grid[0]), min(max(width, 1), grid[1])


def _places(height: int, width: int, n: int, count: int, grid: tuple[int, int]) -> Tensor:
    """Draw where blocks lie, and return the places that they cover, shape (N, count, height * width)."""
    top = torch.randint(grid[0] - height + 1, (n, count, 1, 1))
    left = torch.randint(grid[1] - width + 1, (n, count, 1, 1))
    rows, columns = top + torch.arange(height)[:, None], left + torch.arange(width)
    return (rows * grid[1] + columns).flatten(2)
