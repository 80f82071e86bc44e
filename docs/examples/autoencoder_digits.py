"""Train an autoencoder on the digits with a code of two numbers, and draw a map of it.

    python docs/examples/autoencoder_digits.py --epochs 100 --seed 0 --out runs/autoencoder_digits

The target of the training is its input, and what the model predicts is the code. Writes DIR/result.json, which has
the same numbers for the two first principal components, DIR/code.png and DIR/reconstructions.png.
"""

from functools import partial
from pathlib import Path

import torch
from common import digits, parse, write_result
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import pad

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


def neighbors(codes: Tensor, classes: Tensor, queries: Tensor, answers: Tensor) -> float:
    """Give the share of queries that their ten nearest neighbours among the codes classify rightly."""
    return KNeighborsClassifier(10).fit(codes, classes).score(queries, answers)


def draw_maps(maps: dict[str, Tensor], classes: Tensor, path: Path) -> None:
    """Draw codes of two numbers as points, coloured by class."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (title, codes) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        points = axes.scatter(*codes.T, c=classes, cmap="tab10", s=10)
        axes.set(title=title, xticks=[], yticks=[])
    figure.legend(*points.legend_elements(), loc="outside right center")
    figure.savefig(path, dpi=80)


def main() -> None:
    arguments = parse("autoencoder_digits", 150, "Train an autoencoder on scikit-learn's digits.")
    train, valid = digits()
    autoencoder = AutoencoderPhase()
    validation = ObjectiveValidationPhase(autoencoder)
    learner = Learner(
        Autoencoder(),
        data=(TensorBatches(*train, batch_size=64, shuffle=True), valid),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs, phases=[autoencoder, validation])

    codes, held_out = learner.predict(train), learner.predict(valid)  # what Autoencoder.predict gives
    preds = learner.predict(valid, phase=validation)  # what the phase stores: reconstructions
    rows, held_out_rows = train[0].flatten(1), valid[0].flatten(1)
    pca = PCA(2).fit(rows)
    plane, held_out_plane = (torch.tensor(pca.transform(images)) for images in (rows, held_out_rows))
    write_result(
        arguments,
        autoencoder={
            "training_error": history["training/loss"][-1],
            "error": learner.evaluate(phase=validation)["loss"],
            "knn": neighbors(codes, train[1], held_out, valid[1]),
        },
        principal_components={
            "error": float(((pca.inverse_transform(held_out_plane) - held_out_rows.numpy()) ** 2).mean()),
            "knn": neighbors(plane, train[1], held_out_plane, valid[1]),
        },
        pixels={"knn": neighbors(rows, train[1], held_out_rows, valid[1])},
    )
    draw_maps({"autoencoder": held_out, "principal components": held_out_plane}, valid[1], arguments.out / "code.png")
    pair = [pad(image_grid(images[:64]), (0, 3), value=255) for images in (valid[0], preds)]
    save_image(torch.cat(pair, dim=2), arguments.out / "reconstructions.png")


if __name__ == "__main__":
    main()
