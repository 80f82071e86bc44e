"""Train two GANs on the digits, WGAN-GP and a hinge loss with R1, and measure what they draw.

    python docs/examples/gan_digits.py --epochs 120 --seed 0 --out runs/gan_digits

Writes DIR/result.json, DIR/samples.png (real images, then those of either GAN) and, as training goes on, what the
averaged generator makes of the same noise: DIR/wasserstein/generator@ema-0020.png and so on, DIR/hinge/...
"""

import argparse
import math
from functools import partial

import torch
from common import Rows, conv_encoder, digits, features_of, parse, write_result
from torch import Tensor, nn
from torch.nn.functional import pad

from fluxloop import EMA, GANPhase, Learner, Metric, Metrics, SampleImages, TensorBatches, accuracy
from fluxloop.callbacks.sample_images import image_grid, save_image

NOISE = 32


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 64 * 2 * 2),
        nn.Unflatten(1, (64, 2, 2)),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
        nn.Sigmoid(),
    )


def make_critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 1),
    )


def train_gan(phase: GANPhase, images: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Train a GAN on images; give as many that its averaged generator makes."""
    name = phase.adversarial.name
    learner = Learner(
        {"generator": make_generator(), "critic": make_critic()},
        data=(TensorBatches(images, batch_size=64, shuffle=True, drop_last=True),),
        optimizer=partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.9)),
        callbacks=[
            EMA("generator", 0.995),
            SampleImages("generator@ema", folder=arguments.out / name, every=max(1, arguments.epochs // 6)),
        ],
        seed=arguments.seed,
    )
    learner.fit(arguments.epochs, phases=[phase])
    noise = torch.randn(len(images), NOISE, device=learner.accelerator.device)
    return learner.weights["generator@ema"](noise).cpu()


def confidence(preds: Tensor) -> Tensor:
    """Give the mean probability of what a classifier holds for the likeliest class."""
    return preds.softmax(1).amax(1).mean()


def train_judge(train: Rows, valid: Rows, arguments: argparse.Namespace) -> tuple[nn.Sequential, dict[str, float]]:
    """Train a classifier, whose 32 features images are compared by; give it and its scores on held-out images."""
    features = nn.Sequential(conv_encoder(), nn.Linear(256, 32))
    judge = nn.Sequential(features, nn.ReLU(), nn.Linear(32, 10))
    learner = Learner(
        judge,
        nn.CrossEntropyLoss(),
        data=(TensorBatches(*train, batch_size=64, shuffle=True), valid),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[Metrics(accuracy, Metric(confidence, inputs=("preds",)))],
        seed=arguments.seed,
    )
    learner.fit(min(arguments.epochs, 15))
    return judge, learner.evaluate()


def frechet(a: Tensor, b: Tensor) -> float:
    """Give the Fréchet distance of two sets of features, shape (N, F), each taken for normally distributed."""
    mean, other_mean, cov, other_cov = a.mean(0), b.mean(0), a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(cov @ other_cov).real.clamp(min=0).sqrt()  # the eigenvalues of the product's root
    return ((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * root.sum()).item()


def measure(judge: nn.Sequential, images: Tensor, real: Tensor) -> dict[str, float]:
    """Compare images with real ones, and tell which classes there are (those of at least 2 % of the images)."""
    logits = features_of(judge, images)
    share = logits.argmax(1).bincount(minlength=10) / len(images)
    return {
        "frechet": frechet(features_of(judge[0], images), features_of(judge[0], real)),
        "classes": int((share >= 0.02).sum()),
        "evenness": torch.special.entr(share).sum().item() / math.log(10),
        "confidence": confidence(logits).item(),
    }


def main() -> None:
    arguments = parse("gan_digits", 120, "Train two GANs on scikit-learn's digits.")
    train, valid = digits()
    judge, scores = train_judge(train, valid, arguments)
    result: dict[str, object] = {"judge": scores, "real": measure(judge, train[0], valid[0])}
    pictures = [train[0]]
    for phase in (
        GANPhase("wasserstein", noise=NOISE, gradient_penalty=10),
        GANPhase("hinge", noise=NOISE, r1=0.1),
    ):
        images = train_gan(phase, train[0], arguments)
        result[phase.adversarial.name] = measure(judge, images, valid[0])
        pictures.append(images)
    grids = [pad(image_grid(images[:64]), (0, 3), value=255) for images in pictures]
    save_image(torch.cat(grids, dim=2), arguments.out / "samples.png")
    write_result(arguments, **result)


if __name__ == "__main__":
    main()
