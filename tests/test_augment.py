from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator, DataError, Learner, MultiCrop, SimCLRPhase, TwoViews, ViewDataset
from fluxloop.augment import BlockMasks, MultiBlock, RandomMasks, add_noise, random_affine
from fluxloop.testing import assert_resumes_exactly, assert_same_bits


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def noisy(xs: Tensor) -> Tensor:
    return add_noise(xs, 0.1)


# Views of a batch and of a row


def test_two_views_are_two_draws_of_one_transform_in_order() -> None:
    torch.manual_seed(3)
    first, second = TwoViews(noisy)(images(4, 2))
    torch.manual_seed(3)
    assert torch.equal(first, images(4, 2) + 0.1 * torch.randn(4, 2))
    assert torch.equal(second, images(4, 2) + 0.1 * torch.randn(4, 2))
    assert not torch.equal(first, second)


def test_the_second_view_can_have_a_transform_of_its_own() -> None:
    first, second = TwoViews(lambda xs: xs + 1, lambda xs: xs - 1)(images(4, 2))
    assert torch.equal(first, images(4, 2) + 1)
    assert torch.equal(second, images(4, 2) - 1)


def test_multi_crop_gives_the_global_crops_first() -> None:
    made: list[str] = []

    def crop(name: str, size: int) -> Any:
        def cut(xs: Tensor) -> Tensor:
            made.append(name)
            return xs[..., :size, :size]

        return cut

    crops = MultiCrop(crop("global", 8), crop("local", 4), num_local=3)(images(5, 1, 10, 10))
    assert [crop.shape[-1] for crop in crops] == [8, 8, 4, 4, 4]
    assert made == ["global", "global", "local", "local", "local"]
    assert len(MultiCrop(noisy, noisy, num_local=0, num_global=1)(images(2, 2))) == 1


class Pairs:
    """A dataset of rows ``(x, label)`` that is no torch dataset."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images(6, 3)[index], index


def test_a_view_dataset_gives_views_and_label() -> None:
    data = ViewDataset(Pairs(), TwoViews(lambda x: x + 1, lambda x: x - 1))
    (first, second), label = data[2]
    assert len(data) == 6
    assert torch.equal(first, images(6, 3)[2] + 1)
    assert torch.equal(second, images(6, 3)[2] - 1)
    assert label == 2


def test_a_view_dataset_of_rows_without_label_gives_the_views() -> None:
    views = TwoViews(lambda x: x + 1, lambda x: x - 1)
    for rows in (images(6, 3), TensorDataset(images(6, 3)), [image for image in images(6, 3)]):
        first, second = ViewDataset(rows, views)[1]
        assert torch.equal(first, images(6, 3)[1] + 1)
        assert torch.equal(second, images(6, 3)[1] - 1)


def test_a_view_dataset_keeps_whatever_follows_the_row() -> None:
    data = ViewDataset((images(6, 3), torch.arange(6), torch.arange(6) + 10), TwoViews(noisy))
    views, label, more = data[4]
    assert len(views) == 2
    assert (label, more) == (4, 14)


def test_a_view_dataset_of_something_without_rows_says_to_give_the_views_to_the_phase() -> None:
    with pytest.raises(DataError, match=r"__getitem__ and __len__.*SimCLRPhase\(views=TwoViews\(augment\)\)"):
        ViewDataset(iter([1, 2]), TwoViews(noisy))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_over_a_view_dataset_gives_batches_of_views(workers: int) -> None:
    data = ViewDataset(
        TensorDataset(images(10, 1, 8, 8), torch.arange(10)),
        MultiCrop(lambda x: x, lambda x: x[..., :4, :4], num_local=2),
    )
    batches = list(DataLoader(data, batch_size=4, num_workers=workers))
    assert [len(views) for views, _ in batches] == [4, 4, 4]
    views, labels = batches[1]
    assert [tuple(view.shape) for view in views] == [(4, 1, 8, 8), (4, 1, 8, 8), (4, 1, 4, 4), (4, 1, 4, 4)]
    assert torch.equal(views[0], images(10, 1, 8, 8)[4:8])
    assert labels.tolist() == [4, 5, 6, 7]


@pytest.mark.slow
def test_a_phase_trains_on_a_view_dataset_alike_with_and_without_workers() -> None:
    learners = []
    for workers in (0, 2):
        torch.manual_seed(1)
        data = DataLoader(
            ViewDataset((images(12, 3), torch.arange(12) % 2), TwoViews(lambda x: 2 * x, lambda x: x + 1)),
            batch_size=4,
            shuffle=True,
            num_workers=workers,
        )
        learner = Learner({"encoder": torch.nn.Linear(3, 2)}, data=(data,), default_callbacks=False, seed=0)
        learner.fit(2, phases=[SimCLRPhase()])
        assert learner.step.ys.shape == (4,)
        learners.append(learner)
    assert_same_bits(*learners)


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


def test_images_of_whole_numbers_are_refused_in_words() -> None:
    with pytest.raises((DataError, TypeError, ValueError), match="float"):
        random_affine(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), degrees=5)


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


# Transforms that draw once per call, as torchvision's do


class Flip(nn.Module):
    """Flips all it is called with, or nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(-1) if torch.rand(()) < 0.5 else images


Flip.__module__ = "torchvision.transforms.v2._geometry"


def flipped(views: Tensor, images: Tensor) -> set[bool]:
    return {bool(torch.equal(view, image.flip(-1))) for view, image in zip(views, images, strict=True)}


@pytest.mark.parametrize(
    "views",
    [
        TwoViews(Flip()),
        TwoViews(Flip(), nn.Sequential(nn.Identity(), Flip())),
        TwoViews(lambda images: Flip()(images), per_row=True),
        MultiCrop(Flip(), Flip()),
        MultiCrop(lambda images: Flip()(images), Flip(), per_row=True),
    ],
    ids=["torchvision", "in a chain", "asked for", "crops", "crops asked for"],
)
def test_each_row_of_a_batch_has_a_draw_of_its_own(views: Any) -> None:
    batch = images(48, 1, 4, 4)
    for view in views(batch):
        assert view.shape == batch.shape
        assert flipped(view, batch) == {True, False}


def test_rows_are_drawn_for_in_order() -> None:
    batch = images(6, 1, 4, 4)
    torch.manual_seed(3)
    first, second = TwoViews(Flip())(batch)
    torch.manual_seed(3)
    by_hand = [torch.stack([Flip()(row) for row in batch]) for _ in range(2)]
    assert torch.equal(first, by_hand[0])
    assert torch.equal(second, by_hand[1])


def test_a_batch_is_given_as_a_whole_to_transforms_that_are_not_known_to_draw_once() -> None:
    calls: list[torch.Size] = []
    TwoViews(lambda xs: calls.append(xs.shape))(images(4, 1, 2, 2))
    TwoViews(Flip(), per_row=False)(images(4, 1, 2, 2))
    assert calls == [(4, 1, 2, 2)] * 2
    assert len(flipped(TwoViews(Flip(), per_row=False)(images(48, 1, 4, 4))[0], images(48, 1, 4, 4))) == 1


def test_a_row_of_a_dataset_has_one_draw() -> None:
    clips = images(8, 5, 1, 4, 4)  # each row is a clip of five frames
    dataset = ViewDataset((clips,), TwoViews(Flip()))
    for (first, _), clip in zip((dataset[n] for n in range(8)), clips, strict=True):
        assert len(flipped(first, clip)) == 1


def test_views_row_by_row_need_rows() -> None:
    with pytest.raises(DataError, match=r"row by row of a list of length 1; expected a tensor of shape \(N, …\)"):
        TwoViews(noisy, per_row=True)([1])


def test_training_on_views_row_by_row_resumes_exactly() -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        data = TensorDataset(images(16, 1, 4, 4))
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        return Learner(
            {"encoder": encoder, "projector": nn.Linear(4, 4)},
            data=(DataLoader(data, batch_size=8, shuffle=True),),
            default_callbacks=False,
            accelerator=Accelerator("cpu"),
            seed=0,
        )

    assert_resumes_exactly(make, epochs=2, phases=lambda: [SimCLRPhase(TwoViews(Flip()))], at=[1, 3])


# Masks

HOST = torch.device("cpu")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_random_masks_hide_the_same_number_of_patches_here_and_there(share: float) -> None:
    torch.manual_seed(0)
    mask = RandomMasks(share)(8, (3, 4), HOST)
    assert mask.shape == (8, 12)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [round(12 * share)] * 8
    assert share != 0.25 or len({tuple(row) for row in mask.tolist()}) > 4


def test_random_masks_draw_a_share_for_each_image_and_leave_some_as_they_are() -> None:
    torch.manual_seed(0)
    counts = RandomMasks((0.2, 0.6), unmasked=0.5)(400, (10, 10), HOST).sum(1)
    assert 0.4 < (counts == 0).float().mean() < 0.6
    hidden = counts[counts > 0]
    assert 20 <= hidden.min() < 25
    assert 55 < hidden.max() <= 60


def test_block_masks_are_rectangles_of_the_size_and_form_asked_for() -> None:
    torch.manual_seed(0)
    masks = BlockMasks(1, share=(0.1, 0.3), ratio=(0.5, 2.0))(50, (10, 14), HOST).reshape(50, 10, 14)
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide  # nothing but the rectangle
        assert rows.tolist() == list(range(rows[0], rows[0] + tall))
        assert 0.08 * 140 < tall * wide < 0.34 * 140
        assert 0.4 < tall / wide < 2.4
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 40
    several = BlockMasks(5, share=0.2)(200, (14, 14), HOST).float().mean()
    assert 0.4 < several < 0.75


def test_blocks_that_leave_no_context_say_what_to_type() -> None:
    with pytest.raises(DataError, match=r"left nothing of an image of 2 x 2 patches as a context; expected fewer"):
        MultiBlock(4, share=1.0)(3, (2, 2), HOST)


def test_blocks_of_one_batch_have_one_size_and_places_of_their_own() -> None:
    torch.manual_seed(0)
    context, blocks = MultiBlock(2, share=0.2, ratio=1.0)(6, (10, 10), HOST)
    assert blocks.shape == (6, 2, 16)
    rows, columns = blocks // 10, blocks % 10
    assert ((rows.amax(2) - rows.amin(2)) == 3).all()
    assert ((columns.amax(2) - columns.amin(2)) == 3).all()
    assert len({tuple(block) for block in blocks.flatten(0, 1).tolist()}) > 6
    assert all(row == sorted(row) for row in context.tolist())
