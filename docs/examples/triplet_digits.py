"""Learn an embedding of the digits from triplets: an image, another of its class, one of another class.

    python docs/examples/triplet_digits.py --epochs 20 --seed 0 --out runs/triplet_digits

Writes DIR/result.json (how well nearest neighbours classify held-out images by raw pixels, by the
untrained network's embedding and by the learned one) and DIR/triplet_embedding.png.
"""

import copy
from functools import partial

import torch
from common import conv_encoder, digits, parse, scores, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import pairwise_distance
from torch.utils.data import Dataset

from fluxloop import KNNProbe, Learner, Metric, Metrics, ObjectiveValidationPhase, TripletPhase


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


def in_order(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Give the share of triplets whose positive is nearer than their negative."""
    return (pairwise_distance(anchor, positive) < pairwise_distance(anchor, negative)).float().mean()


def plane(features: Tensor) -> Tensor:
    """Give the first two principal components, (N, 2)."""
    centred = features.flatten(1) - features.flatten(1).mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def main() -> None:
    arguments = parse("triplet_digits", 20, __doc__.splitlines()[0])
    train, test = digits()
    model = nn.Sequential(conv_encoder(), nn.Linear(256, 16))
    untrained = copy.deepcopy(model)
    phase = TripletPhase(margin=1.0)
    learner = Learner(
        model,
        data=(Triplets(*train), Triplets(*test)),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        callbacks=[
            Metrics(Metric(in_order, inputs=("features", "z_positive", "z_negative"))),
            KNNProbe(bank=train, queries=test),
        ],
        seed=arguments.seed,
    )
    learner.fit(arguments.epochs, phases=[phase, ObjectiveValidationPhase(phase)])
    for name, s in (
        ("pixels", scores(train, test)),
        ("untrained", scores(train, test, untrained)),
        ("learned", scores(train, test, model)),
    ):
        print(name, s)


if __name__ == "__main__":
    main()
