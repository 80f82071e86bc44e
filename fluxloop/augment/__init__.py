"""Views of rows, random changes of images, and masks, drawn for each row of a batch.

- ``views``: several views of each row, for a phase or a dataset.
- ``per_row``: crops, flips, colours and blur, each drawn for each image of a batch, on its device.
- ``patches``: images as square patches, and back.
- ``masks``: what is hidden from a network.
- ``adaptive``: changes of what a critic sees, with a probability that follows its scores.
"""

from fluxloop.augment.adaptive import AdaptiveAugment
from fluxloop.augment.masks import BlockMasks, MultiBlock, RandomMasks
from fluxloop.augment.patches import grid_of, patchify, unpatchify
from fluxloop.augment.per_row import (
    add_noise,
    color_jitter,
    gaussian_blur,
    random_affine,
    random_flip,
    random_grayscale,
    random_resized_crop,
)
from fluxloop.augment.views import MultiCrop, TwoViews, ViewDataset, draws_once

__all__ = [
    "AdaptiveAugment",
    "BlockMasks",
    "MultiBlock",
    "MultiCrop",
    "RandomMasks",
    "TwoViews",
    "ViewDataset",
    "add_noise",
    "color_jitter",
    "draws_once",
    "gaussian_blur",
    "grid_of",
    "patchify",
    "random_affine",
    "random_flip",
    "random_grayscale",
    "random_resized_crop",
    "unpatchify",
]
