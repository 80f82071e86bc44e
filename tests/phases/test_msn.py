from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import Accelerator, BatchError, MSNPhase, PhaseError
from fluxloop.augment import RandomMasks
from fluxloop.losses import msn_loss
from fluxloop.testing import assert_resumes_exactly
from self_supervised import (
    Tokens,
    assert_same_training,
    crops,
    draw_crops,
    embed,
    learner_of,
    network_and_teacher,
    student_and_teacher,
    two_views,
)
from toys import augment


def models() -> dict[str, nn.Module]:
    return student_and_teacher("prototypes")


def by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    target, *others = draw_crops(xs)
    anchors = torch.cat([embed(models["student"], view) for view in others])
    with torch.no_grad():
        targets = embed(models["teacher"], target)
    return msn_loss(anchors, targets, models["prototypes"].weight, 0.2, 0.5, 2, 0.7)


def test_five_steps_equal_those_of_a_hand_written_loop_with_small_views() -> None:
    phase = MSNPhase(crops, temperature=0.2, sharpening=0.5, iterations=2, entropy=0.7)
    learner = assert_same_training(phase, models, by_hand)
    assert learner.step.anchors.shape == (12, 6)
    assert learner.step.targets.shape == (4, 6)
    assert not learner.step.targets.requires_grad


class Masked(nn.Module):
    """Gives the class token of what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        token: Tensor = self.tokens(images, mask)[0]
        return token


def masked_models() -> dict[str, nn.Module]:
    make = lambda: nn.ModuleDict({"encoder": Masked(), "projector": nn.Linear(8, 6)})  # noqa: E731
    return network_and_teacher(make, prototypes=lambda: nn.Linear(6, 5, bias=False))


def masked_by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    target, anchor = augment(xs), augment(xs)
    mask = RandomMasks(0.5)(len(xs), (4, 4), xs.device)
    student, teacher, prototypes = models.values()
    anchors = student.projector(student.encoder(anchor, mask))
    with torch.no_grad():
        targets = teacher.projector(teacher.encoder(target))
    return msn_loss(anchors, targets, prototypes.weight)


def test_five_steps_with_masks_hide_patches_of_the_anchors_and_not_of_the_target() -> None:
    phase = MSNPhase(two_views, patch_size=2, masks=RandomMasks(0.5))
    learner = assert_same_training(phase, masked_models, masked_by_hand)
    assert [mask.sum(1).tolist() for mask in learner.step.masks] == [[8] * 4]


def test_masks_without_a_size_of_patches_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(PhaseError, match="expected both, to hide patches, or none"):
        MSNPhase(masks=RandomMasks(0.5))
    for options in ({"sharpening": 0}, {"iterations": -1}, {"entropy": -1}, {"num_global": 0}):
        with pytest.raises(PhaseError, match=r"MSNPhase\(.* was given; expected"):
            MSNPhase(**options)
    with pytest.raises(BatchError, match="expected 3 global ones"):
        learner_of(models(), None).fit(1, phases=[MSNPhase(two_views, num_global=3)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_with_masks_goes_on_to_the_bit(accumulate: int) -> None:
    assert_resumes_exactly(
        lambda: learner_of(masked_models(), None, accelerator=Accelerator("cpu", accumulate=accumulate)),
        phases=lambda: [MSNPhase(two_views, patch_size=2, masks=RandomMasks(0.5))],
        at=[1, 4, 8],
    )
