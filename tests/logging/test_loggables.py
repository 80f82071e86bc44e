from __future__ import annotations

import argparse
import dataclasses
import wave
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from matplotlib.image import imread

from fluxloop import LogHyperParams
from fluxloop.logging import Audio, Figure, File, Histogram, HyperParameters, Image, Loggable, Memory, Scalar, Text
from fluxloop.logging.loggables import loggable, save


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2.0), torch.tensor([[2]])])
def test_a_scalar_is_a_number_on_the_host(value: Any) -> None:
    assert Scalar(value) == Scalar(2.0)
    assert type(Scalar(value).value) is float


def test_an_image_is_whole_numbers_and_what_lies_outside_is_cut_off() -> None:
    image = Image(torch.tensor([[-1.0, 0.0, 0.5], [1.0, 7.0, float("nan")]]))
    assert image.pixels.tolist() == [[[0, 0, 128], [255, 255, 0]]]
    assert image.pixels.dtype == torch.uint8
    whole = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert torch.equal(Image(whole).pixels, whole)


@pytest.mark.parametrize("given", [torch.zeros(5), torch.zeros(2, 4, 4), torch.zeros(1, 3, 4, 4), 3])
def test_an_image_of_another_shape_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"Image\(.*\) was given; expected a tensor of shape \(1 or 3, H, W\)"):
        Image(given)


def test_a_histogram_counts_what_is_finite() -> None:
    histogram = Histogram(torch.tensor([[0.0, 1.0], [4.0, float("nan")], [float("inf"), 4.0]]))
    assert histogram.counts(4) == ([1, 1, 0, 2], [0, 1, 2, 3, 4])
    assert Histogram([]).counts() == ([], [])


def test_hyperparameters_are_flat_and_plain() -> None:
    given = {"lr": 0.1, "model": {"width": 8, "deep": {"on": True}}, "none": None, "kind": torch.nn.ReLU}
    assert HyperParameters(given).values == {
        "lr": 0.1,
        "model.width": 8,
        "model.deep.on": True,
        "none": None,
        "kind": "<class 'torch.nn.modules.activation.ReLU'>",
    }


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, Scalar),
        (torch.tensor([1.5]), Scalar),
        ("words", Text),
        (torch.zeros(4, 4), Image),
        (torch.zeros(3, 4, 4), Image),
        (torch.zeros(5, 3, 4, 4), Image),
        (Drawing(), Figure),
        (Text("words"), Text),
    ],
)
def test_a_value_becomes_the_loggable_that_it_looks_like(value: Any, kind: type[Loggable]) -> None:
    assert type(loggable(value)) is kind


def test_a_value_that_looks_like_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot be logged; expected an image .* or a Loggable such as Histogram"):
        loggable(torch.zeros(7))


def test_images_figures_and_files_are_saved_as_files(tmp_path: Path) -> None:
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2) * 20
    found = imread(save(Image(pixels), tmp_path / "new" / "a.b"))
    assert (found * 255).round().astype(int).tolist() == pixels.permute(1, 2, 0).tolist()
    assert imread(save(Figure(Drawing((1, 1), dpi=50)), tmp_path / "figure")).shape == (50, 50, 4)
    (tmp_path / "notes.txt").write_text("words")
    saved = save(File(tmp_path / "notes.txt"), tmp_path / "copy-1")
    assert saved.name == "copy-1.txt"
    assert saved.read_text() == "words"
    with pytest.raises(TypeError, match="Scalar"):
        save(Scalar(1), tmp_path / "number")


def test_sound_is_saved_with_its_rate_and_channels(tmp_path: Path) -> None:
    with wave.open(str(save(Audio(torch.tensor([[0.0, 1.0], [-1.0, 5.0]]), rate=8000), tmp_path / "sound"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 2, 2)
        samples = torch.frombuffer(bytearray(file.readframes(2)), dtype=torch.int16)
    assert samples.tolist() == [0, -32767, 32767, 32767]
    assert Audio(torch.zeros(5)).waveform.shape == (1, 5)


@dataclasses.dataclass
class Optim:
    lr: float = 0.1


@attrs.define
class Config:
    depth: int = 2
    optim: Any = attrs.field(factory=lambda: {"lr": 0.1})


class Dumped:
    """What pydantic's models are like."""

    def model_dump(self) -> dict[str, Any]:
        return {"lr": 0.1}


@pytest.mark.parametrize(
    ("given", "flat"),
    [
        (Optim(), {"lr": 0.1}),
        (Config(), {"depth": 2, "optim.lr": 0.1}),
        (Dumped(), {"lr": 0.1}),
        (argparse.Namespace(lr=0.1), {"lr": 0.1}),
    ],
)
def test_hyperparameters_may_be_the_fields_of_an_object(given: Any, flat: dict[str, Any]) -> None:
    assert HyperParameters(given).values == flat
    assert LogHyperParams(Memory(), params=given).params.values == flat


@pytest.mark.parametrize("given", [3, "lr", Optim])
def test_what_has_no_names_is_refused_as_hyperparameters(given: Any) -> None:
    with pytest.raises(TypeError, match="given as hyperparameters; expected a mapping of names"):
        HyperParameters(given)
