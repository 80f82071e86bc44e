"""I-JEPA and data2vec: predict what a teacher's network has of the patches that are hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, smooth_l1_loss

from fluxloop.augment.masks import BlockMasks, Masks, MultiBlock
from fluxloop.augment.patches import grid_of, patchify
from fluxloop.compute.precision import in_single
from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_called, check_number
from fluxloop.phases.joint_embedding import require_moving_teacher
from fluxloop.phases.objective import ObjectivePhase, require_call, require_parts

if TYPE_CHECKING:
    from fluxloop.state import StepState


class HiddenPatchesPhase(ObjectivePhase):
    """Base of methods in which a ``student`` predicts what a ``teacher``, its moving average, has of hidden patches.

    Masks that are drawn elsewhere, such as in the workers of a loader by its ``collate_fn``, are entries: a subclass's
    `entries` returns what `masks` would draw under the names below, and nothing is drawn in the step.

    Args:
        patch_size: Height and width of a patch in pixels.
        masks: Draws what is hidden.

    Raises:
        PhaseError: A model is missing, no callback moves the teacher, or an argument is malformed.
    """

    parts: tuple[str, ...] = ("student", "teacher", "predictor")
    calls: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """With what each model is called, by its name."""

    def __init__(self, patch_size: int, masks: Any) -> None:
        name = type(self).__name__
        check_number(name, "patch_size", patch_size, least=1, whole=True, error=PhaseError)
        check_called(name, "masks", masks, "what draws masks", PhaseError)
        self.patch_size, self.masks = patch_size, masks

    def check(self, learner: Any) -> None:
        """Raise for missing models, and for a teacher that no callback moves."""
        require_parts(self, learner.model, *self.parts)
        require_moving_teacher(self, learner)
        self.require(learner)

    def require(self, learner: Any) -> None:
        """Raise for missing models, and for those that take other arguments."""
        super().require(learner)
        for name, arguments in self.calls.items():
            require_call(self, getattr(learner.model, name), name, *arguments)


class IJEPAPhase(HiddenPatchesPhase):
    """I-JEPA (Assran et al., 2023): predict the embeddings of some blocks of an image from those of the rest.

    1. Cut the images into patches. 2. Draw blocks to be predicted, and a context without them. 3. The teacher sees all
    patches, without gradients; each token is normalised over its dimensions. 4. The student sees the context.
    5. The ``predictor`` says what stands in each block. 6. The smooth L1 distance. After the update, `EMA` moves the
    teacher, with a decay from 0.996 to 1 in the paper.

    Contexts of `MultiBlock` differ in size from step to step, so its steps are not compiled; ``compile="model"`` is. A
    subclass says ``compiled = True`` where its masks hide as much in each step.

    Args:
        patch_size: Height and width of a patch in pixels.
        masks: Draws blocks and contexts: a function ``(rows, (height, width), device)`` that returns the places of the
            contexts (N, K) and of the blocks (N, B, T). Left out: `MultiBlock`, the paper's.

    Models: ``student(patches, places) -> tokens`` and the ``teacher``, its frozen copy, with patches (N, K, P), their
    places (N, K), whole numbers from 0, and tokens (N, K, D); ``predictor(tokens, places, wanted) -> predictions`` of
    the places wanted (N, T), (N, T, D). It is called once, with all blocks of an image one after the other as rows,
    B * N of them. Batches: images (N, C, H, W), or ``(images, ys)``. Entries: ``xs``, ``ys`` where there are labels,
    ``patches`` (N, L, P), ``places`` (N, K), ``wanted`` (N, B, T), ``features`` (N, D), the student's mean token,
    ``targets`` and ``preds`` (B * N, T, D), ``loss``. The events are those of `ObjectivePhase`.

    Raises:
        PhaseError: `patch_size` is less than 1, `masks` cannot be called, or what `HiddenPatchesPhase` says.
        BatchError: Images are not (N, C, H, W), or `patch_size` does not divide H and W.

    Example:
        >>> import copy
        >>> class Encoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.places = torch.nn.Linear(4, 8), torch.nn.Embedding(64, 8)
        ...
        ...     def forward(self, patches, places):
        ...         return self.embed(patches) + self.places(places)
        >>> class Predictor(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.places = torch.nn.Embedding(64, 8)
        ...
        ...     def forward(self, tokens, places, wanted):
        ...         return tokens.mean(1, keepdim=True) + self.places(wanted)
        >>> student = Encoder()
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner({**models, "predictor": Predictor()}, data=(torch.rand(64, 1, 16, 16),))
        >>> learner.set_callbacks([EMA("student", 0.996, into="teacher")])
        >>> history = learner.fit(1, phases=[IJEPAPhase(patch_size=2)])
        >>> learner.step.patches.shape, learner.step.wanted.shape[:2]
        (torch.Size([32, 64, 4]), torch.Size([32, 4]))
    """

    compiled = False
    calls: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "student": ("patches", "places"),
        "teacher": ("patches", "places"),
        "predictor": ("tokens", "places", "wanted"),
    }

    def __init__(self, patch_size: int, *, masks: Any = None) -> None:
        super().__init__(patch_size, MultiBlock() if masks is None else masks)

    def forward(self, learner: Any, state: StepState) -> None:
        """Hide blocks, embed both, and predict."""
        state.patches = patchify(state.xs, self.patch_size)
        n, count = state.patches.shape[:2]
        if "wanted" not in state:
            state.places, state.wanted = self.masks(n, grid_of(state.xs, self.patch_size), state.xs.device)
        blocks = state.wanted.transpose(0, 1)  # as rows: the first block of all images, then the second
        with torch.no_grad():
            everywhere = torch.arange(count, device=state.xs.device).expand(n, -1)
            tokens = learner.model.teacher(state.patches, everywhere)
            tokens = layer_norm(in_single(tokens), tokens.shape[-1:])
            state.targets = torch.cat([_taken(tokens, block) for block in blocks])
        tokens = learner.model.student(_taken(state.patches, state.places), state.places)
        state.features = tokens.mean(1)
        times = len(blocks)
        repeated = tokens.repeat(times, 1, 1), state.places.repeat(times, 1)
        state.preds = learner.model.predictor(*repeated, blocks.flatten(0, 1))

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare predictions with the teacher's tokens."""
        return smooth_l1_loss(state.preds.to(state.targets.dtype), state.targets)


class Data2VecPhase(HiddenPatchesPhase):
    """data2vec (Baevski et al., 2022): predict the mean of a teacher's last layers at hidden patches.

    1. Draw what is hidden. 2. The teacher sees the whole image, without gradients; the targets are the mean of its last
    layers, each token of each layer normalised, and normalised again. 3. The student sees the image with a learned
    token in place of hidden patches, and the ``predictor`` turns its last layer into predictions. 4. The smooth L1
    distance at hidden patches, a mean over all of the batch. After the update, `EMA` moves the teacher.

    Args:
        patch_size: Height and width of a patch in pixels.
        masks: Draws what is hidden, a function ``(rows, (height, width), device)`` that returns True where hidden,
            (rows, L). Left out: `BlockMasks`, blocks that cover about 60 % of an image.
        layers: How many of the teacher's last layers are averaged; the paper's K.
        beta: Below this distance it is squared, above absolute.

    Models: ``student(images, mask) -> layers``, a list of the tokens (N, L, D) after each block, the first one first,
    ``mask`` (N, L) or None where all is seen; the ``teacher``, its frozen copy; ``predictor(tokens)``, (N, L, D).
    Batches: images (N, C, H, W), or ``(images, ys)``. Entries: ``xs``, ``ys`` where there are labels, ``mask`` (N, L),
    ``features`` (N, D), the student's mean token, ``targets`` and ``preds`` (N, L, D), ``loss``. The events are those
    of `ObjectivePhase`.

    Raises:
        PhaseError: A number is out of range, `masks` cannot be called, or what `HiddenPatchesPhase` says.
        BatchError: Images are not (N, C, H, W), or `patch_size` does not divide H and W.

    Example:
        >>> import copy
        >>> class Layers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.layer = torch.nn.Conv2d(1, 8, 2, 2), torch.nn.Linear(8, 8)
        ...
        ...     def forward(self, images, mask):
        ...         tokens = self.embed(images).flatten(2).transpose(1, 2)
        ...         if mask is not None:
        ...             tokens = tokens.masked_fill(mask[:, :, None], 0.0)
        ...         return [tokens, self.layer(tokens).tanh()]
        >>> student = Layers()
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner({**models, "predictor": torch.nn.Linear(8, 8)}, data=(torch.rand(64, 1, 8, 8),))
        >>> learner.set_callbacks([EMA("student", 0.999, into="teacher")])
        >>> history = learner.fit(1, phases=[Data2VecPhase(patch_size=2, layers=2)])
        >>> learner.step.targets.shape
        torch.Size([32, 16, 8])
    """

    calls: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "student": ("images", "mask"),
        "teacher": ("images", "mask"),
        "predictor": ("tokens",),
    }

    def __init__(self, patch_size: int, *, masks: Masks | None = None, layers: int = 6, beta: float = 2.0) -> None:
        super().__init__(patch_size, BlockMasks() if masks is None else masks)
        check_number("Data2VecPhase", "layers", layers, least=1, whole=True, error=PhaseError)
        check_number("Data2VecPhase", "beta", beta, above=0, error=PhaseError)
        self.layers, self.beta = layers, beta

    def forward(self, learner: Any, state: StepState) -> None:
        """Hide patches, run both networks, and predict."""
        if "mask" not in state:
            state.mask = self.masks(len(state.xs), grid_of(state.xs, self.patch_size), state.xs.device)
        with torch.no_grad():
            layers = learner.model.teacher(state.xs, None)[-self.layers :]
            normal = [layer_norm(in_single(tokens), tokens.shape[-1:]) for tokens in layers]
            mean = torch.stack(normal).mean(0)
            state.targets = layer_norm(mean, mean.shape[-1:])
        tokens = learner.model.student(state.xs, state.mask)[-1]
        state.features = tokens.mean(1)
        state.preds = learner.model.predictor(tokens)

    def weight(self, state: StepState) -> Tensor:
        """Return how many patches are hidden, over which the loss is a mean."""
        hidden: Tensor = state.mask.sum()  # in each process another number: so the gradient is that of all together
        return hidden

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare predictions with the teacher's layers at hidden patches."""
        preds = state.preds.to(state.targets.dtype)
        errors = smooth_l1_loss(preds, state.targets, beta=self.beta, reduction="none").mean(-1)
        mean: Tensor = (errors * state.mask).sum() / state.mask.sum().clamp(min=1)
        return mean


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """Return what stands at places, (N, L, D) and (N, K) to (N, K, D)."""
    return rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))
