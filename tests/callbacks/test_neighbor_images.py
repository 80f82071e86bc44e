from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import DataError, Learner, NeighborImages, Recorder, SimCLRPhase, TwoViews

GREEN, RED = (44, 160, 44), (214, 39, 40)


def images(rows: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(rows) % 3


def learner_of(*callbacks: Any, data: Any = None) -> Learner:
    torch.manual_seed(1)
    models = {"encoder": nn.Sequential(nn.Flatten(), nn.Linear(16, 6)), "projector": nn.Linear(6, 4)}
    data = (images(), images(seed=1)) if data is None else data
    return Learner(models, data=data, callbacks=[Recorder(), *callbacks], default_callbacks=False, seed=2)


def fit(learner: Learner) -> None:
    learner.fit(1, phases=[SimCLRPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])


def by_hand(features: Tensor, line: int, k: int) -> list[int]:
    """Order all other rows by the cosine, one pair at a time."""
    cosines = [
        float(features[line] @ other / features[line].norm() / other.norm()) if place != line else -2.0
        for place, other in enumerate(features)
    ]
    return sorted(range(len(features)), key=lambda place: -cosines[place])[:k]


def cell(callback: Any, line: int, place: int) -> Tensor:
    """Cut one image, with its frame, out of the picture."""
    assert callback.grid is not None
    top, left = 44 + line * 76, 6 + place * 76
    found: Tensor = callback.grid[:, top : top + 70, left : left + 70]
    return found


def test_the_neighbours_are_those_of_a_search_by_hand_and_their_images_are_shown_and_framed() -> None:
    callback = NeighborImages("encoder", count=4, k=5, folder=None)
    learner = learner_of(callback)
    fit(learner)
    xs, ys = images(seed=1)
    with torch.no_grad():
        features = learner.model.encoder(xs).double()
    assert callback.lines is not None
    assert callback.neighbors is not None
    assert callback.lines.tolist() == [0, 7, 15, 22]
    assert callback.neighbors.tolist() == [by_hand(features, line, 5) for line in callback.lines.tolist()]
    frames = set()
    for row, (line, near) in enumerate(zip(callback.lines.tolist(), callback.neighbors.tolist(), strict=True)):
        for place, index in enumerate([line, *near]):
            shown = cell(callback, row, place)
            inside = (xs[index].repeat_interleave(16, 1).repeat_interleave(16, 2) * 255).round()
            assert torch.equal(shown[:, 3:-3, 3:-3].float(), inside.expand(3, -1, -1))
            frame = (255, 255, 255) if not place else GREEN if ys[index] == ys[line] else RED
            assert tuple(shown[:, 1, 1].tolist()) == tuple(shown[:, -2, 40].tolist()) == frame
            frames.add(frame)
    assert frames == {(255, 255, 255), GREEN, RED}


def test_images_are_found_in_loaders_that_shuffle_and_rows_may_be_shown_otherwise() -> None:
    def half(xs: Tensor) -> Tensor:
        return xs.squeeze(1) / 2 + 0.5

    loader = DataLoader(TensorDataset(*images(seed=1)), batch_size=7, shuffle=True)
    order: list[Tensor] = []

    def features(module: nn.Module, xs: Tensor) -> Tensor:
        order.append(xs)
        return module(xs)

    callback = NeighborImages(
        "encoder", queries=loader, features=features, show=half, value_range=(0, 1), count=3, k=2, folder=None
    )
    learner = learner_of(callback)
    fit(learner)
    xs = torch.cat(order)
    with torch.no_grad():
        expected = [by_hand(learner.model.encoder(xs).double(), line, 2) for line in (0, 10, 20)]
    assert callback.neighbors is not None
    assert callback.neighbors.tolist() == expected
    for row, near in enumerate(expected):
        pixels = cell(callback, row, 1)[:, 3:-3:16, 3:-3:16].float()
        torch.testing.assert_close(pixels, ((xs[near[0]] / 2 + 0.5) * 255).round().expand(3, -1, -1))


def test_fewer_rows_than_are_asked_for_are_all_shown() -> None:
    callback = NeighborImages("encoder", queries=images(3), count=9, k=9, folder=None)
    fit(learner_of(callback))
    assert callback.neighbors is not None
    assert [sorted(line) for line in callback.neighbors.tolist()] == [[1, 2], [0, 2], [0, 1]]
    alone = NeighborImages("encoder", queries=images(1), folder=None)
    fit(learner_of(alone))
    assert alone.neighbors is not None
    assert alone.neighbors.shape == (1, 0)


def test_features_that_are_not_finite_are_nobodys_neighbours() -> None:
    def spoilt(module: nn.Module, xs: Tensor) -> Tensor:
        return module(xs).index_fill(0, torch.tensor([2, 5]), float("nan"))

    callback = NeighborImages("encoder", count=2, k=20, features=spoilt, folder=None)
    fit(learner_of(callback))
    assert callback.neighbors is not None
    assert not {2, 5} & set(callback.neighbors.flatten().tolist())


def test_rows_without_labels_are_told_before_the_first_step() -> None:
    learner = learner_of(NeighborImages("encoder", queries=images()[0]))
    with pytest.raises(DataError, match=r"expected labelled rows, \(xs, ys\)"):
        fit(learner)
    assert learner.updates.count == 0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="k="):
        NeighborImages(k=0)
    with pytest.raises(TypeError, match="features"):
        NeighborImages(features=3)  # type: ignore[arg-type]
