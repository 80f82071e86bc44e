"""MSN: masked views of an image are near to the prototypes of the whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.augment.masks import Masks
from fluxloop.augment.patches import grid_of
from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_called, check_number
from fluxloop.losses.prototypes import msn_loss
from fluxloop.phases.joint_embedding import ComparingPhase, CropsPhase, TeacherPhase, Views

if TYPE_CHECKING:
    from fluxloop.state import StepState


class MSNPhase(CropsPhase, TeacherPhase, ComparingPhase):
    """MSN (Assran et al., 2022): match the assignments of masked views with those of the image.

    1. Draw views of each row: the target, other global ones, and small local ones. 2. The teacher embeds the target as
    it is, without gradients; the student the others, the global ones with hidden patches, the local ones as they are.
    3. `msn_loss`: the anchors' soft assignments to the ``prototypes`` are to be the target's, sharpened and balanced,
    and their mean is to be even. 4. After the update, `EMA` moves the teacher. The prototypes are trained.

    Args:
        views: What makes the views of a batch, such as ``MultiCrop(globally, locally, 10)``; left out, batches hold
            them.
        num_global: How many of the views, the first ones, are global; the first one is the target.
        patch_size: Height and width of a patch in pixels, where patches are hidden.
        masks: Draws what is hidden, such as ``RandomMasks(0.7)``; left out, nothing is. See `IBOTPhase`.
        temperature: Divides the cosines.
        sharpening: Of the target's assignment, from 0 to 1: the less, the sharper.
        iterations: Of `sinkhorn`; 0 leaves it out.
        entropy: Weight of the mean assignment's entropy; the paper's λ.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models: ``student`` and ``teacher`` as `TeacherPhase` says, and ``prototypes``, ``nn.Linear(D, K, bias=False)``,
    whose weight they are. With `masks` the student's encoder is called ``encoder(images, mask)`` for global views, (N,
    L), True where a patch is hidden: it leaves these out. Batches are ``(target, view1, ...)`` or ``((target, view1,
    ...), ys)``. Entries: ``views``, ``masks`` where there are some, ``features`` (N, F) of the student for the first
    anchor, ``anchors`` (V * N, D), ``targets`` (N, D), ``loss``. The events are those of `ObjectivePhase`.

    Raises:
        PhaseError: A number is out of range, or there are `masks` without a `patch_size`.
        BatchError: There are too few views, or `patch_size` does not divide their height and width.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> models["prototypes"] = torch.nn.Linear(8, 10, bias=False)
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> noise = lambda rows: rows + 0.1 * torch.randn_like(rows)
        >>> history = learner.fit(1, phases=[MSNPhase(MultiCrop(noise, noise, num_local=3))])
        >>> learner.step.targets.shape, learner.step.anchors.shape
        (torch.Size([32, 8]), torch.Size([128, 8]))
    """

    parts = ("student", "teacher", "prototypes")

    def __init__(
        self,
        views: Views | None = None,
        *,
        num_global: int = 2,
        patch_size: int | None = None,
        masks: Masks | None = None,
        temperature: float = 0.1,
        sharpening: float = 0.25,
        iterations: int = 3,
        entropy: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(views, num_global=num_global, gather=gather)
        if (patch_size is None) != (masks is None):
            raise PhaseError(
                f"MSNPhase(patch_size={patch_size!r}, masks={masks!r}) was given; expected both, to hide "
                "patches, or none"
            )
        if masks is not None:
            check_called("MSNPhase", "masks", masks, "what draws masks: RandomMasks(0.7)", PhaseError)
            check_number("MSNPhase", "patch_size", patch_size, least=1, whole=True, error=PhaseError)
        check_number("MSNPhase", "temperature", temperature, above=0, error=PhaseError)
        check_number("MSNPhase", "sharpening", sharpening, above=0, most=1, error=PhaseError)
        check_number("MSNPhase", "iterations", iterations, least=0, whole=True, error=PhaseError)
        check_number("MSNPhase", "entropy", entropy, least=0, error=PhaseError)
        self.patch_size, self.masks = patch_size, masks
        self.temperature, self.sharpening = temperature, sharpening
        self.iterations, self.entropy = iterations, entropy

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed the target by the teacher, the other views by the student."""
        target, *others = self.seen(state)
        student, masked = learner.model.student, others[: self.num_global - 1]
        if self.masks is not None and self.patch_size is not None:
            state.masks = [self.masks(len(view), grid_of(view, self.patch_size), view.device) for view in masked]
            features = [student.encoder(view, mask) for view, mask in zip(masked, state.masks, strict=True)]
            outputs = [(each, student.projector(each)) for each in features]
        else:
            outputs = [self.embed(student, view) for view in masked]
        outputs += [self.embed(student, view) for view in others[self.num_global - 1 :]]
        state.features, state.anchors = outputs[0][0], torch.cat([embedding for _, embedding in outputs])
        with torch.no_grad():
            _, state.targets = self.embed(learner.model.teacher, target)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the assignments."""
        return msn_loss(
            state.anchors,
            state.targets,
            learner.model.prototypes.weight,
            self.temperature,
            self.sharpening,
            self.iterations,
            self.entropy,
            group=self.group(learner),
        )
