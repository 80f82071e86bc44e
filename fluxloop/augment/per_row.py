"""Random changes of images that draw for each row of a batch, on its device; all can be differentiated twice.

A loader's worker sees one image and draws for it; on a batch that is already on the device the same has to be drawn for
each row, or all rows are changed alike. These do, in tensors alone, so that they are part of a compiled step, and their
gradients reach the images, so that a generator learns through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from fluxloop.errors import describe
from fluxloop.guard.given import as_pair, check_number

P = ParamSpec("P")

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue make of a grey value (ITU-R BT.601)."""


def of_images(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Have a function of batches (N, C, H, W) take one image (C, H, W) too, and refuse what are no images of floats."""
    name = function.__name__

    @wraps(function)
    def changed(images: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim not in (3, 4):
            raise ValueError(f"{name} was given {describe(images)}; expected images (N, C, H, W), or one (C, H, W)")
        if not images.is_floating_point():
            raise TypeError(f"{name} was given images of {images.dtype}; expected floating point: images.float()")
        return function(images, *args, **kwargs) if images.ndim == 4 else function(images[None], *args, **kwargs)[0]

    return cast(Callable[Concatenate[Tensor, P], Tensor], changed)


def draw(images: Tensor, count: int) -> Tensor:
    """Draw numbers from 0 to 1, so many for each image, shape (count, N); of half precision they would be few."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    return torch.rand(count, len(images), dtype=dtype, device=images.device)


def rows_of(values: Tensor) -> Tensor:
    """Give numbers (N,) the dimensions of images, (N, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


def apply_to_some(images: Tensor, changed: Tensor, drawn: Tensor, probability: float | Tensor) -> Tensor:
    """Return the changed images where the number drawn is less than the probability, else those as they were."""
    chosen = (drawn < probability).reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(chosen, changed.to(images.dtype), images)


def sample_images(images: Tensor, grid: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Look up images (N, C, H, W) at places (N, h, w, 2), as `grid_sample` does; can be differentiated twice."""
    sampled: Tensor = _Sample.apply(images.to(grid.dtype), grid, padding_mode)  # type: ignore[no-untyped-call]  # torch has no types
    return sampled.to(images.dtype)


class _Sample(torch.autograd.Function):
    """`grid_sample`, which is linear in the images: its gradient is another such map, and that one's is itself.

    torch has no second derivative of `grid_sample`, and penalties of a critic's gradient at images that it sees changed
    need one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, grid: Tensor, padding_mode: str) -> Tensor:
        return grid_sample(images, grid, padding_mode=padding_mode, align_corners=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, grid, ctx.padding_mode = inputs
        ctx.shape = tuple(images.shape)
        ctx.save_for_backward(grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grid,) = ctx.saved_tensors
        gradient = gradients[0].to(grid.dtype)  # with autocast it may be of half precision
        back = _SampleBackward.apply(gradient, grid, ctx.shape, ctx.padding_mode)  # type: ignore[no-untyped-call]  # as above
        return back, None, None


class _SampleBackward(torch.autograd.Function):
    """The gradient of `_Sample` with respect to images: what was looked up goes back to where it came from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, grid: Tensor, shape: tuple[int, ...], padding_mode: str) -> Tensor:
        images = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device)
        modes = 0, ("zeros", "border").index(padding_mode)
        found: tuple[Tensor, Tensor] = torch.ops.aten.grid_sampler_2d_backward(
            gradient, images, grid.to(gradient.dtype), *modes, False, (True, False)
        )
        return found[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, grid, _, ctx.padding_mode = inputs
        ctx.save_for_backward(grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grid,) = ctx.saved_tensors
        again = _Sample.apply(gradients[0].to(grid.dtype), grid, ctx.padding_mode)  # type: ignore[no-untyped-call]  # as above
        return again, None, None, None


@of_images
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
        ValueError: They are no images, or the size is no whole number, 1 or more.
        TypeError: The images are of whole numbers.

    Example:
        >>> images = torch.rand(8, 1, 12, 12)
        >>> random_affine(images, degrees=15, translate=0.1, scale=(0.9, 1.2), size=6).shape
        torch.Size([8, 1, 6, 6])
    """
    if size is not None:
        check_number("random_affine", "size", size, least=1, whole=True)
    tall, wide = images.shape[2:]
    height, width = (size, size) if size is not None else (tall, wide)
    if len(images) == 0:  # of which torch makes no grid
        return images.sum((2, 3), keepdim=True).expand(-1, -1, height, width).clone()
    angle, factor, dx, dy = draw(images, 4)
    angle = (2 * angle - 1) * math.radians(degrees)
    factor = scale[0] + (scale[1] - scale[0]) * factor
    cos, sin = angle.cos() / factor, angle.sin() / factor
    right, down = (2 * (2 * move - 1) * translate for move in (dx, dy))
    # the map is in shares of each side: an angle is not, where they differ
    rows = [cos, -sin * tall / wide, right, sin * wide / tall, cos, down]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    with torch.autocast(images.device.type, enabled=False):  # places of half precision are off by parts of a pixel
        grid = affine_grid(theta, [len(images), images.shape[1], height, width], align_corners=False)
    return sample_images(images, grid)


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


@of_images
def random_resized_crop(
    images: Tensor,
    size: int | None = None,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut a rectangle out of each image, of a size and at a place of its own, and enlarge it to one size.

    As torchvision's ``RandomResizedCrop``, without its smoothing where a rectangle is made smaller; one that would be
    higher or wider than the image is cut off there, where torchvision draws anew.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image.
        size: Height and width of the result; left out, the images'.
        scale: Smallest and largest share of an image's area, drawn evenly.
        ratio: Smallest and largest width by height, in pixels, drawn so that its logarithm is even.

    Returns:
        Shape (N, C, size, size), or (C, size, size).

    Raises:
        ValueError: They are no images, or a range is out of order.
        TypeError: The images are of whole numbers.

    Example:
        >>> random_resized_crop(torch.rand(8, 3, 12, 12), 6, scale=(0.3, 1.0)).shape
        torch.Size([8, 3, 6, 6])
    """
    _check_range("random_resized_crop", "scale", scale, most=1.0)
    _check_range("random_resized_crop", "ratio", ratio)
    if size is not None:
        check_number("random_resized_crop", "size", size, least=1, whole=True)
    tall, wide = images.shape[2:]
    share, form, x, y = draw(images, 4)
    area = (scale[0] + (scale[1] - scale[0]) * share) * (tall * wide)
    form = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * form)
    width, height = ((area * form).sqrt() / wide).clamp(max=1), ((area / form).sqrt() / tall).clamp(max=1)
    left, top = x * (1 - width), y * (1 - height)  # all as shares of the image
    rows, columns = (size, size) if size is not None else (tall, wide)
    at_y = top[:, None] + height[:, None] * _middles(rows, share)
    at_x = left[:, None] + width[:, None] * _middles(columns, share)
    places = at_x[:, None].expand(-1, rows, -1), at_y[:, :, None].expand(-1, -1, columns)
    return sample_images(images, 2 * torch.stack(places, dim=3) - 1, "border")


def _middles(count: int, like: Tensor) -> Tensor:
    """Return where the middles of so many pixels lie, from 0 to 1."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


@of_images
def random_flip(images: Tensor, *, horizontal: float = 0.5, vertical: float = 0.0) -> Tensor:
    """Flip some images, left to right and upside down.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image.
        horizontal: Share of the images that are flipped left to right.
        vertical: Share of those flipped upside down.

    Raises:
        ValueError: They are no images, or a share is not from 0 to 1.
        TypeError: The images are of whole numbers.

    Example:
        >>> image = torch.arange(4.0).view(1, 1, 4)
        >>> random_flip(image, horizontal=1.0)
        tensor([[[3., 2., 1., 0.]]])
    """
    check_number("random_flip", "horizontal", horizontal, least=0, most=1)
    check_number("random_flip", "vertical", vertical, least=0, most=1)
    across, down = draw(images, 2)
    images = apply_to_some(images, images.flip(3), across, horizontal)
    return apply_to_some(images, images.flip(2), down, vertical) if vertical else images


@of_images
def color_jitter(
    images: Tensor,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image by amounts of its own.

    As torchvision's ``ColorJitter``, in this order, which torchvision draws.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image. Those of one channel have no saturation and hue.
        brightness: The largest change: pixels are multiplied by a factor from ``1 - brightness``, at least 0, to
            ``1 + brightness``.
        contrast: The same of the distance of pixels from the image's mean grey value.
        saturation: The same of the distance of colours from grey.
        hue: The largest turn of the hues to either side, from 0 to 0.5, half of the circle.
        probability: Share of the images that are changed.
        limits: The values of black and white; what lies beyond them after a change is cut off. ``(-1.0, 1.0)`` for
            images of that range, as generators make them.

    Raises:
        ValueError: They are no images, have neither one nor three channels where colours are changed, or an amount is
            out of range.
        TypeError: The images are of whole numbers.

    Example:
        >>> color_jitter(torch.rand(8, 3, 12, 12), brightness=0.4, hue=0.1, probability=0.8).shape
        torch.Size([8, 3, 12, 12])
    """
    amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, amount in amounts.items():
        check_number("color_jitter", name, amount, least=0)
    check_number("color_jitter", "hue", hue, least=0, most=0.5)
    check_number("color_jitter", "probability", probability, least=0, most=1)
    _check_range("color_jitter", "limits", limits, least=-math.inf, equal=False)
    _check_channels("color_jitter", images, "saturation and hue" if saturation or hue else "")
    chosen, *drawn = draw(images, 5)
    factors = {
        name: rows_of(max(1 - amount, 0.0) + (1 + amount - max(1 - amount, 0.0)) * share)
        for (name, amount), share in zip(amounts.items(), drawn, strict=False)
    }
    black, white = limits
    changed = (images - black) / (white - black)
    if brightness:
        changed = (changed * factors["brightness"]).clamp(0, 1)
    if contrast:
        changed = _blend(changed, _gray(changed).mean((1, 2, 3), keepdim=True), factors["contrast"])
    if saturation and images.shape[1] == 3:
        changed = _blend(changed, _gray(changed), factors["saturation"])
    if hue and images.shape[1] == 3:
        changed = _turn_hues(changed, (2 * drawn[3] - 1) * hue)
    return apply_to_some(images, black + (white - black) * changed, chosen, probability)


@of_images
def random_grayscale(images: Tensor, *, probability: float = 0.2) -> Tensor:
    """Make some images grey, in all three channels; those of one channel stay as they are.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image.
        probability: Share of the images that become grey.

    Raises:
        ValueError: They are no images of one or three channels, or the share is not from 0 to 1.
        TypeError: The images are of whole numbers.

    Example:
        >>> red, green, blue = random_grayscale(torch.rand(3, 12, 12), probability=1.0)
        >>> torch.equal(red, green) and torch.equal(green, blue)
        True
    """
    check_number("random_grayscale", "probability", probability, least=0, most=1)
    _check_channels("random_grayscale", images, "grey values")
    (chosen,) = draw(images, 1)
    return apply_to_some(images, _gray(images).expand_as(images), chosen, probability)


@of_images
def gaussian_blur(
    images: Tensor,
    sigma: float | tuple[float, float] = (0.1, 2.0),
    *,
    probability: float = 0.5,
    kernel_size: int | None = None,
) -> Tensor:
    """Blur some images, each by a width of its own; beyond an edge lies its mirror image.

    Args:
        images: Shape (N, C, H, W), or (C, H, W) for one image.
        sigma: Standard deviation in pixels; of a pair, drawn evenly in between.
        probability: Share of the images that are blurred.
        kernel_size: Over how many pixels in each direction is averaged, an odd number; left out, as many as three of
            the largest standard deviations to either side need, and no more than a tenth of the image's larger side, as
            SimCLR has it, but at least three, and not more than its smaller side has mirrored pixels for.

    Raises:
        ValueError: They are no images, a number is out of range, or the kernel is too large for the images.
        TypeError: The images are of whole numbers.

    Example:
        >>> gaussian_blur(torch.rand(8, 3, 12, 12), (0.1, 1.0)).shape
        torch.Size([8, 3, 12, 12])
    """
    sigma = as_pair(sigma)
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    _check_range("gaussian_blur", "sigma", (low, high))
    check_number("gaussian_blur", "probability", probability, least=0, most=1)
    n, channels, tall, wide = images.shape
    if kernel_size is None:
        if min(tall, wide) < 2:
            raise ValueError(
                f"gaussian_blur was given images of {tall} x {wide}, whose edges have no mirror image; expected two "
                "pixels or more in each direction"
            )
        reach = min(max(1, min(math.ceil(3 * high), max(tall, wide) // 20)), min(tall, wide) - 1)
    else:
        check_number("gaussian_blur", "kernel_size", kernel_size, least=1, whole=True)
        reach = kernel_size // 2
        if kernel_size % 2 == 0 or reach >= min(tall, wide):
            raise ValueError(
                f"gaussian_blur(kernel_size={kernel_size}) was given for images of {tall} x {wide}; expected an odd "
                f"number of at most {2 * min(tall, wide) - 1}"
            )
    if n == 0:  # torch convolves no groups
        return images.clone()
    chosen, share = draw(images, 2)
    deviations = low + (high - low) * share
    places = torch.arange(-reach, reach + 1, dtype=share.dtype, device=share.device)
    weights = (-0.5 * (places / deviations[:, None]).square()).exp()
    weights = (weights / weights.sum(1, keepdim=True)).to(images.dtype)
    kernels = weights.repeat_interleave(channels, 0)[:, None]  # each channel of each image is a group
    rows = pad(images, [reach] * 4, mode="reflect").reshape(1, n * channels, tall + 2 * reach, wide + 2 * reach)
    blurred = conv2d(conv2d(rows, kernels[:, :, None], groups=n * channels), kernels[..., None], groups=n * channels)
    return apply_to_some(images, blurred.reshape(images.shape), chosen, probability)


def _gray(images: Tensor) -> Tensor:
    """Return the grey values of images, (N, 1, H, W); of other than three channels the mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    return (factors * images + (1 - factors) * others).clamp(0, 1)


def _turn_hues(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hues of images of red, green and blue from 0 to 1, by parts of the circle (N,)."""
    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    spread = most - least
    safe = torch.where(spread == 0, 1, spread)
    of_red, of_green, of_blue = (green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe
    hue = torch.where(most == red, of_red, torch.where(most == green, of_green, of_blue))  # in sixths of the circle
    hue = (hue + 6 * turns[:, None, None]) % 6
    # of a channel at k sixths: what the largest value loses there (the usual closed form of the way back)
    channels = [most - spread * torch.minimum((hue + k) % 6, 4 - (hue + k) % 6).clamp(0, 1) for k in (5, 3, 1)]
    return torch.stack(channels, dim=1)


def _check_range(
    name: str, argument: str, given: Any, *, least: float = 0.0, most: float = math.inf, equal: bool = True
) -> None:
    """Raise `ValueError` for what is no pair of numbers, the smaller first; those above 0 unless `least` says less."""
    given = as_pair(given)
    if not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"{name}({argument}={describe(given)}) was given; expected the smallest and the largest")
    for each in given:
        if least == 0:
            check_number(name, argument, each, above=0, most=most)
        else:
            check_number(name, argument, each, most=most)
    if given[0] > given[1] or (not equal and given[0] == given[1]):
        raise ValueError(f"{name}({argument}={tuple(given)}) was given; expected the smaller number first")


def _check_channels(name: str, images: Tensor, what: str) -> None:
    """Raise `ValueError` for images that have no colours as red, green and blue."""
    if what and images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} was given images of {images.shape[1]} channels, of which it does not know {what}; expected red, "
            "green and blue, or one channel: images[:, :3]"
        )
