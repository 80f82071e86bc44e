"""Train an autoencoder on the digits with a code of two numbers, and draw a map of it.

    python docs/examples/autoencoder_digits.py --epochs 100 --seed 0 --out runs/autoencoder_digits

The target of the training is its input, and what the model predicts is the code. Writes DIR/result.json, which has
the same numbers for the two first principal components, DIR/code.png and DIR/reconstructions.png.
"""

from functools import partial
from pathlib import Path

import torch
from common import Rows, digits, parse, write_result
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fluxloop import AutoencoderPhase, Learner, ObjectiveValidationPhase, TensorBatches
from fluxloop.callbacks.sample_images import image_grid, save_image


class Autoencoder(nn.Module):
    """Two numbers for an image, and an image for two numbers; what it predicts is the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
        )
        self.decoder = nn.Sequential(
            nn.Linear(2, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )

    def predict(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def neighbors(train: Tensor, train_classes: Tensor, valid: Tensor, valid_classes: Tensor) -> float:
    """Give the share of held-out rows that their five nearest neighbours classify rightly."""
    return float(KNeighborsClassifier(5).fit(train, train_classes).score(valid, valid_classes))


def scatter(codes: dict[str, Tensor], classes: Tensor, path: Path) -> None:
    """Draw maps of codes of two numbers, coloured by class."""
    figure = Figure(figsize=(5 * len(codes), 5), layout="constrained")
    for axes, (title, code) in zip(figure.subplots(1, len(codes)), codes.items(), strict=True):
        points = axes.scatter(*code.T, c=classes, cmap="tab10", s=14)
        axes.set(title=title, xticks=[], yticks=[])
    figure.legend(*points.legend_elements(), loc="outside right center")
    figure.savefig(path, dpi=80)


def main() -> None:
    arguments = parse("autoencoder_digits", 100, "Train an autoencoder on scikit-learn's digits.")
    train, valid = digits()
    phase = AutoencoderPhase()
    learner = Learner(
        Autoencoder(),
        data=(TensorBatches(*train, batch_size=64, shuffle=True), valid),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        seed=arguments.seed,
    )
    learner.fit(arguments.epochs, phases=[phase, ObjectiveValidationPhase(phase)])


if __name__ == "__main__":
    main()
