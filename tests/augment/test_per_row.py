"""Changes that draw for each row, against the same written for one image at a time in double precision."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fluxloop.augment import (
    add_noise,
    color_jitter,
    gaussian_blur,
    random_affine,
    random_flip,
    random_grayscale,
    random_resized_crop,
)
from fluxloop.losses import r1_penalty


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# random_affine, against a loop over pixels


def by_hand(image: Tensor, degrees: float, dx: float, dy: float, factor: float, size: tuple[int, int]) -> Tensor:
    """Turn, scale and move one image (C, H, W) pixel by pixel: what each pixel shows lies where it came from.

    Distances are in pixels and taken from the middle; the result shows the whole image in `size` pixels.
    """
    channels, height, width = image.shape
    angle = math.radians(degrees)
    result = torch.zeros(channels, *size, dtype=image.dtype)
    for row in range(size[0]):
        for column in range(size[1]):
            x = (column + 0.5) * width / size[1] - width / 2
            y = (row + 0.5) * height / size[0] - height / 2
            from_x = (math.cos(angle) * x - math.sin(angle) * y) / factor + dx * width
            from_y = (math.sin(angle) * x + math.cos(angle) * y) / factor + dy * height
            at_x, at_y = from_x + width / 2 - 0.5, from_y + height / 2 - 0.5
            left, top = math.floor(at_x), math.floor(at_y)
            for r, share_y in ((top, 1 - (at_y - top)), (top + 1, at_y - top)):
                for c, share_x in ((left, 1 - (at_x - left)), (left + 1, at_x - left)):
                    if 0 <= r < height and 0 <= c < width:
                        result[:, row, column] += share_y * share_x * image[:, r, c]
    return result


def drawn(seed: int, count: int) -> Tensor:
    """Give the numbers that decide angle, factor, shift to the right and downwards of each image."""
    torch.manual_seed(seed)
    return torch.rand(4, count)


def test_without_options_it_gives_the_images_back() -> None:
    torch.testing.assert_close(random_affine(images(3, 2, 7, 5)), images(3, 2, 7, 5), atol=1e-5, rtol=1e-5)


def test_one_image_is_treated_like_a_batch_of_one() -> None:
    torch.manual_seed(5)
    one = random_affine(images(2, 6, 6), degrees=30, translate=0.2, scale=(0.5, 2.0))
    torch.manual_seed(5)
    batch = random_affine(images(2, 6, 6)[None], degrees=30, translate=0.2, scale=(0.5, 2.0))
    assert one.shape == (2, 6, 6)
    assert torch.equal(one, batch[0])


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    degrees=st.sampled_from([0.0, 20.0, 180.0]),
    translate=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([(1.0, 1.0), (0.5, 2.0), (2.0, 3.0)]),
    size=st.sampled_from([None, 4, 9]),
)
def test_it_turns_scales_and_moves_each_image_by_its_own_amount(
    seed: int, degrees: float, translate: float, scale: tuple[float, float], size: int | None
) -> None:
    given_images = images(2, 1, 6, 6)
    torch.manual_seed(seed)
    found = random_affine(given_images, degrees=degrees, translate=translate, scale=scale, size=size)
    for image, result, (angle, factor, dx, dy) in zip(given_images, found, drawn(seed, 2).T.tolist(), strict=True):
        expected = by_hand(
            image,
            (2 * angle - 1) * degrees,
            (2 * dx - 1) * translate,
            (2 * dy - 1) * translate,
            scale[0] + (scale[1] - scale[0]) * factor,
            (size or 6, size or 6),
        )
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_an_image_that_is_not_square_is_turned_without_being_sheared() -> None:
    image = images(1, 6, 10)
    torch.manual_seed(4)
    found = random_affine(image, degrees=90)
    angle = (2 * drawn(4, 1)[0, 0].item() - 1) * 90
    torch.testing.assert_close(found, by_hand(image, angle, 0, 0, 1, (6, 10)), atol=1e-4, rtol=1e-4)


def test_a_shift_of_whole_pixels_moves_the_rows_and_columns() -> None:
    image = images(1, 1, 4, 4)
    torch.manual_seed(0)
    *_, dx, dy = drawn(0, 1)[:, 0].tolist()
    share = 0.25 / (2 * dx - 1)  # one of four columns
    torch.manual_seed(0)
    moved = random_affine(image, translate=share)
    down = share * (2 * dy - 1) * 4
    expected = by_hand(image[0], 0, 0.25, down / 4, 1, (4, 4))
    torch.testing.assert_close(moved[0], expected, atol=1e-5, rtol=1e-5)


def test_an_enlarged_image_shows_its_middle() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 2:6, 2:6] = 1.0
    enlarged = random_affine(image, scale=(2.0, 2.0))
    assert enlarged[..., 1:-1, 1:-1].min() == pytest.approx(1.0, abs=1e-5)
    crop = random_affine(image, scale=(2.0, 2.0), size=4)
    torch.testing.assert_close(crop, torch.ones(1, 1, 4, 4), atol=1e-5, rtol=1e-5)


def test_what_comes_from_outside_is_black() -> None:
    shrunk = random_affine(torch.ones(1, 1, 8, 8), scale=(0.5, 0.5))
    assert shrunk[0, 0, 0].abs().max() == 0
    assert shrunk[0, 0, 3:5, 3:5].min() == pytest.approx(1.0)


@pytest.mark.parametrize("size", [None, 3, 8, 12])
@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (3, 8, 6)])
def test_the_size_of_the_result_can_be_said(shape: tuple[int, ...], size: int | None) -> None:
    found = random_affine(images(*shape), degrees=10, size=size)
    assert found.shape == ((*shape[:-2], size, size) if size else shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_numbers_stays(dtype: torch.dtype) -> None:
    assert random_affine(images(2, 1, 4, 4).to(dtype), degrees=5).dtype is dtype
    assert add_noise(images(2, 4).to(dtype), 0.1).dtype is dtype


def test_gradients_flow_through_a_turned_image() -> None:
    image = images(1, 1, 4, 4).requires_grad_(True)
    random_affine(image, degrees=10).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_the_images_given_are_left_as_they_are() -> None:
    given_images = images(2, 1, 4, 4)
    random_affine(given_images, degrees=45, translate=0.3)
    add_noise(given_images, 0.5)
    assert torch.equal(given_images, images(2, 1, 4, 4))


# Noise


def test_noise_has_the_deviation_asked_for_and_no_mean() -> None:
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(100_000), 0.25)
    assert noise.std().item() == pytest.approx(0.25, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.005)
    assert torch.equal(add_noise(images(3, 2), 0.0), images(3, 2))


# The others, against loops over rows and pixels in double precision


def numbers(count: int, n: int) -> list[list[float]]:
    """Give the numbers that a function draws from seed 7, for each row."""
    torch.manual_seed(7)
    return torch.rand(count, n, dtype=torch.float64).T.tolist()


def at_seed(function: Callable[..., Tensor], rows: Tensor, *args: Any, **options: Any) -> Tensor:
    torch.manual_seed(7)
    return function(rows, *args, **options)


def look_up(image: Tensor, x: float, y: float) -> Tensor:
    """Interpolate an image (C, H, W) at a place in pixels, of which the middle of the first one is 0; edges go on."""
    height, width = image.shape[1:]
    left, top = math.floor(x), math.floor(y)
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
            total += share_x * share_y * image[:, inside[0], inside[1]]
    return total


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.3, 3.0))])
def test_a_crop_has_its_area_form_and_place_in_each_row(size: int | None, scale: Any, ratio: Any) -> None:
    rows = images(6, 2, 8, 10).double()
    found = at_seed(random_resized_crop, rows, size, scale=scale, ratio=ratio)
    height, width = (8, 10) if size is None else (size, size)
    assert found.shape == (6, 2, height, width)
    for image, result, (share, form, x, y) in zip(rows, found, numbers(4, 6), strict=True):
        area = (scale[0] + (scale[1] - scale[0]) * share) * 80
        form = ratio[0] * (ratio[1] / ratio[0]) ** form
        wide, tall = min((area * form) ** 0.5, 10), min((area / form) ** 0.5, 8)
        left, top = x * (10 - wide), y * (8 - tall)
        for row in range(height):
            for column in range(width):
                at = left + (column + 0.5) * wide / width - 0.5, top + (row + 0.5) * tall / height - 0.5
                torch.testing.assert_close(result[:, row, column], look_up(image, *at), rtol=0, atol=1e-12)


def test_a_flip_is_drawn_for_each_row() -> None:
    rows = images(40, 3, 4, 5).double()
    found = at_seed(random_flip, rows, horizontal=0.5, vertical=0.25)
    drawn = numbers(2, 40)
    for image, result, (across, down) in zip(rows, found, drawn, strict=True):
        expected = image.flip(2) if across < 0.5 else image
        assert torch.equal(result, expected.flip(1) if down < 0.25 else expected)
    assert 10 < sum(across < 0.5 for across, _ in drawn) < 30


def jitter_by_hand(pixels: Tensor, factors: list[float], amounts: list[float]) -> Tensor:
    """Change one image (3, H, W) with Python's numbers, its hues by the standard library's conversion."""
    pairs = [(max(1 - amount, 0), 1 + amount, share) for amount, share in zip(amounts, factors, strict=True)]
    bright, contrast, saturated = [low + (high - low) * share for low, high, share in pairs[:3]]

    def grey(image: Tensor) -> Tensor:
        return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]

    image = (pixels * bright).clamp(0, 1)
    image = (contrast * image + (1 - contrast) * grey(image).mean()).clamp(0, 1)
    image = (saturated * image + (1 - saturated) * grey(image)).clamp(0, 1)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            turned = colorsys.hsv_to_rgb((hue + (2 * factors[3] - 1) * amounts[3]) % 1, saturation, value)
            image[:, row, column] = torch.tensor(turned, dtype=torch.float64)
    return image


@pytest.mark.parametrize("limits", [(0.0, 1.0), (-1.0, 1.0)])
def test_colours_change_by_each_rows_own_amounts(limits: tuple[float, float]) -> None:
    low, high = limits
    unit = images(6, 3, 3, 4).double()
    unit[0] = unit[0].mean(0)  # a grey one has no hue
    amounts = [0.4, 1.5, 0.6, 0.2]
    names = ("brightness", "contrast", "saturation", "hue")
    options = dict(zip(names, amounts, strict=True))
    found = at_seed(color_jitter, low + (high - low) * unit, **options, probability=0.7, limits=limits)
    changed = []
    for image, result, (chosen, *factors) in zip(unit, found, numbers(5, 6), strict=True):
        expected = jitter_by_hand(image, factors, amounts) if chosen < 0.7 else image
        torch.testing.assert_close(result, low + (high - low) * expected, rtol=0, atol=1e-12)
        changed.append(chosen < 0.7)
    assert {*changed} == {True, False}


def test_images_of_one_channel_have_brightness_and_contrast_alone() -> None:
    rows = images(4, 1, 3, 3).double()
    found = at_seed(color_jitter, rows, brightness=0.5, saturation=0.9, hue=0.5)
    for image, result, (_, factor, *_) in zip(rows, found, numbers(5, 4), strict=True):
        torch.testing.assert_close(result, (image * (0.5 + factor)).clamp(0, 1), rtol=0, atol=1e-15)
    assert torch.equal(at_seed(random_grayscale, rows, probability=1.0), rows)
    with pytest.raises(ValueError, match=r"color_jitter was given images of 2 channels.*saturation and hue"):
        color_jitter(images(4, 2, 3, 3), hue=0.1)


def test_some_rows_become_grey() -> None:
    rows = images(30, 3, 2, 2).double()
    found = at_seed(random_grayscale, rows, probability=0.3)
    for image, result, (chosen,) in zip(rows, found, numbers(1, 30), strict=True):
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        torch.testing.assert_close(result, grey.expand(3, 2, 2) if chosen < 0.3 else image, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("size", "reach"), [(5, 2), (1, 0), (None, 1)])
def test_a_blur_has_each_rows_own_width_and_mirrors_the_edges(size: int | None, reach: int) -> None:
    rows = images(6, 2, 5, 6).double()
    found = at_seed(gaussian_blur, rows, (0.5, 2.0), probability=0.6, kernel_size=size)

    def inside(place: int, length: int) -> int:
        return abs(place) if place < length else 2 * (length - 1) - place

    blurred = []
    for image, result, (chosen, share) in zip(rows, found, numbers(2, 6), strict=True):
        sigma, expected = 0.5 + 1.5 * share, torch.zeros_like(image)
        steps = range(-reach, reach + 1)
        weights = {k: math.exp(-0.5 * (k / sigma) ** 2) for k in steps}
        total = sum(weights.values())
        for row in range(5):
            for column in range(6):
                for i in steps:
                    for j in steps:
                        pixel = image[:, inside(row + i, 5), inside(column + j, 6)]
                        expected[:, row, column] += weights[i] * weights[j] / total**2 * pixel
        torch.testing.assert_close(result, expected if chosen < 0.6 else image, rtol=0, atol=1e-12)
        blurred.append(chosen < 0.6)
    assert {*blurred} == {True, False}


CHANGES: dict[str, Callable[..., Tensor]] = {
    "affine": partial(random_affine, degrees=20, translate=0.1, scale=(0.8, 1.2)),
    "crop": partial(random_resized_crop, scale=(0.3, 1.0)),
    "flip": partial(random_flip, vertical=0.5),
    "colours": partial(color_jitter, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, probability=0.8),
    "grey": partial(random_grayscale, probability=0.5),
    "blur": partial(gaussian_blur, sigma=(0.5, 1.0)),
}
every = pytest.mark.parametrize("name", CHANGES)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_image_is_a_batch_of_one_and_the_type_stays(name: str, dtype: torch.dtype) -> None:
    image = images(3, 6, 6).to(dtype)
    one, batch = at_seed(CHANGES[name], image), at_seed(CHANGES[name], image[None])
    assert one.shape == (3, 6, 6)
    assert one.dtype == dtype
    assert torch.equal(one, batch[0])


@every
def test_equal_rows_get_changes_of_their_own_and_the_same_ones_from_the_same_seed(name: str) -> None:
    rows = images(1, 3, 6, 6).expand(16, -1, -1, -1)
    before = rows.clone()
    first, second = at_seed(CHANGES[name], rows), at_seed(CHANGES[name], rows)
    assert torch.equal(first, second)
    assert len({tuple(row.flatten().tolist()) for row in first}) > 1
    assert torch.equal(rows, before)


@every
def test_gradients_reach_the_images_and_can_be_differentiated_again(name: str) -> None:
    rows = (0.2 + 0.6 * images(2, 3, 3, 2)).double().requires_grad_()
    change = partial(at_seed, CHANGES[name])
    assert torch.autograd.gradcheck(change, (rows,))
    assert torch.autograd.gradgradcheck(change, (rows,))


def test_a_penalty_of_a_critics_gradient_passes_through_what_the_critic_sees() -> None:
    """As a critic with the look-up written out has it: torch has no second derivative of ``grid_sample``."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    rows, seen = images(3, 1, 4, 4).double(), partial(random_affine, degrees=30)
    matrix = torch.stack([at_seed(seen, one.view(1, 1, 4, 4).expand(3, -1, -1, -1)).flatten(1)
                          for one in torch.eye(16).double()], 2)  # fmt: skip

    def as_product(xs: Tensor) -> Tensor:
        out: Tensor = critic((matrix @ xs.flatten(1)[:, :, None])[..., 0])
        return out

    def penalty(judge: Any) -> list[Tensor]:
        return list(torch.autograd.grad(r1_penalty(judge, rows), list(critic.parameters())[:3]))

    for found, expected in zip(penalty(lambda xs: critic(at_seed(seen, xs))), penalty(as_product), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().max() > 1e-6


def test_they_work_under_vmap_as_on_a_batch_of_batches() -> None:
    rows = images(2, 4, 3, 6, 6)
    grid_free = partial(at_seed, partial(random_resized_crop, scale=(0.5, 0.5)))
    found = torch.func.vmap(lambda xs: grid_free(xs), randomness="same")(rows)
    torch.testing.assert_close(found, torch.stack([grid_free(xs) for xs in rows]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: random_flip(images(4, 4)), r"random_flip was given .*; expected images \(N, C, H, W\), or one"),
        (lambda: random_flip(images(1, 4, 4), horizontal=2), r"random_flip\(horizontal=2\) was given"),
        (lambda: random_affine(images(1, 4, 4), size=0), r"random_affine\(size=0\) was given"),
        (lambda: random_resized_crop(images(1, 4, 4), scale=(0.5, 0.2)), "expected the smaller number first"),
        (lambda: random_resized_crop(images(1, 4, 4), scale=0.5), "expected the smallest and the largest"),
        (lambda: random_resized_crop(images(1, 4, 4), 0), r"random_resized_crop\(size=0\) was given"),
        (lambda: color_jitter(images(1, 4, 4), hue=0.7), r"color_jitter\(hue=0.7\) was given"),
        (lambda: color_jitter(images(1, 4, 4), limits=(1, 1)), "expected the smaller number first"),
        (lambda: gaussian_blur(images(1, 4, 4), kernel_size=4), "expected an odd number of at most 7"),
        (lambda: gaussian_blur(images(1, 4, 4), (0.0, 1.0)), r"gaussian_blur\(sigma=0.0\) was given; .* above 0"),
        (lambda: random_grayscale(images(1, 4, 4), probability=-1), "probability=-1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@every
@pytest.mark.parametrize("size", [None, 4])
def test_of_no_images_there_are_none_and_no_number_is_drawn(name: str, size: int | None) -> None:
    change = CHANGES[name]
    if size is not None and name not in ("affine", "crop"):
        pytest.skip("it has no size")
    rows = torch.rand(0, 3, 6, 5, requires_grad=True)
    before = torch.get_rng_state()
    changed = change(rows) if size is None else change(rows, size=size)
    assert changed.shape == ((0, 3, 6, 5) if size is None else (0, 3, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    changed.sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape


@every
def test_images_of_whole_numbers_are_refused_by_all(name: str) -> None:
    with pytest.raises(TypeError, match=r"images of torch.uint8; expected floating point: images.float\(\)"):
        CHANGES[name](torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_places_are_as_exact_with_autocast_as_without() -> None:
    xs = images(4, 1, 64, 64)
    torch.manual_seed(0)
    expected = random_affine(xs, degrees=20, translate=0.1)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_affine(xs, degrees=20, translate=0.1), expected)


def test_a_blur_of_narrow_images_takes_what_their_mirror_image_has() -> None:
    xs = images(4, 1, 3, 200)
    torch.manual_seed(0)
    blurred = gaussian_blur(xs, 5.0, probability=1.0)
    torch.manual_seed(0)
    assert torch.equal(blurred, gaussian_blur(xs, 5.0, probability=1.0, kernel_size=5))
    with pytest.raises(ValueError, match=r"gaussian_blur was given images of 1 x 28.*two pixels or more"):
        gaussian_blur(images(4, 1, 1, 28))
