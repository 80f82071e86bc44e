"""What is hidden of images: patches here and there, rectangles, blocks with a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from fluxloop.errors import DataError
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_pair, check_number, number

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


@fields_of_the_class
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

    share: float | tuple[float, float] = field(default=0.3, converter=as_pair, validator=_shares())
    unmasked: float = field(default=0.0, kw_only=True, validator=number(least=0, most=1))

    def __call__(self, n: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return True where a patch is hidden, shape (N, L)."""
        count = grid[0] * grid[1]
        least, most = _spread(self.share)
        shares, whole = torch.rand(2, n, 1, device=device)
        hidden = ((least + (most - least) * shares) * count).round() * (whole >= self.unmasked)
        mask: Tensor = torch.rand(n, count, device=device).argsort(1).argsort(1) < hidden
        return mask


@fields_of_the_class
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
    share: float | tuple[float, float] = field(
        default=(0.1, 0.25), kw_only=True, converter=as_pair, validator=_shares()
    )
    ratio: float | tuple[float, float] = field(
        default=(0.3, 3.3), kw_only=True, converter=as_pair, validator=_shares(1e-3, 1e3)
    )

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


@fields_of_the_class
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
    share: float | tuple[float, float] = field(
        default=(0.15, 0.2), kw_only=True, converter=as_pair, validator=_shares()
    )
    ratio: float | tuple[float, float] = field(
        default=(0.75, 1.5), kw_only=True, converter=as_pair, validator=_shares(1e-3, 1e3)
    )
    context: float | tuple[float, float] = field(
        default=(0.85, 1.0), kw_only=True, converter=as_pair, validator=_shares()
    )
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
