"""Log to Weights & Biases."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fluxloop.logging.backend import Backend, key, log_to
from fluxloop.logging.loggables import Audio, Figure, File, Histogram, HyperParameters, Image, Scalar, Text


def _library() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("WandB needs wandb: pip install 'torch-fluxloop[wandb]'") from error
    return wandb


class WandB(Backend):
    """Log to a run of Weights & Biases, one of its own: ``wandb.run`` is left alone.

    All that is logged of one step travels in one row. The x axis of a name is the step of its outermost
    group: "step", "epoch". A resumed run goes on under its id, and does not log again what it has of a step
    already; offline, each start writes a folder of its own, which ``wandb sync`` joins.

    Args:
        project: The project that the run belongs to.
        options: Further arguments of ``wandb.init``: ``mode="offline"``, ``dir=...``, ``name=...``.

    Raises:
        ImportError: wandb is not installed.

    Attributes:
        run: The ``wandb.Run``, while it is open.
        run_id: The run's id, once it has begun.

    Example:
        >>> backend = WandB("digits", mode="offline", name="first")  # no run is begun before the fit
        >>> logger = LogMetrics(backend)
        >>> backend.run is None
        True
    """

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        _library()
        self.project = project
        self.options = options
        self.run: Any = None
        self.run_id: str | None = options.get("id")
        self._folder: str | None = None
        self._axes: set[str] = set()
        self._row: dict[str, Any] = {}
        self._resumed = False
        self._there: dict[str, int] = {}
        self._online: dict[str, int] = {}

    def _open(self) -> None:
        before = _offline_files(self._folder, self.run_id)
        options = {"resume": "allow" if self.run_id is not None else None, **self.options}
        if before:  # two starts in one second would write the same file
            options["settings"] = {**dict(options.get("settings") or {}), "x_sync_dir_suffix": str(len(before))}
        options |= {"project": self.project, "id": self.run_id, "reinit": "create_new"}
        self.run = _library().init(**options)
        self.run_id, self._folder = self.run.id, str(Path(self.run.settings.sync_file).parents[1])
        self._axes, self._row = set(), {}

    def _flush(self) -> None:
        row, self._row = self._row, {}
        if row:
            self.run.log(row)

    def _close(self) -> None:
        run, self.run = self.run, None
        run.finish()

    def _position(self) -> dict[str, Any]:
        return {"id": self.run_id, "folder": self._folder}

    def _rewind(self, position: Any) -> None:
        self.run_id, self._folder = (position["id"], position["folder"]) if position else (self.options.get("id"), None)
        self._resumed, self._there, self._online = position is not None, {}, {}
        for path in _offline_files(self._folder, self.run_id):
            for row in offline_rows(path):
                for name in row:
                    axis = axis_of(name)
                    if name != axis and axis in row:
                        self._there[name] = max(self._there.get(name, -1), row[axis])

    def add(self, name: str, group: tuple[str, ...], step: int, value: Any) -> None:
        """Add a value to the row of its step, unless the run has it from before it was resumed."""
        name = key(name, group)
        axis = axis_of(name)
        if step <= max(self._there.get(name, -1), self._sent(axis)):
            return
        names = f"{axis}/*" if group else name
        if names not in self._axes:
            self._axes.add(names)
            self.run.define_metric(names, step_metric=axis)
        if self._row.get(axis) != step or name in self._row:
            self._flush()
        self._row |= {axis: step, name: value}

    def _sent(self, axis: str) -> int:
        """Return the last step that a resumed run has on the server; offline there is none."""
        if self._resumed and axis not in self._online:
            found = self.run.summary.get(axis)
            self._online[axis] = found if isinstance(found, int) else -1
        return self._online.get(axis, -1)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"WandB({self.project!r}{options})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        copied: Any = super().__deepcopy__(memo)
        copied.run, copied._row = None, {}
        return copied  # type: ignore[no-any-return]


def axis_of(name: str) -> str:
    """Return the name of a full name's x axis: its outermost group.

    >>> axis_of("epoch/validation/loss")
    'epoch'
    """
    return name.partition("/")[0] if "/" in name else "step"


def _offline_files(folder: str | None, run_id: str | None) -> list[Path]:
    """List the files that earlier starts of a run wrote offline."""
    return [] if folder is None else sorted(Path(folder).glob(f"offline-run-*/run-{run_id}.wandb"))


def offline_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a ``.wandb`` file; where it breaks off, as after a kill, they end.

    The file is a log of protocol buffers in the format of LevelDB: blocks of 32768 bytes with pieces
    of records, each behind 7 bytes of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    record_type: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        rest = 32768 - at % 32768
        if rest < 7:  # no header fits: a block ends in padding
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 or len(piece) < length:  # a kill left zeros, or half a piece
            return
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            message = record_type()
            message.ParseFromString(record)
            if message.HasField("history"):
                yield _row(message.history.item)


def _row(items: Any) -> dict[str, Any]:
    """Return a row's values by name; those of an image's description, say, by nested names."""
    row: dict[str, Any] = {}
    for item in items:
        name, *below = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if below:
            row.setdefault(name, {})[".".join(below)] = value
        else:
            row[name] = value
    return row


@log_to.register(WandB, Scalar)
def _scalar(backend: WandB, scalar: Scalar, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(name, group, step, scalar.value)


@log_to.register(WandB, Image)
def _image(backend: WandB, image: Image, name: str, step: int, group: tuple[str, ...]) -> None:
    pixels = image.pixels.permute(1, 2, 0).numpy()
    backend.add(name, group, step, _library().Image(pixels if pixels.shape[2] == 3 else pixels[..., 0]))


@log_to.register(WandB, Histogram)
def _histogram(backend: WandB, histogram: Histogram, name: str, step: int, group: tuple[str, ...]) -> None:
    counts, edges = histogram.counts()
    if counts:
        backend.add(name, group, step, _library().Histogram(np_histogram=(counts, edges)))


@log_to.register(WandB, Text)
def _text(backend: WandB, text: Text, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(name, group, step, text.text)


@log_to.register(WandB, Figure)
def _figure(backend: WandB, figure: Figure, name: str, step: int, group: tuple[str, ...]) -> None:
    _image(backend, figure.image(), name, step, group)


@log_to.register(WandB, Audio)
def _audio(backend: WandB, audio: Audio, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(name, group, step, _library().Audio(audio.waveform.T.numpy(), sample_rate=audio.rate))


@log_to.register(WandB, File)
def _file(backend: WandB, file: File, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.run.save(str(file.path.resolve()), base_path=str(file.path.resolve().parent), policy="now")


@log_to.register(WandB, HyperParameters)
def _chosen(backend: WandB, chosen: HyperParameters, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.run.config.update(chosen.values, allow_val_change=True)
