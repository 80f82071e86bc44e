"""Draw how well held-out images are reconstructed, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define, field
from attrs.validators import optional
from torch import Tensor
from torch.nn.parameter import is_lazy

from fluxloop.augment.patches import unpatchify
from fluxloop.callbacks.drawing import as_rgb, enlarged, range_of, table
from fluxloop.callbacks.pictures import PicturesOfImages
from fluxloop.compute.models import by_name, to_device_of
from fluxloop.compute.modes import watching
from fluxloop.errors import ModelError, describe
from fluxloop.guard.given import called
from fluxloop.nested import map_tensors
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.phases.mae import MAEPhase
from fluxloop.phases.objective import can_run
from fluxloop.state import StepState

HIDDEN = 0.5
"""How bright hidden patches are, from black to white."""


@define
class ReconstructionImages(PicturesOfImages):
    """Draw held-out images beside their reconstructions, after each epoch.

    The training phase's own ``forward`` is run on the rows, or the model where there is one and no ``forward``: in eval
    mode, without gradients, and with the same random numbers in every epoch, so that a masked autoencoder hides the
    same patches. Of a `MAEPhase` a line shows the image, what is seen of it, the image with its hidden patches filled
    in as predicted, and the whole prediction; of an `AutoencoderPhase`, a `VAEPhase` and phases like these, the image
    and ``state.preds``. Of other phases you say what is shown.

    The picture is saved as ``pictures/reconstructions_model-0003.png``; other callbacks find it in
    ``cbstate.images["reconstructions_model"]``, and `LogImages` logs it.

    Args:
        queries: Images, as the phase's batches have them, anything `as_dataloader` takes; left out, the learner's
            validation data.
        images: ``(phase, state) -> {heading: images}`` of the entries that ``forward`` has stored, each of shape
            (N, 1 or 3, H, W); left out, what is said above.
        count: How many lines: the first images of the first batch.
        show: ``images -> images`` of shape (N, 1 or 3, H, W), called with the images of each heading, where they are no
            such images, or are normalised; left out, these.
        value_range: What is black and what is white, of all headings; left out, (-1, 1) where the images of the first
            one have negative values, else (0, 1).
        folder: Where to save the pictures; None saves nothing.
        every: Draw after every so many training epochs.

    Raises:
        ModelError: The phase has no ``forward`` and there are several models, or what is stored are no images.
        DataError: There are no rows.
        ImportError: Pillow is not installed.
        ValueError: `count` or `every` is less than 1.

    Attributes:
        grid: The last picture, whole numbers 0 … 255 of shape (3, height, width).

    Reads: model, data, seed, cbstate.history
    Writes: cbstate.images
    Runs after: Recorder

    Example:
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> models = {"encoder": encoder, "decoder": decoder}
        >>> learner = Learner(models, data=(torch.rand(64, 1, 8, 8), torch.rand(8, 1, 8, 8)), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), ReconstructionImages(count=4)])
        >>> history = learner.fit(1, phases=[AutoencoderPhase()])
        >>> learner.cbstate.images["reconstructions_model"].dtype  # also in pictures/reconstructions_model-0001.png
        torch.uint8
    """

    model: str = field(default="model", init=False, repr=False)
    images: Callable[[Any, StepState], Mapping[str, Any]] | None = field(
        default=None,
        kw_only=True,
        repr=False,
        validator=optional(called("a function (phase, state) -> {heading: images}")),
    )

    writes = ("cbstate.images",)
    kind = "reconstructions"

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # as the base's
        """All models, the learner's data, the seed, and the epoch."""
        return ("model", "data", "seed", "cbstate.history")

    def _require_weights(self, learner: Any) -> None:
        """Look for nothing: which models there are is the phase's matter."""

    @property
    def _call(self) -> str:
        """How messages call it."""
        return "ReconstructionImages()"

    def try_out(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for a phase that gives no images."""
        models = [model for _, model in by_name(learner.model)]
        if not any(is_lazy(parameter) for model in models for parameter in model.parameters()):
            self.draw(self.look(phase, learner), "")

    def look(self, phase: AbstractTrainingPhase, learner: Any) -> Any:
        """Run the phase's forward on the rows, and return the images by heading.

        Raises:
            ModelError: There is none.
        """
        forward = getattr(phase, "forward", None) or _forward_of(phase, learner)
        models, state = [model for _, model in by_name(learner.model)], StepState()
        batch = to_device_of(models[0], map_tensors(self._cut, self.first_rows(learner)))
        with watching(*models):
            for name, entry in phase.entries(batch).items():
                setattr(state, name, entry)
            forward(learner, state)
            return (self.images or _images_of)(phase, state)

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor[: self.count] if tensor.ndim else tensor

    def draw(self, seen: Any, title: str) -> Tensor:
        """Draw the images in columns, all in one range of values."""
        if not isinstance(seen, Mapping) or not seen:
            raise ModelError(
                f"ReconstructionImages(images=...) gave {describe(seen)}; expected images by heading: "
                "{'image': state.xs, 'reconstruction': state.preds}"
            )
        shown = {name: self.shown(images) for name, images in seen.items()}
        first = next(iter(shown.values()))
        values = self.value_range or (range_of(first) if isinstance(first, Tensor) else None)
        columns = [
            enlarged(as_rgb(images, f"ReconstructionImages, of {name!r},", values), 64)
            for name, images in shown.items()
        ]
        return table(list(zip(*columns, strict=True)), list(seen), title)


def _forward_of(phase: Any, learner: Any) -> Callable[[Any, StepState], None]:
    """Return what is run of a phase without a forward: the only model, on the inputs.

    Raises:
        ModelError: There are several, or the phase has a step of its own.
    """
    step = type(phase).step
    if getattr(step, "function", step) is not Phase.step or not can_run(learner.model):
        raise ModelError(
            f"ReconstructionImages runs the forward of the training phase, and {phase!r} has none; write one: "
            "def forward(self, learner, state), as ObjectivePhase has it. A single model needs none, where the phase "
            "has no step of its own"
        )

    def forward(learner: Any, state: StepState) -> None:
        state.preds = learner.model(state.xs)

    return forward


def _images_of(phase: Any, state: StepState) -> dict[str, Tensor]:
    """Return what is shown of a phase: of a masked autoencoder, or of one that predicts its inputs."""
    if isinstance(phase, MAEPhase):
        return _of_patches(phase, state)
    xs, preds = vars(state).get("xs"), vars(state).get("preds")
    if not isinstance(xs, Tensor) or not isinstance(preds, Tensor) or preds.numel() != xs.numel():
        raise ModelError(
            f"ReconstructionImages knows no images of {type(phase).__name__}, whose forward stored "
            f"{', '.join(vars(state)) or 'nothing'}; say what to show: ReconstructionImages(images=lambda phase, "
            "state: {'image': state.xs, 'reconstruction': ...})"
        )
    return {"image": xs, "reconstruction": preds.reshape(xs.shape)}


def _of_patches(phase: MAEPhase, state: StepState) -> dict[str, Tensor]:
    patches, preds, hidden = state.patches, state.preds, state.mask[:, :, None]
    if phase.normalize:  # the inverse of `normalize_patches`
        preds = preds * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    low, high = range_of(state.xs)
    grey = torch.full_like(patches, low + HIDDEN * (high - low))

    def whole(given: Tensor) -> Tensor:
        return unpatchify(given, phase.patch_size, *state.xs.shape[2:])

    return {
        "image": state.xs,
        "seen": whole(torch.where(hidden, grey, patches)),
        "filled in": whole(torch.where(hidden, preds.to(patches), patches)),
        "predicted": whole(preds.to(patches)),
    }
