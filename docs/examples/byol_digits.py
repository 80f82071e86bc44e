"""Learn features of the digits without labels, with BYOL: predict what one's own moving average says.

    python docs/examples/byol_digits.py --epochs 40 --seed 0 --out runs/byol_digits

Writes DIR/result.json (how well held-out images are classified by the pixels, by random features and by the learned
ones) and the pictures DIR/probes.png, DIR/features.png and DIR/views.png.
"""

import copy
from functools import partial

import torch
from common import conv_encoder, digits, few, mlp, parse, report
from torch import Tensor, nn

from fluxloop import EMA, BYOLPhase, FeatureStats, KNNProbe, Learner, LinearProbe, TensorBatches, TwoViews, cosine
from fluxloop.augment import add_noise, random_affine


def augment(images: Tensor) -> Tensor:
    """Turn, move and scale each image a little, and add noise."""
    return add_noise(random_affine(images, degrees=20, translate=0.12, scale=(0.75, 1.3)), 0.1)


def main() -> None:
    arguments = parse("byol_digits", 40, __doc__.splitlines()[0])
    train, test = digits()
    batches = TensorBatches(*train, batch_size=128, shuffle=True, drop_last=True)
    student = nn.ModuleDict({"encoder": conv_encoder(), "projector": mlp(256, 512, 256)})
    untrained = copy.deepcopy(student.encoder)

    views = TwoViews(augment)
    teacher = copy.deepcopy(student).requires_grad_(False)
    learner = Learner(
        {"student": student, "teacher": teacher, "predictor": mlp(256, 512, 256)},
        data=(batches, test),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[
            EMA("student", cosine(arguments.epochs * len(batches), 0.9, 1.0), into="teacher"),
            KNNProbe("teacher.encoder"),
            KNNProbe("teacher.encoder", bank=few(train), k=5, metric="knn_100_labels"),
            LinearProbe("student.encoder"),
            FeatureStats("features"),
            FeatureStats("p1"),
        ],
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs, phases=[BYOLPhase(views)])

    encoders = {"random": untrained, "learned": teacher.encoder, "student": student.encoder}
    report(arguments, history, train, test, views, encoders)


if __name__ == "__main__":
    main()
