"""Learn an embedding of the digits from triplets: an image, another of its class, one of another class.

    python docs/examples/triplet_digits.py --epochs 12 --seed 0 --out runs/triplet_digits

Writes DIR/result.json (how well neighbours classify held-out images by raw pixels, by the
embedding of a random network and by the learned one, also for classes that no triplet showed) and
DIR/triplet_embedding.png.
"""

import copy
from functools import partial

import torch
from common import Rows, conv_encoder, digits, features_of, parse, scores, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import normalize, pairwise_distance
from torch.utils.data import Dataset

from fluxloop import History, KNNProbe, Learner, Metric, Metrics, ObjectiveValidationPhase, TripletPhase


class Triplets(Dataset):
    """Triplets ``(anchor, positive, negative)`` of images, the last two drawn anew each time; no target."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        same = self.classes == self.classes[row]
        other = ~same
        same[row] = False
        positive, negative = torch.multinomial(torch.stack([same, other]).float(), 1).flatten()
        return self.images[row], self.images[positive], self.images[negative]


class UnitLength(nn.Module):
    """Rows of length 1, so that distances compare directions."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalise rows, (N, D)."""
        return normalize(features, dim=1)


def in_order(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Give the share of triplets whose positive is nearer than their negative."""
    return (pairwise_distance(anchor, positive) < pairwise_distance(anchor, negative)).float().mean()


def learn(model: nn.Module, train: Rows, test: Rows, epochs: int, seed: int) -> History:
    phase = TripletPhase(margin=1.0)
    learner = Learner(
        model,
        data=(Triplets(*train), Triplets(*test)),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        callbacks=[
            Metrics(Metric(in_order, inputs=("features", "z_positive", "z_negative"))),
            KNNProbe(bank=train, queries=test),
        ],
        seed=seed,
    )
    return learner.fit(epochs, phases=[phase, ObjectiveValidationPhase(phase)])


def only(rows: Rows, classes: range) -> Rows:
    """Keep the images of some classes."""
    images, labels = rows
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return images[chosen], labels[chosen]


def plane(rows: Tensor) -> Tensor:
    """Give the first two principal components, (N, 2)."""
    centred = rows.flatten(1) - rows.flatten(1).mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def main() -> None:
    arguments = parse("triplet_digits", 12, __doc__.splitlines()[0])
    train, test = digits()
    random = nn.Sequential(conv_encoder(), nn.Linear(256, 16), UnitLength())
    learned, learned_of_half = copy.deepcopy(random), copy.deepcopy(random)
    history = learn(learned, train, test, arguments.epochs, arguments.seed)
    first, last = range(5), range(5, 10)
    learn(learned_of_half, only(train, first), only(test, first), arguments.epochs, arguments.seed)

    encoders = {"pixels": None, "random": random}
    results = {name: scores(train, test, encoder) for name, encoder in {**encoders, "learned": learned}.items()}
    unseen = {
        name: scores(only(train, last), only(test, last), encoder)["knn"]
        for name, encoder in {**encoders, "learned": learned_of_half}.items()
    }
    in_order = history["validation/in_order"][-1]
    write_result(arguments, **results, triplets_in_order=in_order, knn_of_unseen_classes=unseen)
    images, labels = test
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = {"pixels": images, "learned embedding": features_of(learned, images)}
    for axes, (title, rows) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        points = axes.scatter(*plane(rows).T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=12)
        axes.set(title=f"{title}: first two components", xticks=[], yticks=[])
    figure.colorbar(points, ticks=range(10), label="class")
    figure.savefig(arguments.out / "triplet_embedding.png", dpi=100)


if __name__ == "__main__":
    main()
