from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxloop.logging import Audio, Figure, File, Histogram, HyperParameters, Image, Scalar, TensorBoard, Text, log_to


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "histograms", "images"), 0)).Reload()


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    # files begun in one second are read in the order of their names as texts
    return sorted((event.step, event.value) for event in read(folder).Scalars(name))


def test_numbers_images_histograms_text_and_sound_are_read_back(tmp_path: Path) -> None:
    backend = TensorBoard(tmp_path / "run")
    log_to(backend, Scalar(0.5), "loss", 3, ("epoch", "training"))
    log_to(backend, Scalar(float("nan")), "loss", 4, ("epoch", "training"))
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2) * 20
    log_to(backend, Image(pixels), "image", 5)
    log_to(backend, Image(torch.ones(2, 2)), "grey", 5)
    log_to(backend, Figure(Drawing((1, 1), dpi=40)), "figure", 5)
    log_to(backend, Histogram([1.0, 2.0, 4.0]), "weights", 6)
    log_to(backend, Histogram([]), "empty", 6)
    log_to(backend, Text("words"), "note", 7)
    log_to(backend, Audio(torch.zeros(2, 50), rate=8000), "sound", 8)
    log_to(backend, HyperParameters({"lr": 0.1, "on": True, "none": None}), "chosen", 0)
    backend.close()
    found = read(tmp_path / "run")
    (first, second) = found.Scalars("epoch/training/loss")
    assert (first.step, first.value, second.step) == (3, 0.5, 4)
    assert np.isnan(second.value)
    (image,) = found.Images("image")
    decoded = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))[..., :3]
    assert (decoded * 255).round().astype(int).tolist() == pixels.permute(1, 2, 0).tolist()
    assert (image.step, found.Images("figure")[0].width) == (5, 40)
    (histogram,) = found.Histograms("weights")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (6, 3, 7)
    assert found.Tags()["histograms"] == ["weights"]
    assert found.Tensors("note/text_summary")[0].tensor_proto.string_val == [b"words"]
    assert b"| lr | 0.1 |" in found.Tensors("chosen/text_summary")[0].tensor_proto.string_val[0]
    assert found.Audio("sound")[0].sample_rate == 8000
    assert found.PluginTagToContent("hparams").keys() >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert [path.is_file() for path in (tmp_path / "run").iterdir()] == [True]  # no run of its own for hyperparameters


def test_a_file_is_what_it_cannot_hold(tmp_path: Path) -> None:
    backend = TensorBoard(tmp_path)
    with pytest.warns(UserWarning, match="cannot hold File, which is left out; it holds Scalar, Image, Histogram"):
        log_to(backend, File("notes.txt"), "notes", 1)
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_in_a_second_file_after_closing(tmp_path: Path) -> None:
    backend = TensorBoard(tmp_path)
    log_to(backend, Scalar(1), "loss", 1)
    backend.close()
    log_to(backend, Scalar(2), "loss", 2)
    backend.close()
    assert series(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert len(list(tmp_path.iterdir())) == 2


def test_resumed_steps_and_epochs_are_there_once(tmp_path: Path) -> None:
    def log(backend: TensorBoard, epoch: int) -> None:
        for step in range(4 * epoch - 3, 4 * epoch + 1):
            log_to(backend, Scalar(step), "loss", step, "step")
        log_to(backend, Scalar(epoch), "loss", epoch, "epoch")

    first = TensorBoard(tmp_path)
    log(first, 1)
    log(first, 2)
    state = first.state_dict()
    log(first, 3)
    first.close()
    log(first, 4)  # into a file of its own
    first.close()
    second = TensorBoard(tmp_path)
    second.load_state_dict(state)
    second.begin(resumed=True)
    for epoch in (3, 4):
        log(second, epoch)
    second.close()
    assert series(tmp_path, "step/loss") == [(step, float(step)) for step in range(1, 17)]
    assert series(tmp_path, "epoch/loss") == [(epoch, float(epoch)) for epoch in range(1, 5)]


def test_event_files_of_others_are_left_alone_when_it_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.somebody").write_bytes(b"")
    backend = TensorBoard(tmp_path)
    backend.load_state_dict({"position": None})
    backend.begin(resumed=True)
    log_to(backend, Scalar(1), "loss", 1)
    backend.close()
    assert (tmp_path / "events.out.tfevents.1.somebody").exists()


def test_a_folder_that_cannot_be_made_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    backend = TensorBoard(tmp_path / "file" / "run")
    with pytest.warns(UserWarning, match=r"TensorBoard\(.*\) failed to be opened.*the training goes on"):
        log_to(backend, Scalar(1), "loss", 1)
    log_to(backend, Scalar(2), "loss", 2)


def test_its_repr_is_how_it_is_made() -> None:
    assert repr(TensorBoard("runs/1")) == "TensorBoard('runs/1')"
