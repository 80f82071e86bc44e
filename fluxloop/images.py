"""Grids of images, and PNG files of them."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def image_grid(
    images: Tensor, columns: int = 8, value_range: tuple[float, float] | None = None, *, padding: int = 1
) -> Tensor:
    """Arrange images in rows, with a dark line between them.

    Args:
        images: Shape (N, C, H, W).
        columns: Images in a row.
        value_range: What is black and what is white; left out, (-1, 1) where there are negative
            values, else (0, 1). What lies outside is cut off.
        padding: Width of the lines, in pixels.

    Returns:
        Whole numbers 0 … 255, shape (C, height, width), on the CPU.
    """
    images = images.detach().float().cpu()
    low, high = value_range or ((-1.0, 1.0) if (images < 0).any() else (0.0, 1.0))
    images = ((images - low) / (high - low)).clamp(0, 1)
    count, channels, height, width = images.shape
    columns = max(1, min(columns, count))
    rows = ceil(count / columns)
    grid = torch.full((channels, rows * (height + padding) + padding, columns * (width + padding) + padding), 0.2)
    for place, image in enumerate(images):
        top = padding + place // columns * (height + padding)
        left = padding + place % columns * (width + padding)
        grid[:, top : top + height, left : left + width] = image
    return (grid * 255).round().to(torch.uint8)


def save_image(grid: Tensor, path: Path, *, zoom: int = 0) -> None:
    """Write a grid of whole numbers 0 … 255, shape (1 or 3, H, W), as a PNG file.

    Args:
        grid: From `image_grid`.
        path: The file; its folder is made.
        zoom: Times it is enlarged, pixel by pixel; 0 makes the shorter side about 500 pixels.

    Raises:
        ImportError: Pillow is not installed.
    """
    image = image_of(grid)
    times = zoom or max(1, round(500 / min(image.size)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * times, image.height * times), resample=0).save(path)


def image_of(grid: Tensor) -> Any:
    """Return Pillow's image of whole numbers 0 … 255, shape (1 or 3, H, W)."""
    _, height, width = grid.shape
    pixels = bytes(grid.permute(1, 2, 0).flatten().tolist())  # bytes(a storage) takes twenty to fifty times as long
    return pillow().frombytes("L" if len(grid) == 1 else "RGB", (width, height), pixels)


def pillow() -> Any:
    """Return Pillow's ``Image`` module.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("saving images needs Pillow: pip install 'torch-fluxloop[images]'") from error
    return Image
