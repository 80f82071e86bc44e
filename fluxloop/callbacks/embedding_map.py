"""Draw where held-out rows lie in a representation, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fluxloop.callbacks.drawing import scatter
from fluxloop.callbacks.features import Features, check_labelled, encode, flat
from fluxloop.callbacks.pictures import PicturesOfRows
from fluxloop.errors import DataError, describe
from fluxloop.guard.given import called, number
from fluxloop.phase import AbstractTrainingPhase


def principal_axes(features: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Project rows onto the directions in which they differ most (principal component analysis).

    Each direction is turned so that its largest part is positive: the same features give the same picture.

    Args:
        features: Shape (N, F).
        count: How many directions.

    Returns:
        Shape (N, count), in float64, and the share of the variance that lies in each direction, shape (count,). Of
        directions that there are not, both are 0.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
        >>> projected, shares = principal_axes(rows)
        >>> projected[:, 0].tolist(), shares.tolist()
        ([-2.0, 0.0, 2.0], [1.0, 0.0])
    """
    centred = features.double() - features.double().mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    projected, shares = centred.new_zeros(len(centred), count), centred.new_zeros(count)
    found = min(count, len(directions))
    projected[:, :found] = centred @ (directions * largest.sign())[:found].T
    shares[:found] = (sizes.square() / sizes.square().sum().clamp(min=1e-300))[:found]
    return projected, shares


FEWEST = 4
"""So many rows UMAP needs; fewer are shown by their principal components."""


def _umap() -> Any:
    """Return UMAP's class.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module("umap").UMAP
    except ImportError as error:
        raise ImportError(
            "EmbeddingMap(reducer='umap') was given, and UMAP cannot be imported; expected it to be installed: "
            "pip install umap-learn (reducer='pca' needs nothing)"
        ) from error


@define
class EmbeddingMap(PicturesOfRows):
    """Draw held-out rows where a representation places them, in the colours of their classes, after each epoch.

    The features are those that probes measure, and are shared with them. They are projected onto two directions: those
    in which they differ most (principal component analysis, by torch), by UMAP, or as you like. The picture is saved as
    ``pictures/embedding_encoder-0003.png``; other callbacks find it in ``cbstate.images["embedding_encoder"]``, and
    `LogImages` logs it. Rows whose features are not finite are left out, and counted in the title.

    Args:
        model: Name of the weights: ``"encoder"``, ``"student.encoder"``, ``"encoder@ema"``, or ``"model"`` for a
            single model.
        queries: Labelled rows ``(xs, ys)``, anything `as_dataloader` takes; left out, the learner's validation data.
            Classes have a colour each; numbers lie between two colours.
        reducer: ``"pca"``; ``"umap"`` (``pip install umap-learn``), with the same seed in every epoch, and PCA of fewer
            than four rows; or a function from features (N, F), in float32 on the CPU, to points (N, 2), such as
            ``TSNE().fit_transform`` of scikit-learn.
        most_rows: How many rows are drawn at most; of more, as many at even distances in the data.
        features: ``(module, xs) -> (N, F)``; left out, the module's output, flattened.
        folder: Where to save the pictures; None saves nothing.
        every: Draw after every so many training epochs.

    Raises:
        ModelError: There are no such weights.
        DataError: There are no labelled rows, or the reducer gives no points.
        ImportError: Pillow, or UMAP where it is asked for, is not installed.
        ValueError: `most_rows` is less than 2, `every` less than 1, or the reducer has an unknown name.

    Attributes:
        grid: The last picture, whole numbers 0 … 255 of shape (3, height, width).
        points: Where its rows lie, shape (N, 2), in the order of the data.

    Reads: model, data, seed, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.images
    Runs after: Recorder

    Example:
        >>> rows, labels = torch.randn(64, 4), torch.arange(64) % 3
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=((rows, labels), (rows[:16], labels[:16])), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), EmbeddingMap("encoder")])
        >>> history = learner.fit(2, phases=[SimCLRPhase(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> learner.cbstate.images["embedding_encoder"].shape  # and in pictures/embedding_encoder-0002.png
        torch.Size([3, 540, 602])
    """

    reducer: str | Callable[[Tensor], Any] = field(default="pca", kw_only=True)
    most_rows: int = field(default=2000, kw_only=True, validator=number(least=2, whole=True))
    features: Features = field(
        default=flat, kw_only=True, repr=False, validator=called("a function (module, xs) -> (N, F)")
    )
    points: Tensor | None = field(default=None, init=False, repr=False)

    writes = ("cbstate.images",)
    kind = "embedding"
    transient = (*PicturesOfRows.transient, "points")

    @reducer.validator
    def _check_reducer(self, attribute: object, reducer: object) -> None:
        if not callable(reducer) and reducer not in ("pca", "umap"):
            raise ValueError(
                f"EmbeddingMap(reducer={reducer!r}) was given; expected 'pca', 'umap', or a function from features "
                "(N, F) to points (N, 2)"
            )

    def init(self, learner: Any) -> None:
        """Look for the weights and for what draws, and share the pictures."""
        super().init(learner)
        if self.reducer == "umap":
            _umap()

    def try_out(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for rows without labels."""
        check_labelled(self.first_rows(learner), self.features)

    def look(self, phase: AbstractTrainingPhase, learner: Any) -> Any:
        """Return the features and the labels."""
        return encode(learner, self.model, *self.rows(learner), self.features, classes=False)

    def draw(self, seen: Any, title: str) -> Tensor:
        """Project the features, and draw them."""
        features, labels = seen
        count = min(len(features), self.most_rows)
        chosen = torch.arange(count) * len(features) // count
        features, labels = (each.detach()[chosen.to(each.device)].cpu() for each in (features, labels))
        features = features.flatten(1).float()
        finite = features.isfinite().all(1)
        if not finite.all():
            title += f", {int((~finite).sum())} of {count} rows are not finite"
        if not finite.any():
            self.points, axes = torch.zeros(0, 2), ""
        else:
            self.points, axes = self._reduced(features[finite])
        return scatter(self.points, labels[finite], title, axes)

    def _reduced(self, features: Tensor) -> tuple[Tensor, str]:
        if self.reducer == "pca" or (self.reducer == "umap" and len(features) < FEWEST):
            points, shares = principal_axes(features)
            shown = f"across: PCA 1, {shares[0]:.0%} of the variance    up: PCA 2, {shares[1]:.0%}"
            return points.float(), shown
        found, name = self._by_function(features)
        points = torch.as_tensor(found).detach().cpu().float()
        if points.shape != (len(features), 2) or not points.isfinite().all():
            raise DataError(
                f"EmbeddingMap(reducer=...) got {describe(found)} of {len(features)} rows; expected finite points of "
                f"shape ({len(features)}, 2)"
            )
        return points, f"across: {name} 1    up: {name} 2"

    def _by_function(self, features: Tensor) -> tuple[Any, str]:
        if callable(self.reducer):
            return self.reducer(features), getattr(self.reducer, "__name__", type(self.reducer).__name__)
        seed = int(torch.randint(2**31 - 1, ()))  # of the stream that the picture draws from: the same in every epoch
        neighbors = min(15, len(features) - 1)
        reducer = _umap()(n_components=2, random_state=seed, n_neighbors=neighbors, n_jobs=1)
        return reducer.fit_transform(features.numpy()), "UMAP"
