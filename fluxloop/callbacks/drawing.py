"""Draw pictures of tensors: tables of images with headings, points in colours, heat over an image.

A picture is a tensor of whole numbers 0 … 255, of shape (3, height, width), on the CPU: what `SampleImages` shares too.
Letters and points are drawn by Pillow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from colorsys import hls_to_rgb
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fluxloop.errors import ModelError, describe
from fluxloop.images import image_of, pillow

Colour = tuple[int, ...]

INK: Colour = (51, 51, 51)
PALETTE: tuple[Colour, ...] = (
    *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)),
    *((140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207)),
)
"""The colours of classes, where there are no more than these."""
RIGHT, WRONG = PALETTE[2], PALETTE[3]
HEAT = torch.tensor(
    [[0, 0, 4], [51, 10, 95], [120, 28, 109], [187, 55, 84], [237, 105, 37], [252, 165, 10], [252, 255, 164]]
)
"""Colours from cold to hot, from black over purple to yellow, of about even steps in brightness."""
LETTERS = 13
"""How high they are, in pixels."""


def as_rgb(images: Any, whose: str, value_range: tuple[float, float] | None = None) -> Tensor:
    """Return images as numbers 0 … 1 of shape (N, 3, H, W), on the CPU; NaN is black.

    Args:
        images: Shape (N, 1 or 3, H, W) or (N, H, W).
        whose: Who needs them, for the message.
        value_range: What is black and what is white; left out, (-1, 1) where there are negative values, else (0, 1), or
            (0, 255) for whole numbers.

    Raises:
        ModelError: They are no images.
    """
    given = images
    if isinstance(images, Tensor) and images.ndim == 3:
        images = images.unsqueeze(1)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ModelError(
            f"{whose} got {describe(given)} to show; expected images of shape (N, 1 or 3, H, W) or (N, H, W)"
        )
    low, high = value_range or range_of(images)
    return ((images.detach().float().cpu() - low) / (high - low)).nan_to_num(0.0).clamp(0, 1).expand(-1, 3, -1, -1)


def range_of(images: Tensor) -> tuple[float, float]:
    """Return what is black and what is white in images, where nobody says so."""
    if not images.is_floating_point() and images.dtype != torch.bool:
        return (0.0, 255.0)
    return (-1.0, 1.0) if bool((images < 0).any()) else (0.0, 1.0)


def enlarged(images: Tensor, least: int) -> Tensor:
    """Return images (N, C, H, W) with each pixel repeated, so that the shorter side has about `least`."""
    times = max(1, round(least / min(images.shape[2:])))
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def framed(image: Tensor, colour: Colour, width: int = 3) -> Tensor:
    """Return an image (3, H, W) with a frame around it."""
    _, height, across = image.shape
    out = (torch.tensor(colour) / 255)[:, None, None].repeat(1, height + 2 * width, across + 2 * width)
    out[:, width:-width, width:-width] = image
    return out


def heated(values: Tensor) -> Tensor:
    """Return the colours (..., 3) of numbers 0 … 1, each 0 … 1."""
    place = values.clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp(max=len(HEAT) - 2)
    colours = HEAT / 255
    return colours[low].lerp(colours[low + 1], (place - low).unsqueeze(-1))


def heat_over(images: Tensor, values: Tensor) -> Tensor:
    """Return images (N, 3, H, W), in grey, under the heat of coarser numbers (N, h, w).

    The numbers of an image go from its least to its most; those that are not finite are cold.
    """
    values = values.float().cpu().nan_to_num(0.0, 0.0, 0.0)
    smooth = interpolate(values.unsqueeze(1), images.shape[2:], mode="bilinear").squeeze(1)
    low, high = smooth.amin((1, 2), keepdim=True), smooth.amax((1, 2), keepdim=True)
    heat = heated((smooth - low) / (high - low).clamp(min=1e-12)).permute(0, 3, 1, 2)
    return 0.35 * images.mean(1, keepdim=True) + 0.65 * heat


def table(rows: Sequence[Sequence[Tensor]], headings: Sequence[str], title: str, gap: int = 6) -> Tensor:
    """Arrange images of one size (3, H, W), numbers 0 … 1, in rows, with a heading over each column and a title.

    Returns:
        Whole numbers 0 … 255, shape (3, height, width).
    """
    _, tall, wide = rows[0][0].shape
    head = gap + 2 * (LETTERS + gap)
    columns = [gap + across * (wide + gap) for across in range(max(map(len, rows)))]
    texts = [
        (gap, gap, title),
        *((left, head - LETTERS - gap, each) for left, each in zip(columns, headings, strict=False)),
    ]
    width = max(columns[-1] + wide + gap, *(left + ceil(lettering().getlength(text)) + gap for left, _, text in texts))
    page = torch.ones(3, head + len(rows) * (tall + gap), width)
    for down, row in enumerate(rows):
        for left, image in zip(columns, row, strict=False):
            top = head + down * (tall + gap)
            page[:, top : top + tall, left : left + wide] = image
    return written_on(image_of((page * 255).round().to(torch.uint8)), texts)


def lettering() -> Any:
    """Return the font of letters: Pillow's own."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(LETTERS)
    except TypeError:  # before Pillow 10.1 it has one size
        return ImageFont.load_default()


def written_on(image: Any, texts: Iterable[tuple[int, int, str]]) -> Tensor:
    """Write texts, each at its left and top, onto one of Pillow's images, and return its pixels (3, H, W)."""
    from PIL import ImageDraw

    draw, font = ImageDraw.Draw(image), lettering()
    for left, top, text in texts:
        draw.text((left, top), text, INK, font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def colours_of(labels: Tensor) -> tuple[list[Colour], list[tuple[str, Colour]]]:
    """Return a colour for each label, and what the legend says of them.

    Classes have colours of their own; numbers lie between cold and hot. Labels that are neither are all alike.
    """
    if labels.ndim != 1 or labels.is_complex() or not len(labels):
        return [PALETTE[0]] * len(labels), []
    if labels.is_floating_point():
        low, high = float(labels.min()), float(labels.max())
        place = 0.85 * (labels - low) / max(high - low, 1e-12)  # the brightest cannot be seen on white
        cold, hot, *shades = map(
            tuple, (heated(torch.cat([torch.tensor([0, 0.85]), place.float()])) * 255).int().tolist()
        )
        return shades, [(f"{low:.3g}", cold), (f"{high:.3g}", hot)]
    known = sorted(set(labels.tolist()))
    colours = {each: _class_colour(place, len(known)) for place, each in enumerate(known)}
    return [colours[each] for each in labels.tolist()], [(str(int(each)), colours[each]) for each in known]


def _class_colour(place: int, count: int) -> Colour:
    """Return the colour of a class: of the palette, or of so many around the wheel, light and dark in turn."""
    if count <= len(PALETTE):
        return PALETTE[place]
    return tuple(round(255 * each) for each in hls_to_rgb(place / count, (0.38, 0.52, 0.64)[place % 3], 0.75))


SIDE, MARGIN, HEAD, LEGEND, MOST_LINES, FINE = 480, 16, 30, 90, 24, 3
"""Of a scatter: the square in which points lie, the room around it, how many lines the legend has at most, and how
often larger it is drawn before it is made smaller, so that edges are smooth."""


def scatter(points: Tensor, labels: Tensor, title: str, axes: str) -> Tensor:
    """Draw points in the colours of their labels, with a legend.

    Args:
        points: Shape (N, 2), finite.
        labels: Shape (N,).
        title: Written above.
        axes: What the two directions are, written below.

    Returns:
        Whole numbers 0 … 255, shape (3, height, width).
    """
    from PIL import ImageDraw

    colours, legend = colours_of(labels)
    width, height = SIDE + 2 * MARGIN + (LEGEND if legend else 0), HEAD + SIDE + 30
    image = pillow().new("RGB", (FINE * width, FINE * height), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    box = (MARGIN, HEAD, MARGIN + SIDE, HEAD + SIDE)
    draw.rectangle([FINE * each for each in box], outline=(210, 210, 210), width=FINE)
    radius = FINE * (5 if len(points) <= 150 else 4 if len(points) <= 600 else 3)
    for (x, y), colour in zip(_in_box(points).tolist(), colours, strict=True):
        left, top = FINE * (MARGIN + x * SIDE), FINE * (HEAD + (1 - y) * SIDE)
        spot = [left - radius, top - radius, left + radius, top + radius]
        draw.ellipse(spot, fill=(*colour, 190), outline=(255, 255, 255, 160), width=FINE // 2)
    image = image.resize((width, height), resample=pillow().LANCZOS)
    texts, draw = [(MARGIN, 8, title), (MARGIN, HEAD + SIDE + 6, axes)], ImageDraw.Draw(image)
    left, lines = MARGIN + SIDE + 14, legend if len(legend) <= MOST_LINES else legend[: MOST_LINES - 1]
    for line, (name, colour) in enumerate(lines):
        top = HEAD + 4 + 19 * line
        draw.ellipse([left, top + 3, left + 10, top + 13], fill=colour)
        texts.append((left + 16, top, name))
    if len(lines) < len(legend):
        texts.append((left, HEAD + 4 + 19 * len(lines), f"and {len(legend) - len(lines)} more"))
    return written_on(image, texts)


def _in_box(points: Tensor) -> Tensor:
    """Scale points into the unit square, with a margin, each direction for itself."""
    if not len(points):
        return points
    low, high = points.amin(0), points.amax(0)
    return 0.04 + 0.92 * (points - low) / (high - low).clamp(min=1e-12)
