from __future__ import annotations

import pytest
import torch

from fluxloop import DataError
from fluxloop.augment import BlockMasks, MultiBlock, RandomMasks

HOST = torch.device("cpu")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_random_masks_hide_the_same_number_of_patches_here_and_there(share: float) -> None:
    torch.manual_seed(0)
    mask = RandomMasks(share)(8, (3, 4), HOST)
    assert mask.shape == (8, 12)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [round(12 * share)] * 8
    assert share != 0.25 or len({tuple(row) for row in mask.tolist()}) > 4


def test_random_masks_draw_a_share_for_each_image_and_leave_some_as_they_are() -> None:
    torch.manual_seed(0)
    counts = RandomMasks((0.2, 0.6), unmasked=0.5)(400, (10, 10), HOST).sum(1)
    assert 0.4 < (counts == 0).float().mean() < 0.6
    hidden = counts[counts > 0]
    assert 20 <= hidden.min() < 25
    assert 55 < hidden.max() <= 60


def test_block_masks_are_rectangles_of_the_size_and_form_asked_for() -> None:
    torch.manual_seed(0)
    masks = BlockMasks(1, share=(0.1, 0.3), ratio=(0.5, 2.0))(50, (10, 14), HOST).reshape(50, 10, 14)
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide  # nothing but the rectangle
        assert rows.tolist() == list(range(rows[0], rows[0] + tall))
        assert 0.08 * 140 < tall * wide < 0.34 * 140
        assert 0.4 < tall / wide < 2.4
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 40
    several = BlockMasks(5, share=0.2)(200, (14, 14), HOST).float().mean()
    assert 0.4 < several < 0.75


def test_blocks_that_leave_no_context_say_what_to_type() -> None:
    with pytest.raises(DataError, match=r"left nothing of an image of 2 x 2 patches as a context; expected fewer"):
        MultiBlock(4, share=1.0)(3, (2, 2), HOST)


def test_blocks_of_one_batch_have_one_size_and_places_of_their_own() -> None:
    torch.manual_seed(0)
    context, blocks = MultiBlock(2, share=0.2, ratio=1.0)(6, (10, 10), HOST)
    assert blocks.shape == (6, 2, 16)
    rows, columns = blocks // 10, blocks % 10
    assert ((rows.amax(2) - rows.amin(2)) == 3).all()
    assert ((columns.amax(2) - columns.amin(2)) == 3).all()
    assert len({tuple(block) for block in blocks.flatten(0, 1).tolist()}) > 6
    assert all(row == sorted(row) for row in context.tolist())
