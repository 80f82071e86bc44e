"""Draw what a generator makes of the same noise, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field
from torch import Tensor, nn

from fluxloop.callback import Callback, NoConflict, on, resolve_conflict
from fluxloop.callbacks.recorder import Recorder
from fluxloop.compute.models import to_device_of
from fluxloop.compute.modes import watching
from fluxloop.errors import CallbackConflictError, ModelError, describe
from fluxloop.events import CycleEnd, EpochEnd, StepBegin
from fluxloop.guard.given import as_path, number
from fluxloop.images import image_grid, pillow, save_image
from fluxloop.nested import map_tensors
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.randomness import drawing, stream_seed
from fluxloop.state import name_of


@define
class SampleImages(Callback):
    """Save a grid of a generator's images as a PNG file after each epoch.

    Its input is the same every time: what is given, or else the rows that the generator gets
    first in training. It runs in eval mode without gradients; modes and random numbers are put
    back. The file's name says which weights it saw, ``G@ema-0003.png``, and where several phases
    train in a cycle after which one, ``G@ema-GANPhase-0003.png``. Other callbacks, such as loggers, find the last
    grid in ``cbstate.images["G@ema"]``.

    Args:
        model: Name of the weights: ``"G"``, ``"G@ema"``, ``"decoder"``, or ``"model"`` for a single model.
        inputs: The model's input, or a tuple of several; rows are cut to `count`.
        count: Number of images.
        folder: Where to save them; None saves nothing.
        every: Save after every so many epochs.
        columns: Images in a row of the grid.
        value_range: What is black and what is white; left out, (-1, 1) where an image has negative
            values, else (0, 1).
        shape: ``(channels, height, width)`` of models that give rows of numbers.
        make: ``(module, *inputs) -> images``, where calling the module does not give them.

    Raises:
        ModelError: There are no such weights, or what they give are no images.
        ImportError: Pillow is not installed.
        ValueError: `every`, `count` or `columns` is less than 1.

    Attributes:
        grid: The last grid, whole numbers 0 … 255 of shape (channels, height, width).

    Reads: model, seed, cbstate.history (of the models, only the one it samples)
    Writes: cbstate.images
    Runs after: Recorder

    Example:
        >>> generator = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> samples = SampleImages("generator", inputs=torch.randn(16, 2), count=16, folder="samples")
        >>> models = {"generator": generator, "critic": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))}
        >>> learner = Learner(models, data=(torch.rand(64, 1, 8, 8),), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), samples])
        >>> history = learner.fit(1, phases=[GANPhase(noise=2)])
        >>> [path.name for path in Path("samples").iterdir()]
        ['generator-0001.png']
    """

    model: str = "model"
    inputs: Any = field(default=None, kw_only=True, repr=False)
    count: int = field(default=64, kw_only=True, validator=number(least=1, whole=True))
    folder: str | Path | None = field(default="samples", kw_only=True)
    every: int = field(default=1, kw_only=True, validator=number(least=1, whole=True))
    columns: int = field(default=8, kw_only=True, validator=number(least=1, whole=True))
    value_range: tuple[float, float] | None = field(default=None, kw_only=True)
    shape: tuple[int, int, int] | None = field(default=None, kw_only=True)
    make: Callable[..., Tensor] | None = field(default=None, kw_only=True, repr=False)
    grid: Tensor | None = field(default=None, init=False, repr=False)
    _inputs: tuple[Any, ...] | None = field(default=None, init=False, repr=False)
    _named: dict[str, Any] = field(factory=dict, init=False, repr=False)

    writes = ("cbstate.images",)
    run_after = (Recorder,)
    draws = False  # what the model draws is put back
    _fixed = ("model", "inputs", "count")

    def __attrs_post_init__(self) -> None:
        if self.folder is not None:
            as_path("SampleImages", "folder", self.folder)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The weights sampled, the live ones whose input is taken, and the epoch."""
        return (*dict.fromkeys((weights_path(self.model), weights_path(self._live))), "seed", "cbstate.history")

    @property
    def label(self) -> str:
        """What its files and its shared grid are called: the model's name, before its own where it has one."""
        return f"{self.model}-{self.name}" if self.name else self.model

    @property
    def _live(self) -> str:
        return self.model.partition("@")[0]

    def init(self, learner: Any) -> None:
        """Look for the weights and for what writes files, and share the images."""
        learner.weights[self.model]
        if self.folder is not None:
            pillow()
        if "images" not in learner.cbstate:
            learner.cbstate.images = {}
        given = self.inputs if isinstance(self.inputs, (tuple, list)) or self.inputs is None else (self.inputs,)
        self._inputs = given if given is None else self._rows(tuple(given))
        self._named = {}

    def _rows(self, inputs: Any) -> Any:
        return map_tensors(lambda tensor: tensor.detach()[: self.count].clone() if tensor.ndim else tensor, inputs)

    @on(StepBegin, AbstractTrainingPhase)
    def look(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Hook the generator, to see what it is given, once."""
        if self._inputs is None:
            live = learner.weights[self._live]
            learner.defer(live.register_forward_pre_hook(self._note_inputs, with_kwargs=True).remove)

    def _note_inputs(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._inputs is None:
            self._inputs, self._named = self._rows((inputs, named))

    @on(EpochEnd, AbstractTrainingPhase)
    def sample(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Make the grid, share it, and save it."""
        counts = learner.cbstate.history[phase]
        if self._inputs is None or counts.epochs % self.every:
            return
        epoch = counts.epoch
        module = learner.weights[self.model]
        inputs, named = to_device_of(module, (self._inputs, self._named))
        with watching(module), drawing(stream_seed(learner.seed, f"SampleImages/{self.model}", epoch)):
            images = (partial(self.make, module) if self.make is not None else module)(*inputs, **named)
        self.grid = image_grid(self._images(images), self.columns, self.value_range)
        learner.cbstate.images[self.label] = self.grid
        if self.folder is not None and learner.accelerator.is_main:
            save_image(self.grid, Path(self.folder) / f"{file_of(self.label, phase, learner)}-{epoch:04d}.png")

    @on(CycleEnd)
    def require_input(self, event: CycleEnd, phase: Phase, learner: Any) -> None:
        """Raise where the model was not called in a whole cycle."""
        if self._inputs is None:
            raise ModelError(
                f"SampleImages({self.model!r}) takes the input that the model gets first in training, and it got none; "
                f"give it one: SampleImages({self.model!r}, inputs=torch.randn(64, ...))"
            )

    def _images(self, made: Any) -> Tensor:
        images = made
        if isinstance(images, Tensor) and self.shape is not None:
            images = images.reshape(len(images), *self.shape)
        if isinstance(images, Tensor) and images.ndim == 3:
            images = images.unsqueeze(1)
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ModelError(
                f"SampleImages({self.model!r}) got {describe(made)} from the model; expected images of shape "
                "(N, 1 or 3, H, W) or (N, H, W); rows of numbers need SampleImages(..., shape=(1, H, W))"
            )
        return images

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the input."""
        return {"inputs": self._inputs, "named": self._named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._inputs, self._named = state["inputs"], state["named"]


def pictures_of_their_own(a: Any, b: Any) -> NoConflict:
    """Each shares pictures under a name of its own.

    Raises:
        CallbackConflictError: Two do under the same.
    """
    if a.label == b.label:
        raise CallbackConflictError(
            f"two callbacks would both write '{a.label}' images; give one a name: "
            f"{type(b).__name__}({b.model!r}, name='second')"
        )
    return NoConflict()


resolve_conflict.register(SampleImages, SampleImages)(pictures_of_their_own)


def file_of(label: str, phase: Phase, learner: Any) -> str:
    """Return how names of a picture's files begin: with the phase's own where another one trains beside it.

    Both may end the same epoch. Stages, one fit after the other, have epochs of their own.
    """
    counts = learner.cbstate.history
    beside = {name_of(each) for each in learner.fit_phases or counts if each.gradients}
    own = counts[phase].label  # the data key, for one that was alone when it first ran: its files go on
    return f"{label}-{own}" if len(beside) > 1 and own == name_of(phase) else label
