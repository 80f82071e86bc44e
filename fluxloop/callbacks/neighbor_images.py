"""Draw the nearest neighbours of some rows in a representation, epoch after epoch."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.callbacks.drawing import RIGHT, WRONG, as_rgb, enlarged, framed, table
from fluxloop.callbacks.features import Features, check_labelled, encode, flat
from fluxloop.callbacks.pictures import PicturesOfImages
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.guard.given import called, number
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.randomness import drawing, stream_seed


@define
class NeighborImages(PicturesOfImages):
    """Draw some held-out images beside those that a representation places nearest to them, after each epoch.

    A line has an image, and the others of the same data by the cosine of their features, nearest first: framed in green
    where they are of its class, in red where not. The features are those that probes measure, and are shared with them;
    the rows are loaded once more for the images.

    The picture is saved as ``pictures/neighbors_encoder-0003.png``; other callbacks find it in
    ``cbstate.images["neighbors_encoder"]``, and `LogImages` logs it.

    Args:
        model: Name of the weights: ``"encoder"``, ``"student.encoder"``, ``"encoder@ema"``, or ``"model"`` for a
            single model.
        queries: Labelled images ``(xs, ys)``, anything `as_dataloader` takes; left out, the learner's validation data.
        count: How many lines: so many images, at even distances in the data.
        k: How many neighbours of each.
        features: ``(module, xs) -> (N, F)``; left out, the module's output, flattened.
        show: ``xs -> images`` of shape (N, 1 or 3, H, W), where the rows are no such images, or are normalised; left
            out, the rows.
        value_range: What is black and what is white; left out, (-1, 1) where an image has negative values, else (0, 1).
        folder: Where to save the pictures; None saves nothing.
        every: Draw after every so many training epochs.

    Raises:
        ModelError: There are no such weights, or the rows are no images.
        DataError: There are no labelled rows.
        ImportError: Pillow is not installed.
        ValueError: `count`, `k` or `every` is less than 1.

    Attributes:
        grid: The last picture, whole numbers 0 … 255 of shape (3, height, width).
        lines: Which of the rows have a line, shape (count,).
        neighbors: Which of the rows are their neighbours, shape (count, k).

    Reads: model, data, seed, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.images
    Runs after: Recorder

    Example:
        >>> images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 3
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
        >>> models = {"encoder": encoder, "projector": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=((images, labels), (images[:16], labels[:16])), default_callbacks=False)
        >>> neighbors = NeighborImages("encoder", count=4, k=3)
        >>> learner.set_callbacks([Recorder(), neighbors])
        >>> history = learner.fit(1, phases=[SimCLRPhase(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> neighbors.neighbors.shape  # drawn in pictures/neighbors_encoder-0001.png
        torch.Size([4, 3])
    """

    k: int = field(default=8, kw_only=True, validator=number(least=1, whole=True))
    features: Features = field(
        default=flat, kw_only=True, repr=False, validator=called("a function (module, xs) -> (N, F)")
    )
    lines: Tensor | None = field(default=None, init=False, repr=False)
    neighbors: Tensor | None = field(default=None, init=False, repr=False)

    writes = ("cbstate.images",)
    kind = "neighbors"
    transient = (*PicturesOfImages.transient, "lines", "neighbors")

    def try_out(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for rows without labels, and for those that are no images."""
        batch = self.first_rows(learner)
        check_labelled(batch, self.features)
        as_rgb(self.shown(batch[0]), self._call, self.value_range)

    def look(self, phase: AbstractTrainingPhase, learner: Any) -> Any:
        """Return the features, the labels, and what gives the images of some rows."""
        given, source = self.rows(learner)
        features, labels = encode(learner, self.model, given, source, self.features, classes=False)

        def images(wanted: list[int]) -> dict[int, Tensor]:
            # They draw the same numbers as when they were encoded
            with drawing(stream_seed(learner.seed, f"features/{self.model}")), untouched(source):
                return self._images_at(wanted, source)

        return features, labels, images

    def _images_at(self, wanted: list[int], source: Any) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        start = 0
        for xs, ys in complete(source):
            here = [row for row in wanted if start <= row < start + len(ys)]
            if here:
                shown = self.shown(xs)
                found.update({row: shown[row - start] for row in here})
            start += len(ys)
            if start > max(wanted):
                break
        return found

    def draw(self, seen: Any, title: str) -> Tensor:
        """Find the neighbours, and draw them."""
        features, labels, images = seen
        count, k = min(self.count, len(features)), min(self.k, len(features) - 1)
        self.lines = torch.arange(count) * len(features) // count
        unit = normalize(features.flatten(1).float(), dim=1)
        likeness = (unit[self.lines.to(unit.device)] @ unit.T).cpu().nan_to_num(float("-inf"))
        likeness[torch.arange(count), self.lines] = float("-inf")
        self.neighbors = likeness.topk(k, dim=1).indices
        labels = labels.cpu()
        alike = labels[self.neighbors] == labels[self.lines][:, None]
        alike = alike.flatten(2).all(2) if alike.ndim > 2 else alike
        rows = torch.cat([self.lines[:, None], self.neighbors], 1)
        wanted = sorted(set(rows.flatten().tolist()))
        found = images(wanted)
        large = enlarged(as_rgb(torch.stack([found[row] for row in wanted]), self._call, self.value_range), 64)
        pictures = dict(zip(wanted, large, strict=True))
        frames = [[(255, 255, 255), *(RIGHT if each else WRONG for each in line)] for line in alike.tolist()]
        cells = [
            [framed(pictures[row], frame) for row, frame in zip(line, colours, strict=True)]
            for line, colours in zip(rows.tolist(), frames, strict=True)
        ]
        share = float(alike.float().mean()) if k else float("nan")
        headings = ["image", *(str(place) for place in range(1, k + 1))]
        return table(cells, headings, f"{title}, {share:.0%} of the neighbours are of the image's class")
