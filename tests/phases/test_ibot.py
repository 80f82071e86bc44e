"""iBOT and DINOv2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fluxloop import (
    EMA,
    Accelerator,
    BatchError,
    DINOv2Phase,
    IBOTPhase,
    LearningRate,
    MultiCrop,
    PhaseError,
    Scheduler,
    Unfreeze,
    cosine,
    linear,
    one_cycle,
    stream_seed,
)
from fluxloop.augment import RandomMasks
from fluxloop.hyperparameters import WeightDecay
from fluxloop.losses import dino_loss, ibot_loss, koleo_loss, masked_code_loss, sinkhorn, swav_loss
from fluxloop.testing import assert_resumes_exactly
from self_supervised import SEED, assert_goes_on, assert_same_training, globally, heads, learner_of, network_and_teacher
from toys import image_batches

crops = MultiCrop(globally, lambda xs: globally(xs)[:, :, :6, :6], num_local=1)
MASKS = RandomMasks((0.2, 0.6), unmasked=0.4)


def tied() -> dict[str, nn.Module]:
    return network_and_teacher(lambda: heads("projector"))


def untied() -> dict[str, nn.Module]:
    return network_and_teacher(lambda: heads("projector", "patch_projector"))


class ByHand:
    """Write iBOT's loop: masked global crops, two centres and two temperatures."""

    def __init__(self, temperature: Any) -> None:
        self.centers = [torch.zeros(5), torch.zeros(5)]
        self.temperature = temperature

    def outputs(self, models: Any, xs: Tensor, patch: str = "projector") -> None:
        views = list(crops(xs))
        self.masks = [MASKS(len(xs), (4, 4), xs.device) for _ in range(2)]
        student, teacher = models["student"], models["teacher"]
        self.tokens, self.cls, self.patches = [], [], []
        for view, mask in zip(views, [*self.masks, None], strict=True):
            token, patches = student.encoder(view, mask)
            self.cls.append(student.projector(token))
            if mask is not None:
                self.tokens.append(token)
                self.patches.append(student[patch](patches))
        with torch.no_grad():
            said = [teacher.encoder(view) for view in views[:2]]
            self.said = [teacher.projector(token) for token, _ in said]
            self.said_patches = [teacher[patch](patches) for _, patches in said]

    def loss(self, models: Any, xs: Tensor, step: int) -> Tensor:
        self.outputs(models, xs)
        temperature = torch.tensor(self.temperature(step))
        whole = dino_loss(self.cls, self.said, self.centers[0], 0.1, temperature)
        triples = zip(self.patches, self.said_patches, self.masks, strict=True)
        warm = torch.tensor(linear(5, 0.2, 0.3)(step))
        terms = [ibot_loss(guess, said, mask, self.centers[1], 0.1, warm) for guess, said, mask in triples]
        return whole + 0.5 * torch.stack(terms).mean()

    def after(self) -> None:
        both = torch.cat([torch.cat(self.said), torch.cat([each.mean(1) for each in self.said_patches])], 1).mean(0)
        self.centers = [
            0.8 * center + each * (1 - 0.8) for center, each in zip(self.centers, both.split(5), strict=True)
        ]


def ibot() -> IBOTPhase:
    temperature = linear(5, 0.05, 0.1)
    options = {"teacher_temperature": temperature, "center_momentum": 0.8, "patch_weight": 0.5}
    options["patch_temperature"] = linear(5, 0.2, 0.3)
    return IBOTPhase(crops, patch_size=2, masks=MASKS, **options)


def test_five_steps_of_ibot_equal_those_of_a_hand_written_loop() -> None:
    hand, phase = ByHand(linear(5, 0.05, 0.1)), ibot()
    learner = assert_same_training(phase, tied, hand.loss, hand.after)
    torch.testing.assert_close(phase.center, hand.centers[0])
    torch.testing.assert_close(phase.patch_center, hand.centers[1])
    assert not torch.allclose(phase.center, phase.patch_center)
    step = learner.step
    assert [tuple(each.shape) for each in step.student] == [(4, 5)] * 3
    assert [tuple(each.shape) for each in step.student_patches] == [(4, 16, 5)] * 2
    assert not any(each.requires_grad for each in (*step.teacher, *step.teacher_patches))


def test_the_share_that_is_hidden_is_each_images_own_and_some_see_all() -> None:
    learner = learner_of(tied(), None)
    learner.fit(1, phases=[IBOTPhase(crops, patch_size=2)])
    counts = torch.stack(learner.step.masks).sum(-1)
    assert ((counts == 0) | ((counts >= 2) & (counts <= 8))).all()
    assert len({*counts.flatten().tolist()}) > 2


def papers_dinov2(models: Any, xs: Tensor, step: int) -> Tensor:
    """Write the parts of the authors' loss with their sums."""
    hand = ByHand(None)
    hand.outputs(models, xs, "patch_projector")
    codes = sinkhorn(torch.cat(hand.said), 0.06)
    hidden = torch.cat([mask.flatten() for mask in hand.masks])
    said = torch.cat([each.flatten(0, 1) for each in hand.said_patches])
    patch_codes = torch.zeros_like(said)
    patch_codes[hidden] = sinkhorn(said[hidden], 0.06)
    loss = swav_loss(hand.cls, list(codes.chunk(2)))
    parts = zip(hand.patches, patch_codes.reshape(2, 4, 16, 5), hand.masks, strict=True)
    loss = loss + torch.stack([masked_code_loss(*each) for each in parts]).mean()
    return loss + 0.1 * sum(koleo_loss(token) for token in hand.tokens)


def test_steps_of_dinov2_equal_those_with_hidden_patches_alone_in_sinkhorns_algorithm() -> None:
    models, xs = untied(), image_batches()[0]
    phase = DINOv2Phase(crops, patch_size=2, masks=MASKS, teacher_temperature=0.06)
    learner = learner_of(untied(), None, data=([xs],))
    learner.fit(1, phases=[phase])
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    torch.testing.assert_close(learner.step.loss, papers_dinov2(models, xs, 0))
    assert phase.center is None
    assert phase.state_dict()["steps"] == 1


def test_koleo_is_taken_of_the_students_class_tokens_before_the_head() -> None:
    losses: list[Tensor] = []
    for weight in (0.0, 0.5):
        phase = DINOv2Phase(crops, patch_size=2, masks=MASKS, koleo=weight)
        learner = learner_of(untied(), losses, data=(image_batches()[:1],))
        learner.fit(1, phases=[phase])
    expected = 0.5 * sum(koleo_loss(token) for token in learner.step.tokens)
    torch.testing.assert_close(losses[1] - losses[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_is_hidden_has_a_loss_that_is_finite() -> None:
    losses: list[Tensor] = []
    phase = DINOv2Phase(crops, patch_size=2, masks=RandomMasks(0.0))
    learner_of(untied(), losses).fit(1, phases=[phase])
    assert all(loss.isfinite() for loss in losses)
    torch.testing.assert_close(sinkhorn(torch.eye(3), mask=torch.zeros(3)).sum(1), torch.ones(3))


@pytest.mark.parametrize(
    "make", [ibot, lambda: DINOv2Phase(crops, patch_size=2, teacher_temperature=linear(5, 0.04, 0.4))]
)
def test_a_kept_state_goes_on_to_the_same_bits(make: Any) -> None:
    phase = assert_goes_on(make, untied)
    assert phase.state_dict()["steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [ibot, lambda: DINOv2Phase(crops, patch_size=2, teacher_temperature=linear(5, 0.04, 0.4))]
)
def test_a_run_whose_batches_wait_for_others_is_resumed_to_the_bit(make: Any) -> None:
    assert_resumes_exactly(
        lambda: learner_of(untied(), None, accelerator=Accelerator("cpu", accumulate=2)),
        epochs=2,
        phases=lambda: [make()],
    )


def test_what_cannot_be_used_is_refused_with_what_to_type() -> None:
    with pytest.raises(PhaseError, match=r"IBOTPhase\(patch_size=0\) was given; expected a whole number, 1 or more"):
        IBOTPhase(crops, patch_size=0)
    with pytest.raises(PhaseError, match=r"DINOv2Phase\(koleo=-1\) was given"):
        DINOv2Phase(crops, patch_size=2, koleo=-1)
    with pytest.raises(PhaseError, match=r"IBOTPhase calls learner.model.student.projector, which there is not"):
        learner_of(network_and_teacher(lambda: heads()), None).fit(1, phases=[ibot()])
    with pytest.raises(BatchError, match=r"expected images of shape \(N, C, H, W\), H and W multiples of 3"):
        learner_of(tied(), None).fit(1, phases=[IBOTPhase(crops, patch_size=3)])


def test_the_student_predicts_hidden_patches_alone() -> None:
    student, teacher, mask = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5), torch.zeros(2, 4)
    mask[0, 1] = 1
    ibot_loss(student, teacher, mask).backward()
    assert student.grad[0, 1].abs().sum() > 0
    assert not student.grad[mask == 0].any()
    expected = -((teacher[0, 1] / 0.04).softmax(0) * log_softmax(student[0, 1] / 0.1, 0)).sum() / 2
    torch.testing.assert_close(ibot_loss(student, teacher, mask), expected)


def test_a_killed_run_of_dinov2_goes_on_with_all_its_schedules() -> None:
    def learner() -> Any:
        decay = Scheduler({WeightDecay: cosine(10, 0.04, 0.4), LearningRate: one_cycle(10, 0.01)})
        made = learner_of(untied(), None, decay, Unfreeze({"student.patch_projector": 3}, unit="step"))
        made.replace_callback(EMA("student", cosine(10, 0.9, 1.0), into="teacher"))
        return made

    phase = lambda: DINOv2Phase(crops, patch_size=2, masks=MASKS, teacher_temperature=linear(10, 0.04, 0.2))  # noqa: E731
    assert_resumes_exactly(learner, phases=lambda: [phase()], at=[2, 4, 7])
