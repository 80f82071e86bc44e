from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import DataError, EmbeddingMap, KNNProbe, Learner, Metrics, Recorder, SimCLRPhase, TwoViews
from fluxloop.callbacks.embedding_map import principal_axes


def clouds(rows: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows) % 3
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) + 3 * labels[:, None], labels


class Encoder(nn.Linear):
    """Counts how often held-out rows are run."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.runs = 0

    def forward(self, xs: Tensor) -> Tensor:
        self.runs += not self.training
        return super().forward(xs)


def learner_of(*callbacks: Any, data: Any = None) -> Learner:
    torch.manual_seed(1)
    models = {"encoder": Encoder(), "projector": nn.Linear(4, 4)}
    data = (clouds(), clouds(seed=1)) if data is None else data
    return Learner(models, data=data, callbacks=[Recorder(), *callbacks], default_callbacks=False, seed=2)


def fit(learner: Learner, epochs: int = 1) -> None:
    learner.fit(epochs, phases=[SimCLRPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])


def features_of(learner: Learner, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.model.encoder(rows)


# Principal component analysis


def test_principal_axes_are_those_of_torchs_own_and_of_the_covariance() -> None:
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 0.1])
    points, shares = principal_axes(rows, 3)
    u, s, _ = torch.pca_lowrank(rows.double(), q=6, niter=20)
    torch.testing.assert_close(points.abs(), (u * s)[:, :3].abs(), rtol=1e-6, atol=1e-6)
    values, vectors = torch.linalg.eigh(rows.double().T.cov())
    torch.testing.assert_close(shares, (values.flip(0) / values.sum())[:3])
    directions = vectors.flip(1)[:, :3]
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    torch.testing.assert_close(points, (rows.double() - rows.double().mean(0)) @ directions)


def test_a_picture_is_not_mirrored_from_one_epoch_to_the_next() -> None:
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1.0, 1.0])
    points, _ = principal_axes(rows)
    again, _ = principal_axes(rows + 1e-4 * torch.randn(40, 4, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(points, again, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(5, 3), torch.ones(1, 3), torch.randn(3, 1), torch.randn(2, 7)],
    ids=["all alike", "one row", "one dimension", "two rows"],
)
def test_directions_that_there_are_not_are_zero(rows: Tensor) -> None:
    points, shares = principal_axes(rows)
    assert points.shape == (len(rows), 2)
    assert points.isfinite().all()
    assert shares.isfinite().all()
    assert shares[1] < 1e-20
    assert points[:, 1].abs().max() < 1e-6


# The picture


def test_the_points_are_the_projected_features_of_the_held_out_rows() -> None:
    callback = EmbeddingMap("encoder", folder=None)
    learner = learner_of(callback)
    fit(learner)
    rows, _ = clouds(seed=1)
    expected, _ = principal_axes(features_of(learner, rows))
    torch.testing.assert_close(callback.points, expected.float())
    assert callback.grid is not None
    assert callback.grid.dtype == torch.uint8


def test_each_point_has_the_colour_of_its_class_in_its_place() -> None:
    """The middle of a spot, found from `points` by the margins that the picture has."""
    callback = EmbeddingMap("encoder", queries=(torch.eye(5) * 4, torch.tensor([0, 1, 2, 0, 1])), folder=None)
    fit(learner_of(callback))
    points = callback.points
    assert points is not None
    assert callback.grid is not None
    box = (points - points.amin(0)) / (points.amax(0) - points.amin(0)) * 0.92 + 0.04
    colours = {0: (31, 119, 180), 1: (255, 127, 14), 2: (44, 160, 44)}
    for (x, y), label in zip(box.tolist(), [0, 1, 2, 0, 1], strict=True):
        found = callback.grid[:, round(30 + (1 - y) * 480), round(16 + x * 480)].float()
        nearest = min(colours, key=lambda each: float((found - torch.tensor(colours[each])).abs().sum()))
        assert nearest == label


def test_features_are_shared_with_probes() -> None:
    runs = []
    for more in ([], [EmbeddingMap("encoder", folder=None)]):
        learner = learner_of(KNNProbe("encoder", k=3), Metrics(), *more)
        fit(learner)
        runs.append(learner.model.encoder.runs)
    assert runs[0] == runs[1] > 0


def test_of_many_rows_some_are_drawn_at_even_distances() -> None:
    callback = EmbeddingMap("encoder", most_rows=7, folder=None)
    learner = learner_of(callback)
    fit(learner)
    rows, _ = clouds(seed=1)
    chosen = [0, 8, 17, 25, 34, 42, 51]
    torch.testing.assert_close(callback.points, principal_axes(features_of(learner, rows)[chosen])[0].float())


def test_a_function_may_reduce_them() -> None:
    def halves(features: Tensor) -> Any:
        assert features.device.type == "cpu"
        return features[:, :2].numpy()

    callback = EmbeddingMap("encoder", reducer=halves, folder=None)
    learner = learner_of(callback)
    fit(learner)
    torch.testing.assert_close(callback.points, features_of(learner, clouds(seed=1)[0])[:, :2])


@pytest.mark.parametrize("bad", [lambda f: f[:, :1], lambda f: f[:3, :2], lambda f: f[:, :2] * float("nan")])
def test_a_function_that_gives_no_points_is_told(bad: Any) -> None:
    with pytest.raises(DataError, match=r"reducer=.*expected finite points of shape \(60, 2\)"):
        fit(learner_of(EmbeddingMap("encoder", reducer=bad, folder=None)))


def test_rows_whose_features_are_not_finite_are_left_out() -> None:
    def some(module: nn.Module, xs: Tensor) -> Tensor:
        out = module(xs)
        return out.index_fill(0, torch.tensor([1, 4]), float("nan"))

    def none(module: nn.Module, xs: Tensor) -> Tensor:
        return module(xs) * float("inf")

    callback = EmbeddingMap("encoder", queries=clouds(), features=some, folder=None)  # in one batch
    fit(learner_of(callback))
    assert callback.points is not None
    assert callback.points.shape == (58, 2)
    empty = EmbeddingMap("encoder", features=none, folder=None)
    fit(learner_of(empty))
    assert empty.points is not None
    assert empty.points.shape == (0, 2)


@pytest.mark.parametrize(
    "labels",
    [torch.linspace(-1, 1, 60), torch.arange(60), torch.ones(60, 2), torch.arange(60) % 2 == 0],
    ids=["numbers", "many classes", "several each", "yes or no"],
)
def test_labels_of_any_kind_have_colours(labels: Tensor) -> None:
    callback = EmbeddingMap("encoder", queries=(clouds()[0], labels), folder=None)
    fit(learner_of(callback))
    assert callback.grid is not None
    assert callback.grid.flatten(1).T.unique(dim=0).shape[0] > 50


def test_rows_without_labels_are_told_before_the_first_step() -> None:
    learner = learner_of(EmbeddingMap("encoder", queries=clouds()[0]))
    with pytest.raises(DataError, match=r"expected labelled rows, \(xs, ys\)"):
        fit(learner)
    assert learner.updates.count == 0


# UMAP


def test_umap_that_is_not_installed_is_told_when_the_learner_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == "umap":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("fluxloop.callbacks.embedding_map.import_module", without)
    with pytest.raises(ImportError, match=r"reducer='umap'\) was given.*expected it to be installed: pip install umap"):
        learner_of(EmbeddingMap("encoder", reducer="umap"))


def test_umap_gets_the_features_and_a_seed_that_is_the_same_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Stand:
        def __init__(self, **options: Any) -> None:
            seen.append(options)

        def fit_transform(self, features: Any) -> Any:
            seen[-1]["shape"] = features.shape
            return features[:, :2]

    monkeypatch.setattr("fluxloop.callbacks.embedding_map._umap", lambda: Stand)
    fit(learner_of(EmbeddingMap("encoder", reducer="umap", folder=None)), 2)
    assert seen[0] == seen[1]
    assert {"n_components": 2, "n_neighbors": 15, "shape": (60, 4)}.items() <= seen[0].items()


def test_fewer_rows_than_umap_can_place_are_shown_by_their_principal_components(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fluxloop.callbacks.embedding_map._umap", lambda: None)
    for rows in (1, 2, 3):
        callback = EmbeddingMap("encoder", queries=clouds(rows), reducer="umap", folder=None)
        learner = learner_of(callback)
        fit(learner)
        expected, _ = principal_axes(features_of(learner, clouds(rows)[0]))
        torch.testing.assert_close(callback.points, expected.float())


def test_a_reducer_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reducer='tsne'\) was given; expected 'pca', 'umap', or a function"):
        EmbeddingMap(reducer="tsne")
    with pytest.raises(ValueError, match="most_rows"):
        EmbeddingMap(most_rows=1)
