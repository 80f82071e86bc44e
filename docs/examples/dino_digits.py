"""Learn features of the digits without labels, with DINO: say of a small crop what a teacher says of the whole.

    python docs/examples/dino_digits.py --epochs 45 --seed 0 --out runs/dino_digits

Writes DIR/result.json (how well held-out images are classified by the pixels, by random features and by the learned
ones) and the pictures DIR/probes.png, DIR/features.png and DIR/views.png.
"""

import copy
from functools import partial

import torch
from common import conv_encoder, digits, few, mlp, parse, report
from torch import Tensor, nn
from torch.nn.functional import normalize

from fluxloop import (
    EMA,
    DINOPhase,
    FeatureStats,
    KNNProbe,
    Learner,
    LinearProbe,
    MultiCrop,
    TensorBatches,
    cosine,
    linear,
)
from fluxloop.augment import add_noise, random_affine


def whole(images: Tensor) -> Tensor:
    """Turn, move and scale each image a little, and add noise."""
    return add_noise(random_affine(images, degrees=15, translate=0.12, scale=(0.85, 1.2)), 0.1)


def part(images: Tensor) -> Tensor:
    """Show a part of each image, in 6 x 6 pixels."""
    return add_noise(random_affine(images, degrees=15, translate=0.15, scale=(1.1, 1.6), size=6), 0.1)


class Head(nn.Module):
    """DINO's head: a perceptron, and the cosines of its normalised output with prototypes."""

    def __init__(self, features: int, prototypes: int) -> None:
        super().__init__()
        self.bottleneck = mlp(features, 256, 64)
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, features: Tensor) -> Tensor:
        """Give scores of the prototypes, (N, K)."""
        return normalize(self.bottleneck(features), dim=1) @ normalize(self.prototypes, dim=1).T


def main() -> None:
    arguments = parse("dino_digits", 45, __doc__.splitlines()[0])
    train, test = digits()
    batches = TensorBatches(*train, batch_size=128, shuffle=True, drop_last=True)
    steps = arguments.epochs * len(batches)
    student = nn.ModuleDict({"encoder": conv_encoder(), "projector": Head(256, prototypes=128)})
    untrained = copy.deepcopy(student.encoder)

    crops = MultiCrop(whole, part, num_local=2)
    dino = DINOPhase(crops, teacher_temperature=linear(steps // 3, 0.03, 0.05))
    teacher = copy.deepcopy(student).requires_grad_(False)
    learner = Learner(
        {"student": student, "teacher": teacher},
        data=(batches, test),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[
            EMA("student", cosine(steps, 0.98, 1.0), into="teacher"),
            KNNProbe("teacher.encoder"),
            KNNProbe("teacher.encoder", bank=few(train), k=5, metric="knn_100_labels"),
            LinearProbe("student.encoder"),
            FeatureStats("features"),
        ],
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs, phases=[dino])

    encoders = {"random": untrained, "learned": teacher.encoder, "student": student.encoder}
    report(arguments, history, train, test, crops, encoders)


if __name__ == "__main__":
    main()
