"""Train a masked autoencoder on the digits: draw the half of an image that was hidden.

    python docs/examples/mae_digits.py --epochs 200 --seed 0 --out runs/mae_digits

Writes DIR/result.json (the error where patches were hidden, and what the encoder's features are worth) and
DIR/reconstructions.png (held-out images, what the network sees of them, what it draws).
"""

import copy
from functools import partial

import torch
from common import digits, parse, scores, write_result
from torch import Tensor, nn
from torch.nn.functional import pad

from fluxloop import KNNProbe, Learner, MAEPhase, ObjectiveValidationPhase, TensorBatches
from fluxloop.augment import patchify, unpatchify
from fluxloop.callbacks.sample_images import image_grid, save_image
from fluxloop.losses import masked_mse

PATCH = 2
COUNT = (8 // PATCH) ** 2


def transformer(size: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(size), enable_nested_tensor=False)


class Encoder(nn.Module):
    """A transformer over the patches that are there, each with its place."""

    def __init__(self, size: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, size)
        self.position = nn.Parameter(0.1 * torch.randn(COUNT, size))
        self.blocks = transformer(size, depth)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        return self.blocks(self.embed(patches) + self.position[places])


class Decoder(nn.Module):
    """A smaller one over all places, with the same learned token at each that was hidden."""

    def __init__(self, size: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Parameter(0.1 * torch.randn(size))
        self.position = nn.Parameter(0.1 * torch.randn(COUNT, size))
        self.blocks = transformer(size, depth)
        self.head = nn.Linear(size, PATCH * PATCH)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        everywhere = self.hidden.expand(len(tokens), COUNT, -1)
        everywhere = everywhere.scatter(1, places.unsqueeze(2).expand_as(tokens), tokens)
        return self.head(self.blocks(everywhere + self.position))


class WholeImage(nn.Module):
    """The features that an encoder has of an image of which nothing is hidden: its mean token."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        places = torch.arange(COUNT, device=images.device).expand(len(images), -1)
        return self.encoder(patchify(images, PATCH), places).mean(1)


def nearest(train: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    """Give for each image the training image that is most like it where nothing is hidden."""
    errors = (train.unsqueeze(1) - patches).square().sum(-1)  # (training images, images, places)
    return train[(errors * ~mask).sum(-1).argmin(0)]


def main() -> None:
    arguments = parse("mae_digits", 200, "Train a masked autoencoder on scikit-learn's digits.")
    train, valid = digits()
    encoder = Encoder()
    encoders = {"pixels": None, "random": WholeImage(copy.deepcopy(encoder)), "learned": WholeImage(encoder)}

    mae = MAEPhase(PATCH, mask_ratio=0.5)
    learner = Learner(
        {"encoder": encoder, "decoder": Decoder()},
        data=(TensorBatches(*train, batch_size=128, shuffle=True), TensorBatches(*valid, batch_size=512)),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        callbacks=[KNNProbe("encoder", features=lambda encoder, images: WholeImage(encoder)(images), every=10)],
        seed=arguments.seed,
    )
    learner.fit(arguments.epochs, phases=[mae, ObjectiveValidationPhase(mae)])

    step = learner.step  # of the last validation, where all held-out images are one batch
    patches, mask = step.patches, step.mask
    known = patchify(train[0].to(patches.device), PATCH)
    guesses = {
        "mean_patch": known.mean(0).expand_as(patches),
        "nearest_image": nearest(known, patches, mask),
        "learned": step.preds,
    }
    write_result(
        arguments,
        masked_error={name: masked_mse(guess, patches, mask).item() for name, guess in guesses.items()},
        features={name: scores(train, valid, encoder) for name, encoder in encoders.items()},
    )
    hidden = mask.unsqueeze(2)
    columns = patches, patches.where(~hidden, 0.5), patches.where(~hidden, step.preds)
    images = [unpatchify(column[:48], PATCH, 8, 8) for column in columns]
    grids = [pad(image_grid(column, 6, (0, 1)), (0, 3), value=255) for column in images]
    save_image(torch.cat(grids, dim=2), arguments.out / "reconstructions.png")


if __name__ == "__main__":
    main()
