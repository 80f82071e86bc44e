"""Images as square patches, row by row, and back."""

from __future__ import annotations

from torch import Tensor

from fluxloop.errors import BatchError, describe


def grid_of(images: Tensor, size: int) -> tuple[int, int]:
    """Return how many patches images have, in height and width.

    Args:
        images: Shape (N, C, H, W).
        size: Height and width of a patch, a divisor of H and W.

    Raises:
        BatchError: `images` is not (N, C, H, W), or `size` does not divide H and W.

    Example:
        >>> grid_of(torch.zeros(2, 3, 8, 12), 4)
        (2, 3)
    """
    if images.ndim != 4 or images.shape[2] % size or images.shape[3] % size:
        raise BatchError(
            f"patches of {size} x {size} were asked for from {describe(images)}; expected images of shape "
            f"(N, C, H, W), H and W multiples of {size}"
        )
    return images.shape[2] // size, images.shape[3] // size


def patchify(images: Tensor, size: int, *, channels_last: bool = False) -> Tensor:
    """Cut images into square patches, row by row.

    Args:
        images: Shape (N, C, H, W).
        size: Height and width of a patch, a divisor of H and W.
        channels_last: Whether the channels of a pixel lie beside each other.

    Returns:
        Shape (N, L, C * size * size), L = H / size * W / size. A patch's numbers are in the order (C, size, size):
        all of the first channel, then the next. With `channels_last` they are in the order (size, size, C) of
        MAE's own code, which decoders that were trained elsewhere expect.

    Raises:
        BatchError: `images` is not (N, C, H, W), or `size` does not divide H and W.

    Example:
        >>> patches = patchify(torch.rand(8, 3, 12, 12), 4)
        >>> patches.shape
        torch.Size([8, 9, 48])
        >>> torch.take_along_dim(patches, torch.tensor([[0, 8]] * 8)[:, :, None], dim=1).shape  # the first and the last
        torch.Size([8, 2, 48])
    """
    tall, wide = grid_of(images, size)
    n, c = images.shape[:2]
    grid = images.reshape(n, c, tall, size, wide, size)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return grid.permute(order).reshape(n, -1, c * size * size)


def unpatchify(patches: Tensor, size: int, height: int, width: int, *, channels_last: bool = False) -> Tensor:
    """Put patches together again: the inverse of `patchify`.

    Args:
        patches: Shape (N, L, C * size * size).
        size: Height and width of a patch.
        height: H of the images.
        width: W of the images.
        channels_last: Whether the channels of a pixel lie beside each other.

    Returns:
        Shape (N, C, H, W).

    Example:
        >>> images = torch.rand(8, 3, 12, 12)
        >>> torch.equal(unpatchify(patchify(images, 4), 4, 12, 12), images)
        True
    """
    n, c = len(patches), patches.shape[2] // (size * size)
    if channels_last:
        grid = patches.reshape(n, height // size, width // size, size, size, c)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, c, height, width)
    grid = patches.reshape(n, height // size, width // size, c, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)
