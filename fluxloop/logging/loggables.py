"""Loggables: numbers, images, histograms, text, figures, sound, files, hyperparameters."""

from __future__ import annotations

import io
import shutil
import wave
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from fluxloop.errors import describe
from fluxloop.guard.given import as_python
from fluxloop.images import image_grid, save_image
from fluxloop.nested import init_fields


class Loggable:
    """Base of what can be logged; a subclass of your own is logged by the function that you register with `log_to`.

    Example:
        >>> from fluxloop.logging import Memory, log_to
        >>> class PointCloud(Loggable):
        ...     points = torch.zeros(8, 3)
        >>> log_to(Memory(), PointCloud(), "points", 1)  # a Memory holds everything
    """


@frozen
class Scalar(Loggable):
    """A number.

    Args:
        value: A number, or a tensor of one element.

    Example:
        >>> Scalar(torch.tensor(0.5))
        Scalar(value=0.5)
    """

    value: float = field(converter=float)


def _pixels(given: Any) -> Tensor:
    pixels = given.detach().cpu() if isinstance(given, Tensor) else given
    if isinstance(pixels, Tensor) and pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise ValueError(f"Image({describe(given)}) was given; expected a tensor of shape (1 or 3, H, W) or (H, W)")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.contiguous()


@frozen(eq=False)
class Image(Loggable):
    """An image; it is stored as whole numbers 0 … 255 of shape (1 or 3, H, W) on the CPU.

    Args:
        pixels: Shape (1 or 3, H, W) or (H, W); whole numbers 0 … 255 (uint8), or 0 … 1, where what
            lies outside is cut off and NaN is black.

    Raises:
        ValueError: Another shape.

    Example:
        >>> Image(torch.rand(8, 8)), Image(torch.rand(3, 8, 8)).pixels.dtype
        (Image(pixels=(1, 8, 8)), torch.uint8)
    """

    pixels: Tensor = field(converter=_pixels, repr=lambda pixels: str(tuple(pixels.shape)))


def _values(given: Any) -> Tensor:
    values = torch.as_tensor(given).detach().flatten().float()
    return values[values.isfinite()].cpu()


@frozen(eq=False)
class Histogram(Loggable):
    """How numbers are distributed; those that are not finite are left out.

    Args:
        values: A tensor of any shape, or a list of numbers.

    Example:
        >>> values = Histogram([0.0, 1.0, float("nan")]).values
        >>> sorted(values.tolist())
        [0.0, 1.0]
    """

    values: Tensor = field(converter=_values, repr=lambda values: f"{len(values)} values")

    def counts(self, bins: int = 64) -> tuple[list[float], list[float]]:
        """Count the values between their smallest and their largest.

        Returns:
            ``(counts, edges)``, of lengths `bins` and ``bins + 1``; both empty where there are no values.
        """
        if not len(self.values):
            return [], []
        counts, edges = torch.histogram(self.values, bins)
        return counts.tolist(), edges.tolist()


@frozen
class Text(Loggable):
    """Words.

    Args:
        text: Markdown where the backend shows it.

    Example:
        >>> Text("**three** rows were left out")
        Text(text='**three** rows were left out')
    """

    text: str


@frozen(eq=False)
class Figure(Loggable):
    """A figure of matplotlib.

    Args:
        figure: A ``matplotlib.figure.Figure``; it is drawn when it is logged.

    Example:
        >>> from matplotlib.figure import Figure as Drawing
        >>> drawing = Drawing()
        >>> lines = drawing.subplots().plot([1.0, 0.5])
        >>> Figure(drawing).figure is drawing
        True
    """

    figure: Any

    def image(self) -> Image:
        """Draw it."""
        from matplotlib.image import imread

        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        file.seek(0)
        return Image(torch.from_numpy(imread(file)[..., :3]).permute(2, 0, 1))


def _waveform(given: Any) -> Tensor:
    samples: Tensor = torch.as_tensor(given).detach().float().cpu()
    return samples.unsqueeze(0) if samples.ndim == 1 else samples


@frozen(eq=False)
class Audio(Loggable):
    """Sound.

    Args:
        waveform: Values -1 … 1 of shape (samples,) or (channels, samples).
        rate: Samples per second.

    Example:
        >>> Audio(torch.sin(torch.arange(8000) / 10), rate=8000).rate  # a second
        8000
    """

    waveform: Tensor = field(converter=_waveform, repr=lambda waveform: str(tuple(waveform.shape)))
    rate: int = 44100

    def save(self, path: Path) -> None:
        """Write it as a WAV file of 16 bits."""
        samples = (self.waveform.nan_to_num(0.0).clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(self.waveform))
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(samples.numpy().astype("<i2").tobytes())


@frozen
class File(Loggable):
    """A file, which the backend copies.

    Args:
        path: Where it is.

    Example:
        >>> written = Path("notes.txt").write_text("what was tried")
        >>> File("notes.txt").path.name
        'notes.txt'
    """

    path: Path = field(converter=Path)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested hyperparameters by dotted names; values other than numbers, texts, bools and None become texts.

    >>> flattened({"lr": 0.1, "model": {"width": 64, "kind": int}})
    {'lr': 0.1, 'model.width': 64, 'model.kind': "<class 'int'>"}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            value = as_python(value)
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
    return flat


def _by_name(values: Any) -> dict[str, Any]:
    """Return hyperparameters by name: of a mapping, or of an object whose fields they are.

    Raises:
        TypeError: It has neither.
    """
    if isinstance(values, Mapping):
        return flattened(values)
    dumped = getattr(values, "model_dump", None)  # of pydantic
    if not isinstance(values, type) and callable(dumped):
        return flattened(dumped())
    fields = init_fields(values)
    if fields is None and not isinstance(values, type):
        fields = getattr(values, "__dict__", None)  # such as what argparse gives
    if fields is None:
        raise TypeError(
            f"{describe(values)} was given as hyperparameters; expected a mapping of names to values, or an object "
            "with fields: a dataclass, a model of pydantic, what argparse gives"
        )
    return flattened({name: getattr(values, name) for name in fields})


@frozen
class HyperParameters(Loggable):
    """The hyperparameters of a run.

    Args:
        values: By name; nested mappings become dotted names. Or an object whose fields they are: a dataclass, an
            attrs class, a model of pydantic, what argparse gives.

    Raises:
        TypeError: It is neither.

    Example:
        >>> HyperParameters({"optimizer": {"lr": 0.1, "betas": "default"}, "epochs": 3})
        HyperParameters(values={'optimizer.lr': 0.1, 'optimizer.betas': 'default', 'epochs': 3})
    """

    values: dict[str, Any] = field(converter=_by_name)


def loggable(value: Any) -> Loggable:
    """Return the loggable for a value.

    A tensor of one element is a number, one of two or three dimensions an image, one of four a grid
    of images; a figure of matplotlib is a `Figure`, a text a `Text`, a number a `Scalar`.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(value, Loggable):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return Scalar(value)
    if isinstance(value, Tensor) and value.ndim in (2, 3):
        return Image(value)
    if isinstance(value, Tensor) and value.ndim == 4:
        return Image(image_grid(value))
    if hasattr(value, "savefig"):
        return Figure(value)
    raise TypeError(
        f"{describe(value)} cannot be logged; expected an image (a tensor of shape (C, H, W) or (N, C, H, W)), a "
        "figure, a number, a text, or a Loggable such as Histogram(values)"
    )


def save(thing: Loggable, path: Path) -> Path:
    """Write an image, figure, sound or file as a file of its own; return its path, with its ending.

    Args:
        thing: What to write.
        path: The file without an ending; its folder is made.

    Raises:
        ImportError: Images need Pillow.
        TypeError: It is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(thing, Image):
        path = path.with_name(f"{path.name}.png")
        save_image(thing.pixels, path, zoom=1)
    elif isinstance(thing, Figure):
        path = path.with_name(f"{path.name}.png")
        thing.figure.savefig(path)
    elif isinstance(thing, Audio):
        path = path.with_name(f"{path.name}.wav")
        thing.save(path)
    elif isinstance(thing, File):
        path = path.with_name(f"{path.name}{thing.path.suffix}")
        shutil.copyfile(thing.path, path)
    else:
        raise TypeError(f"{describe(thing)} is no image, figure, sound or file")
    return path
