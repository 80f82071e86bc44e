"""Log to TensorBoard's event files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attrs import define, field

from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_path
from fluxloop.logging.backend import Backend, key, log_to
from fluxloop.logging.loggables import Audio, Figure, Histogram, HyperParameters, Image, Scalar, Text

SUFFIX = ".fluxloop"
EVENTS = "events.out.tfevents.*"


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard needs tensorboard: pip install 'torch-fluxloop[tensorboard]'") from error
    return SummaryWriter


def _as_path(given: Any) -> Path:
    return as_path("TensorBoard", "folder", given)


@fields_of_the_class
@define(eq=False, slots=False)
class TensorBoard(Backend):
    """Log to event files in a folder, with ``torch.utils.tensorboard``.

    Steps and epochs stand on the x axes of their own tags in one run. A checkpoint keeps the lengths of the
    event files; a resumed run cuts them to that (a ``purge_step`` would take epochs for steps).

    Args:
        folder: Of one run; ``tensorboard --logdir`` shows it, or a folder of such.

    Raises:
        ImportError: tensorboard is not installed.
        LogExistsError: When a new run begins and the folder holds event files.

    Attributes:
        writer: The ``SummaryWriter``, while it is open.

    Example:
        >>> backend = TensorBoard("runs/first")
        >>> history = testing.toy_learner(Recorder(), Metrics(), LogMetrics(backend)).fit(1)
        >>> [path.name.split(".")[0] for path in Path("runs/first").iterdir()]
        ['events']
    """

    folder: Path = field(converter=_as_path)
    writer: Any = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _summary_writer()

    def _place(self) -> str:
        return str(self.folder.absolute())

    def _found(self) -> str | None:
        return next((str(path) for path in sorted(self.folder.glob(EVENTS))), None)

    def _open(self) -> None:
        self.writer = _summary_writer()(str(self.folder), filename_suffix=SUFFIX)

    def _flush(self) -> None:
        self.writer.flush()

    def _close(self) -> None:
        self.writer.close()
        self.writer = None

    def _position(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.glob(EVENTS + SUFFIX)}

    def _rewind(self, position: Any) -> None:
        for path in self.folder.glob(EVENTS + SUFFIX):
            size = (position or {}).get(path.name, 0)
            if size == 0:
                path.unlink()
            elif path.stat().st_size > size:
                os.truncate(path, size)

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.folder)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        copied: Any = super().__deepcopy__(memo)
        copied.writer = None
        return copied  # type: ignore[no-any-return]


@log_to.register(TensorBoard, Scalar)
def _scalar(backend: TensorBoard, scalar: Scalar, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.writer.add_scalar(key(name, group), scalar.value, step)


@log_to.register(TensorBoard, Image)
def _image(backend: TensorBoard, image: Image, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.writer.add_image(key(name, group), image.pixels, step)


@log_to.register(TensorBoard, Histogram)
def _histogram(backend: TensorBoard, histogram: Histogram, name: str, step: int, group: tuple[str, ...]) -> None:
    if len(histogram.values):
        backend.writer.add_histogram(key(name, group), histogram.values, step)


@log_to.register(TensorBoard, Text)
def _text(backend: TensorBoard, text: Text, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.writer.add_text(key(name, group), text.text, step)


@log_to.register(TensorBoard, Figure)
def _figure(backend: TensorBoard, figure: Figure, name: str, step: int, group: tuple[str, ...]) -> None:
    _image(backend, figure.image(), name, step, group)


@log_to.register(TensorBoard, Audio)
def _audio(backend: TensorBoard, audio: Audio, name: str, step: int, group: tuple[str, ...]) -> None:
    mono = audio.waveform.mean(0, keepdim=True)
    backend.writer.add_audio(key(name, group), mono, step, sample_rate=audio.rate)


@log_to.register(TensorBoard, HyperParameters)
def _chosen(backend: TensorBoard, chosen: HyperParameters, name: str, step: int, group: tuple[str, ...]) -> None:
    from torch.utils.tensorboard.summary import hparams

    values = {each: str(value) if value is None else value for each, value in chosen.values.items()}
    summaries: Any = hparams(values, {})  # type: ignore[no-untyped-call]  # torch has no types there
    for summary in summaries:  # add_hparams would make a run of its own
        backend.writer.file_writer.add_summary(summary, step)
    table = "\n".join(f"| {each} | {value} |" for each, value in values.items())
    backend.writer.add_text(key(name, group), f"| name | value |\n| --- | --- |\n{table}", step)
