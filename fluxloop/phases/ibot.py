"""iBOT and DINOv2: DINO on whole images, and the same on patches that the student does not see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.augment.masks import Masks, RandomMasks
from fluxloop.augment.patches import grid_of
from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_called, check_number
from fluxloop.losses.prototypes import ibot_loss, masked_code_loss, sinkhorn, swav_loss
from fluxloop.losses.spread import koleo_loss
from fluxloop.phases.dino import DINOPhase
from fluxloop.phases.joint_embedding import Views
from fluxloop.phases.objective import require_call
from fluxloop.processes.gather import all_gather
from fluxloop.schedules import Schedule

if TYPE_CHECKING:
    from fluxloop.state import StepState


class IBOTPhase(DINOPhase):
    """iBOT (Zhou et al., 2021): DINO on the class token, and on the patches that are hidden from the student.

    1. Draw crops of each row, global ones first, and masks of the global ones. 2. The student sees the global crops
    with hidden patches, and the local ones as they are; the teacher the global ones as they are. 3. `dino_loss` of the
    class tokens, between crops, plus `ibot_loss` of the patches, within each global crop. 4. After the update both
    centres move, that of class tokens and that of patches, and `EMA` moves the teacher.

    Args:
        views: What makes the crops of a batch, such as ``MultiCrop(globally, locally, 8)``; left out, batches hold
            them.
        patch_size: Height and width of a patch in pixels.
        masks: Draws what is hidden; by default a share from 0.1 to 0.5 of the patches, and nothing of half of the
            images. A function ``(rows, (height, width), device)`` that returns True where hidden, (rows, L).
        patch_weight: Of the patches' loss.
        patch_temperature: Divides the teacher's scores of patches, a number or a schedule over training steps; left
            out, it is ``teacher_temperature``.
        options: Those of `DINOPhase`: ``num_global``, ``student_temperature``, ``teacher_temperature``,
            ``center_momentum``.

    Models: ``student`` and ``teacher`` as `TeacherPhase` says, each with an ``encoder``, ``encoder(images, mask)``,
    that returns the class token (N, F) and the patches (N, L, F) of images of any size; ``mask`` (N, L) is True where
    it has to put a token that it has learned, and None where it sees all. The ``projector`` gives scores of class
    tokens, (N, K), and of patches, (N, L, K); where there is a ``patch_projector`` too, it is the patches' (DINOv2's
    untied heads). Batches are ``(crop1, crop2, ...)`` or ``((crop1, crop2, ...), ys)``. Entries: those of `DINOPhase`,
    ``masks``, ``student_patches`` and ``teacher_patches``, lists with one for each global crop.

    Raises:
        PhaseError: A number is out of range, or `masks` cannot be called.
        BatchError: There are too few crops, or `patch_size` does not divide their height and width.

    Attributes:
        center: The centre of class tokens, shape (K,); None before the first step.
        patch_center: That of patches.

    Example:
        >>> import copy
        >>> class Patches(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Conv2d(1, 8, 2, 2)
        ...
        ...     def forward(self, images, mask):
        ...         patches = self.embed(images).flatten(2).transpose(1, 2)
        ...         if mask is not None:
        ...             patches = patches.masked_fill(mask[:, :, None], 0.0)
        ...         return patches.mean(1), patches
        >>> student = torch.nn.ModuleDict({"encoder": Patches(), "projector": torch.nn.Linear(8, 5)})
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner(models, data=(torch.rand(64, 1, 8, 8),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> noise = lambda images: images + 0.1 * torch.randn_like(images)
        >>> history = learner.fit(1, phases=[IBOTPhase(TwoViews(noise), patch_size=2)])
        >>> learner.step.student_patches[0].shape, learner.step.masks[0].shape
        (torch.Size([32, 16, 5]), torch.Size([32, 16]))
    """

    def __init__(
        self,
        views: Views | None = None,
        *,
        patch_size: int,
        masks: Masks | None = None,
        patch_weight: float = 1.0,
        patch_temperature: float | Schedule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(views, **options)
        name = type(self).__name__
        check_number(name, "patch_size", patch_size, least=1, whole=True, error=PhaseError)
        check_number(name, "patch_weight", patch_weight, least=0, error=PhaseError)
        self.masks: Masks = RandomMasks((0.1, 0.5), unmasked=0.5) if masks is None else masks
        check_called(name, "masks", self.masks, "what draws masks: RandomMasks(0.3)", PhaseError)
        if patch_temperature is not None and not callable(patch_temperature):
            check_number(name, "patch_temperature", patch_temperature, above=0, error=PhaseError)
        self.patch_size, self.patch_weight, self.patch_temperature = patch_size, patch_weight, patch_temperature
        self.patch_center: Tensor | None = None
        self._sizes: tuple[int, int] | None = None
        """The numbers of scores of a class token and of a patch."""

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the views or ``xs``, and the teacher's temperatures in this step where they have schedules."""
        entries = super().entries(batch)
        if callable(self.patch_temperature):
            entries["patch_temperature"] = self._now(self.patch_temperature, entries)
        return entries

    def patch_sharpness(self, state: StepState) -> Any:
        """Return the teacher's temperature of patches in a step."""
        if self.patch_temperature is None:
            return self.sharpness(state)
        return state.patch_temperature if callable(self.patch_temperature) else self.patch_temperature

    def forward(self, learner: Any, state: StepState) -> None:
        """Draw masks, and run both networks on their crops."""
        views = self.seen(state)
        if "masks" not in state:  # they may be entries, drawn where the views are
            state.masks = [
                self.masks(len(view), grid_of(view, self.patch_size), view.device) for view in views[: self.num_global]
            ]
        student, teacher = learner.model.student, learner.model.teacher
        state.tokens, state.student, state.student_patches = [], [], []
        for number, view in enumerate(views):
            is_global = number < self.num_global
            token, patches = student.encoder(view, state.masks[number] if is_global else None)
            state.student.append(student.projector(token))
            if is_global:
                state.tokens.append(token)
                state.student_patches.append(self.score(student, patches))
        state.features = state.tokens[0]
        with torch.no_grad():
            seen = [teacher.encoder(view, None) for view in views[: self.num_global]]
            state.teacher = [teacher.projector(token) for token, _ in seen]
            state.teacher_patches = [self.score(teacher, patches) for _, patches in seen]

    def score(self, network: Any, patches: Tensor) -> Tensor:
        """Return the scores of patches, (N, L, K)."""
        scores: Tensor = getattr(network, "patch_projector", network.projector)(patches)
        return scores

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare class tokens between crops, and patches within them."""
        whole = super().loss(learner, state)
        center = 0.0 if self.patch_center is None else self.patch_center.to(whole.device)
        temperatures = self.student_temperature, self.patch_sharpness(state)
        triples = zip(state.student_patches, state.teacher_patches, state.masks, strict=True)
        terms = [ibot_loss(guess, said, mask, center, *temperatures) for guess, said, mask in triples]
        return whole + self.patch_weight * torch.stack(terms).mean()

    def outputs(self, state: StepState) -> Tensor:
        """Return the teacher's scores of class tokens and the means of its patches', beside each other."""
        tokens, patches = torch.cat(state.teacher), torch.cat([each.mean(1) for each in state.teacher_patches])
        self._sizes = tokens.shape[1], patches.shape[1]
        return torch.cat([tokens, patches], dim=1)

    def _move(self, mean: Tensor) -> None:
        if self._sizes is None:  # for type checkers: a step has been
            raise PhaseError(f"{type(self).__name__} has seen no scores; expected a step before centres move")
        tokens, patches = torch.split(mean, list(self._sizes))
        super()._move(tokens)
        self.patch_center = self._moved(self.patch_center, patches)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: both centres, the number of steps, and what waits to move the centres."""
        return {**super().state_dict(), "patch_center": self.patch_center, "sizes": self._sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        super().load_state_dict(state)
        self.patch_center = state["patch_center"]
        self._sizes = None if state["sizes"] is None else (state["sizes"][0], state["sizes"][1])

    def require(self, learner: Any) -> None:
        """Raise for networks without an encoder and a projector."""
        super().require(learner)
        for name in ("student", "teacher"):
            network = getattr(learner.model, name)
            missing = [part for part in ("encoder", "projector") if not hasattr(network, part)]
            if missing:
                raise PhaseError(
                    f"{type(self).__name__} calls learner.model.{name}.{missing[0]}, which there is not; expected an "
                    "encoder(images, mask) and a projector: nn.ModuleDict({'encoder': ..., 'projector': ...})"
                )
            require_call(self, network.encoder, f"{name}.encoder", "images", "mask")


class DINOv2Phase(IBOTPhase):
    """DINOv2 (Oquab et al., 2023): iBOT with codes from Sinkhorn's algorithm in place of centres, and KoLeo.

    1. and 2. as in `IBOTPhase`. 3. Codes: `sinkhorn` of the teacher's scores, of all global crops together, and of the
    hidden patches. `swav_loss` of class tokens, `masked_code_loss` of patches, and `koleo_loss` of the student's class
    tokens, before the projector, of each global crop by itself, summed. All rows are those of all processes where
    several train. 4. After the update, `EMA` moves the teacher.

    The paper's schedules are callbacks: ``Scheduler({WeightDecay: cosine(...)})``, ``Unfreeze`` for the last layer of
    the heads, `LRScheduler` or parameter groups for rates by layer.

    Args:
        views: What makes the crops of a batch, such as ``MultiCrop(globally, locally, 8)``; left out, batches hold
            them.
        patch_size: Height and width of a patch in pixels.
        koleo: Weight of KoLeo.
        iterations: Of `sinkhorn`.
        options: Those of `IBOTPhase` and `DINOPhase`: ``masks``, ``patch_weight``,
            ``patch_temperature``, ``num_global``,
            ``student_temperature``, ``teacher_temperature``, by which `sinkhorn` divides scores.

    Models, batches, entries and errors are those of `IBOTPhase`, with ``codes`` and ``patch_codes``, lists with one for
    each global crop; the heads are untied where each network has a ``patch_projector``.

    Example:
        >>> import copy
        >>> class Patches(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Conv2d(1, 8, 2, 2)
        ...
        ...     def forward(self, images, mask):
        ...         patches = self.embed(images).flatten(2).transpose(1, 2)
        ...         if mask is not None:
        ...             patches = patches.masked_fill(mask[:, :, None], 0.0)
        ...         return patches.mean(1), patches
        >>> student = torch.nn.ModuleDict({"encoder": Patches(), "projector": torch.nn.Linear(8, 5)})
        >>> student["patch_projector"] = torch.nn.Linear(8, 6)
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner(models, data=(torch.rand(64, 1, 8, 8),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> noise = lambda images: images + 0.1 * torch.randn_like(images)
        >>> history = learner.fit(1, phases=[DINOv2Phase(TwoViews(noise), patch_size=2)])
        >>> learner.step.codes[0].shape, learner.step.patch_codes[0].shape
        (torch.Size([32, 5]), torch.Size([32, 16, 6]))
    """

    def __init__(
        self,
        views: Views | None = None,
        *,
        patch_size: int,
        koleo: float = 0.1,
        iterations: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(views, patch_size=patch_size, **options)
        check_number(type(self).__name__, "koleo", koleo, least=0, error=PhaseError)
        check_number(type(self).__name__, "iterations", iterations, least=1, whole=True, error=PhaseError)
        self.koleo, self.iterations = koleo, iterations

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare class tokens between crops and patches within them, and push class tokens apart."""
        group, temperature = learner.accelerator.group, self.sharpness(state)
        count = len(state.teacher)
        hidden = torch.cat([mask.flatten() for mask in state.masks])
        patches = torch.cat([scores.flatten(0, 1) for scores in state.teacher_patches])
        codes = sinkhorn(torch.cat(state.teacher), temperature, self.iterations, group=group)
        patch_codes = sinkhorn(patches, self.patch_sharpness(state), self.iterations, mask=hidden, group=group)
        state.codes = list(codes.chunk(count))
        state.patch_codes = [
            part.view_as(scores) for part, scores in zip(patch_codes.chunk(count), state.teacher_patches, strict=True)
        ]
        loss = swav_loss(state.student, state.codes, self.student_temperature)
        triples = zip(state.student_patches, state.patch_codes, state.masks, strict=True)
        terms = [masked_code_loss(guess, code, mask, self.student_temperature) for guess, code, mask in triples]
        loss = loss + self.patch_weight * torch.stack(terms).mean()
        if not self.koleo:
            return loss
        tokens = state.tokens if group is None else [all_gather(each, group) for each in state.tokens]
        return loss + self.koleo * torch.stack([koleo_loss(each) for each in tokens]).sum()

    def finish(self, learner: Any, state: StepState) -> None:
        """Count the update, for the schedule of the temperature."""
        if learner.updates.has_open(None):
            self._waiting = torch.zeros(1), 0
        else:
            self._count()

    def _follow_update(self, learner: Any) -> None:
        if self._waiting is not None:
            self._count()

    def _count(self) -> None:
        self._steps += 1
        self._waiting = None
