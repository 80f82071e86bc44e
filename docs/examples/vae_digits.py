"""Train variational autoencoders on the digits: how likely held-out images are, samples, and a map of the code.

    python docs/examples/vae_digits.py --epochs 150 --seed 0 --out runs/vae_digits

Writes DIR/result.json. From a code of ten numbers: DIR/reconstructions.png (held-out images, and on the right what
the code keeps of them) and what the decoder makes of random codes as training goes on, DIR/samples/. From a code of
two numbers: what the decoder makes of every place, DIR/map/.
"""

from functools import partial

import torch
from common import Rows, digits, neighbors, parse, write_result
from torch import Tensor, nn
from torch.distributions import Binomial, Normal
from torch.nn.functional import pad

from fluxloop import KNNProbe, Learner, Metric, Metrics, ObjectiveValidationPhase, SampleImages, TensorBatches, VAEPhase
from fluxloop.callbacks.sample_images import image_grid, save_image


def make_encoder(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * size)
    )


def make_decoder(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8))
    )


def binomial(preds: Tensor, images: Tensor) -> Tensor:
    """Give minus the log-likelihood of images whose pixels count the ink in blocks of 4 x 4, 0 to 16."""
    return -Binomial(16, logits=preds).log_prob(16 * images).flatten(1).sum(1).mean()


def code(encoder: nn.Module, images: Tensor) -> Tensor:
    """Give the mean of the code, without its variance."""
    return encoder(images).chunk(2, dim=1)[0]


def draw(decoder: nn.Module, codes: Tensor) -> Tensor:
    """Give the images that codes stand for."""
    return decoder(codes).sigmoid()


def train_vae(
    size: int, train: Rows, valid: Rows, epochs: int, seed: int, pictures: SampleImages
) -> tuple[Learner, dict[str, float]]:
    """Train with a code of `size` numbers; give the learner, and what it reaches on held-out images."""
    vae = VAEPhase(compare=binomial)
    validation = ObjectiveValidationPhase(vae)
    terms = [Metric(torch.clone, name=entry, inputs=(entry,)) for entry in ("reconstruction", "divergence")]
    learner = Learner(
        {"encoder": make_encoder(size), "decoder": make_decoder(size)},
        data=(TensorBatches(*train, batch_size=64, shuffle=True), TensorBatches(*valid, batch_size=512)),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        callbacks=[Metrics(*terms), KNNProbe("encoder", features=code), pictures],
        seed=seed,
    )
    history = learner.fit(epochs, phases=[vae, validation])
    return learner, {**learner.evaluate(phase=validation), "knn": history["validation/knn_encoder"][-1]}


def histograms(train: Tensor, valid: Tensor) -> float:
    """Give minus the log-likelihood of held-out images under each pixel's histogram over the training images."""
    counts = torch.stack([(16 * train == ink).sum(0) + 1 for ink in range(17)])
    return -(counts / counts.sum(0)).log().gather(0, (16 * valid).long()).flatten(1).sum(1).mean().item()


def main() -> None:
    arguments = parse("vae_digits", 150, "Train variational autoencoders on scikit-learn's digits.")
    epochs, seed, out = arguments.epochs, arguments.seed, arguments.out
    train, valid = digits()
    sample = partial(SampleImages, "decoder", make=draw, every=max(1, epochs // 6))

    samples = sample(inputs=torch.randn(64, 10), folder=out / "samples")
    learner, ten_numbers = train_vae(10, train, valid, epochs, seed, samples)
    step = learner.step  # of the last validation, where all held-out images are one batch
    pair = [pad(image_grid(images[:64]), (0, 3), value=255) for images in (step.xs, step.preds.sigmoid())]
    save_image(torch.cat(pair, dim=2), out / "reconstructions.png")

    places = Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 16))
    every_place = torch.cartesian_prod(places, places)
    _, two_numbers = train_vae(
        2, train, valid, epochs, seed, sample(inputs=every_place, count=256, columns=16, folder=out / "map")
    )

    pixels = {
        "loss": histograms(train[0], valid[0]),
        "knn": neighbors(train[0].flatten(1), train[1], valid[0].flatten(1), valid[1], k=20),
    }
    write_result(arguments, ten_numbers=ten_numbers, two_numbers=two_numbers, pixels=pixels)


if __name__ == "__main__":
    main()
