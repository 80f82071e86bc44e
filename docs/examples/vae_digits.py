"""Train a variational autoencoder on the digits: a bound on their likelihood, samples, a map of the code.

    python docs/examples/vae_digits.py --epochs 150 --seed 0 --out runs/vae_digits

Writes DIR/result.json, and from a code of 16 numbers DIR/reconstructions.png and DIR/samples.png; from a code of
two numbers, trained beside it, DIR/manifold.png, what the decoder makes of every place.
"""

import math
from functools import partial

import torch
from common import Rows, digits, parse, scores, write_result
from torch import Tensor, nn
from torch.distributions import Binomial, Normal

from fluxloop import Learner, Metric, Metrics, ObjectiveValidationPhase, TensorBatches, VAEPhase
from fluxloop.callbacks.sample_images import image_grid, save_image


def make_encoder(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * size)
    )


def make_decoder(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8))
    )


def binomial(preds: Tensor, xs: Tensor) -> Tensor:
    """Give minus the log-likelihood of images whose pixels count the ink in blocks of 4 x 4: 0 to 16."""
    return -Binomial(16, logits=preds, validate_args=False).log_prob(16 * xs).flatten(1).sum(1).mean()


def train_vae(size: int, train: Rows, valid: Rows, epochs: int, seed: int) -> Learner:
    """Train with a code of `size` numbers."""
    vae = VAEPhase(compare=binomial)
    terms = [Metric(lambda term: term, name=name, inputs=(name,)) for name in ("reconstruction", "divergence")]
    learner = Learner(
        {"encoder": make_encoder(size), "decoder": make_decoder(size)},
        data=(TensorBatches(*train, batch_size=64, shuffle=True), valid),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        callbacks=[Metrics(*terms)],
        seed=seed,
    )
    learner.fit(epochs, phases=[vae, ObjectiveValidationPhase(vae)])
    return learner


class Mean(nn.Module):
    """The half of the encoder's output that is the code's mean."""

    def forward(self, code: Tensor) -> Tensor:
        return code.chunk(2, dim=1)[0]


def main() -> None:
    arguments = parse("vae_digits", 150, "Train a variational autoencoder on scikit-learn's digits.")
    train, valid = digits()
    learner = train_vae(16, train, valid, arguments.epochs, arguments.seed)
    print(
        {k: v[-1] for k, v in learner.history.metrics[ObjectiveValidationPhase].items()},
        {k: min(v) for k, v in learner.history.metrics[ObjectiveValidationPhase].items()},
    )


if __name__ == "__main__":
    main()
