from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator, DataError, Learner, MultiCrop, SimCLRPhase, TwoViews, ViewDataset
from fluxloop.augment import add_noise, draws_once
from fluxloop.augment.views import may_draw_once
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


class Wrapped(nn.Module):
    """Has a transform, and calls it with a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flip = Flip()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.flip(images) if images.ndim == 3 else torch.stack([self.flip(image) for image in images])
        return out


def global_flip(images: Tensor) -> Tensor:
    return FLIP(images)


FLIP = Flip()


@pytest.mark.parametrize(
    "transform",
    [global_flip, lambda images, flip=FLIP: FLIP(images), lambda images: Flip()(images), Wrapped()],
    ids=["a global", "a lambda", "made within", "a module"],
)
def test_a_function_that_uses_what_draws_once_is_told_once_and_may_say_which_it_is(transform: Any) -> None:
    batch = images(48, 1, 4, 4)
    for make in (lambda **options: TwoViews(transform, **options), lambda **o: MultiCrop(noisy, transform, **o)):
        views = make()
        with pytest.warns(UserWarning, match=r"so that all rows get the same crop.* Say \w+\(\.\.\., per_row=True\)"):
            views(batch)
        views(batch)  # a warning would be an error here
        make()(images(3, 4))  # no images
        assert flipped(make(per_row=True)(batch)[-1], batch) == {True, False}
        make(per_row=False)(batch)


def test_a_function_that_calls_no_transform_of_torchvision_is_not_told() -> None:
    for transform in (noisy, add_noise, nn.Identity(), torch.flip, partial(add_noise, deviation=0.1)):
        assert not may_draw_once(transform)
    assert draws_once(partial(FLIP))
    assert not may_draw_once(partial(FLIP))  # it is known, and done row by row
