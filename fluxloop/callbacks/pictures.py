"""What callbacks have in common that draw a picture of held-out rows after each epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field
from attrs.validators import optional
from torch import Tensor

from fluxloop.callback import Callback, NoConflict, on, resolve_conflict
from fluxloop.callbacks.features import rows_for
from fluxloop.callbacks.recorder import Recorder
from fluxloop.callbacks.sample_images import SampleImages, file_of, pictures_of_their_own
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import DataError, describe
from fluxloop.events import EpochBegin, EpochEnd, FitBegin
from fluxloop.guard.given import as_path, called, check_name, number
from fluxloop.images import pillow, save_image
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase, FittingPhase, Phase
from fluxloop.randomness import drawing, stream_seed


@define
class PicturesOfRows(Callback):
    """Base of callbacks that draw a picture of held-out rows after each epoch.

    The picture is saved as a PNG file, ``embedding_encoder-0003.png``, or ``embedding_encoder-MyPhase-0003.png`` where
    several phases train in a cycle, and shared as
    ``cbstate.images["embedding_encoder"]``, where `LogImages` finds it. Where several processes train, all look at the
    rows, and the first one alone draws. Modes and random numbers are put back, and what is drawn of them is the same
    in every epoch.

    A subclass writes ``look(phase, learner)``, which all processes call, and ``draw(seen, title)``; and it declares
    to write ``"cbstate.images"`` itself, because whoever lacks pictures is told the names of those who declare it.
    """

    model: str = "model"
    queries: Any = field(default=None, kw_only=True, repr=False)
    folder: str | Path | None = field(default="pictures", kw_only=True)
    every: int = field(default=1, kw_only=True, validator=number(least=1, whole=True))
    grid: Tensor | None = field(default=None, init=False, repr=False)
    _tried: set[type[Phase]] = field(factory=set, init=False, repr=False)
    """Of which phases this fit has tried out a picture."""

    run_after = (Recorder,)
    draws = False  # what rows and models draw is put back
    transient: ClassVar[tuple[str, ...]] = ("grid", "_tried")
    kind: ClassVar[str] = "rows"
    """What names of pictures begin with."""
    _fixed: ClassVar[tuple[str, ...]] = ("model",)

    def __attrs_post_init__(self) -> None:
        check_name(type(self).__name__, "model", self.model)
        if self.folder is not None:
            as_path(type(self).__name__, "folder", self.folder)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The weights, the learner's data, the seed, and the epoch."""
        return (weights_path(self.model), "data", "seed", "cbstate.history")

    @property
    def label(self) -> str:
        """What its files and its shared picture are called."""
        return f"{self.kind}_{self.model}" + (f"-{self.name}" if self.name else "")

    @property
    def _call(self) -> str:
        """How messages call it."""
        return f"{type(self).__name__}({self.model!r})"

    def init(self, learner: Any) -> None:
        """Look for the weights and for what draws, and share the pictures.

        Raises:
            ImportError: Pillow is not installed.
        """
        self._require_weights(learner)
        pillow()
        if "images" not in learner.cbstate:
            learner.cbstate.images = {}

    def _require_weights(self, learner: Any) -> None:
        learner.weights[self.model]

    def rows(self, learner: Any) -> tuple[Any, Any]:
        """Return what the rows were given as, and a loader of them; see `rows_for`."""
        return rows_for(f"{type(self).__name__}({self.model!r}, queries=...)", learner, self.queries, "validation")

    def first_rows(self, learner: Any) -> Any:
        """Return the first batch of the rows; the same in every epoch.

        Raises:
            DataError: There is none.
        """
        _, source = self.rows(learner)
        with drawing(stream_seed(learner.seed, f"features/{self.model}")), untouched(source):
            for batch in complete(source):
                return batch
        raise DataError(f"{describe(source)} gave {self._call} no batch; expected rows to show")

    def look(self, phase: AbstractTrainingPhase, learner: Any) -> Any:
        """Return what the picture is made of."""
        raise NotImplementedError

    def draw(self, seen: Any, title: str) -> Tensor:
        """Draw a picture of whole numbers 0 … 255, shape (3, height, width)."""
        raise NotImplementedError

    def try_out(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise before the first step for what would fail at an epoch's end."""
        self.rows(learner)

    @on(FitBegin, FittingPhase)
    def begin_fit(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Try all anew: data, models and phases may be others than in the fit before."""
        self._tried = set()

    @on(EpochBegin, AbstractTrainingPhase)
    def begin(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for missing rows, and for rows and models that give no picture, before the first step."""
        if type(phase) in self._tried:
            return  # once is enough: rows may come from workers, which take a while to start
        with self._drawing(learner):
            self.try_out(phase, learner)
        self._tried.add(type(phase))

    @on(EpochEnd, AbstractTrainingPhase)
    def picture(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Draw the picture, share it, and save it."""
        counts = learner.cbstate.history[phase]
        if counts.epochs % self.every:
            return
        with self._drawing(learner):
            seen = self.look(phase, learner)
            if not learner.accelerator.is_main:
                return
            self.grid = self.draw(seen, f"{self.model}, epoch {counts.epoch}")
        learner.cbstate.images[self.label] = self.grid
        if self.folder is not None:
            name = f"{file_of(self.label, phase, learner)}-{counts.epoch:04d}.png"
            save_image(self.grid, Path(self.folder) / name, zoom=1)

    def _drawing(self, learner: Any) -> Any:
        return drawing(stream_seed(learner.seed, f"{type(self).__name__}/{self.label}"))


@define
class PicturesOfImages(PicturesOfRows):
    """Base of those that show some of the rows, which are images."""

    count: int = field(default=8, kw_only=True, validator=number(least=1, whole=True))
    show: Callable[[Any], Any] | None = field(
        default=None, kw_only=True, repr=False, validator=optional(called("a function xs -> images (N, 1 or 3, H, W)"))
    )
    value_range: tuple[float, float] | None = field(default=None, kw_only=True)

    def shown(self, xs: Any) -> Any:
        """Return the images of rows."""
        return xs if self.show is None else self.show(xs)


@resolve_conflict.register(PicturesOfRows, (PicturesOfRows, SampleImages))  # type: ignore[untyped-decorator]  # multipledispatch has no types
def each_of_its_own(a: Any, b: Any) -> NoConflict:
    """Each shares pictures under a name of its own."""
    return pictures_of_their_own(a, b)
