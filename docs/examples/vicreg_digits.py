"""Learn features of the digits without labels, with VICReg: views alike, dimensions varied and uncorrelated.

    python docs/examples/vicreg_digits.py --epochs 40 --seed 0 --out runs/vicreg_digits

Writes DIR/result.json (how well held-out images are classified by the pixels, by random features and by the learned
ones) and the pictures DIR/probes.png, DIR/features.png and DIR/views.png.
"""

import copy
from functools import partial

import torch
from common import conv_encoder, digits, few, mlp, parse, report
from torch import Tensor

from fluxloop import FeatureStats, KNNProbe, Learner, LinearProbe, TensorBatches, TwoViews, VICRegPhase
from fluxloop.augment import add_noise, random_affine


def augment(images: Tensor) -> Tensor:
    """Turn, move and scale each image a little, and add noise."""
    return add_noise(random_affine(images, degrees=20, translate=0.12, scale=(0.75, 1.3)), 0.1)


def main() -> None:
    arguments = parse("vicreg_digits", 40, __doc__.splitlines()[0])
    train, test = digits()
    encoder, projector = conv_encoder(), mlp(256, 256, 128)
    untrained = copy.deepcopy(encoder)

    views = TwoViews(augment)
    learner = Learner(
        {"encoder": encoder, "projector": projector},
        data=(TensorBatches(*train, batch_size=128, shuffle=True, drop_last=True), test),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[
            KNNProbe("encoder"),
            KNNProbe("encoder", bank=few(train), k=5, metric="knn_100_labels"),
            LinearProbe("encoder"),
            FeatureStats("features"),
            FeatureStats("z1"),
        ],
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs, phases=[VICRegPhase(views)])

    report(arguments, history, train, test, views, {"random": untrained, "learned": encoder})


if __name__ == "__main__":
    main()
