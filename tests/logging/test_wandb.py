from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from matplotlib.figure import Figure as Drawing

from fluxloop.logging import Audio, Figure, File, Histogram, HyperParameters, Image, Scalar, Text, WandB, log_to
from fluxloop.logging.wandb import offline_rows


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.teardown()


def offline(folder: Path, **options: Any) -> WandB:
    return WandB("tests", mode="offline", dir=str(folder), **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read back what all starts wrote, without what wandb adds itself."""
    wandb.teardown()  # its process has written everything when it has ended
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        found += [{k: v for k, v in row.items() if not k.startswith("_")} for row in offline_rows(path)]
    return found


def series(folder: Path, name: str, axis: str) -> list[tuple[int, float]]:
    return [(row[axis], row[name]) for row in rows(folder) if name in row]


@pytest.mark.slow
def test_what_is_logged_is_read_back_from_its_file(tmp_path: Path) -> None:
    backend = offline(tmp_path, name="first")
    log_to(backend, HyperParameters({"lr": 0.1, "model": {"width": 8}}), "chosen", 0)
    for step in (1, 2):
        log_to(backend, Scalar(step / 4), "loss", step, ("step", "training"))
        log_to(backend, Scalar(step / 2), "accuracy", step, ("step", "training"))
    log_to(backend, Histogram([0.0, 1.0, 1.0]), "weights", 2, ("step",))
    log_to(backend, Scalar(0.5), "loss", 1, ("epoch", "validation"))
    log_to(backend, Image(torch.ones(3, 2, 5)), "grid", 1, ("epoch",))
    log_to(backend, Image(torch.ones(2, 5)), "grey", 1, ("epoch",))
    log_to(backend, Figure(Drawing((1, 1))), "figure", 1, ("epoch",))
    log_to(backend, Text("words"), "note", 1, ("epoch",))
    (tmp_path / "a.txt").write_text("words")
    log_to(backend, File(tmp_path / "a.txt"), "file", 1)
    assert backend.run.config["model.width"] == 8
    assert wandb.run is None
    backend.close()
    first, second, third = rows(tmp_path)
    assert first == {"step": 1, "step/training/loss": 0.25, "step/training/accuracy": 0.5}
    assert (second["step"], second["step/training/loss"]) == (2, 0.5)
    assert sum(second["step/weights"]["values"]) == 3
    assert (third["epoch"], third["epoch/validation/loss"], third["epoch/note"]) == (1, 0.5, "words")
    assert (third["epoch/grid"]["_type"], third["epoch/grid"]["width"]) == ("image-file", 5)
    assert third["epoch/figure"]["_type"] == "image-file"
    assert list(tmp_path.glob("wandb/offline-run-*/files/a.txt"))


@pytest.mark.slow
def test_resumed_the_same_run_goes_on_and_no_step_is_there_twice(tmp_path: Path) -> None:
    first = offline(tmp_path)
    log_to(first, Scalar(1), "loss", 1, "step")
    state = json.loads(json.dumps(first.state_dict()))
    log_to(first, Scalar(2), "loss", 2, "step")
    first.close()
    wandb.teardown()  # the process that is killed takes wandb's with it
    second = offline(tmp_path)
    second.load_state_dict(state)
    second.begin(resumed=True)
    for step in (2, 3):
        log_to(second, Scalar(step), "loss", step, "step")
        log_to(second, Scalar(step), "accuracy", step, "step")
    second.close()
    log_to(second, Scalar(4), "loss", 4, "step")  # a second fit
    second.close()
    assert second.run_id == first.run_id
    assert series(tmp_path, "step/loss", "step") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert series(tmp_path, "step/accuracy", "step") == [(2, 2.0), (3, 3.0)]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3


@pytest.mark.slow
def test_a_file_that_breaks_off_gives_the_rows_before(tmp_path: Path) -> None:
    backend = offline(tmp_path)
    for step in range(30):  # more than one block of the file
        log_to(backend, Histogram(torch.arange(500.0)), "weights", step, "step")
    backend.close()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stat().st_size > 32768
    assert [row["step"] for row in offline_rows(path)] == list(range(30))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    found = [row["step"] for row in offline_rows(path)]
    assert found == list(range(len(found)))
    assert 5 < len(found) < 30


def test_a_run_that_cannot_begin_is_warned_about(tmp_path: Path) -> None:
    backend = offline(tmp_path, id="not/allowed")
    with pytest.warns(UserWarning, match=r"WandB\('tests', .*\) failed to be opened, and is left alone"):
        log_to(backend, Scalar(1), "loss", 1)
    log_to(backend, Scalar(2), "loss", 2)


@pytest.mark.slow
def test_sound_needs_what_wandb_needs_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(wandb, "Audio", lambda data, sample_rate: made.append((data.shape, sample_rate)) or 1.0)
    backend = offline(tmp_path)
    log_to(backend, Audio(torch.zeros(2, 9), rate=8000), "sound", 1)
    backend.close()
    assert made == [((9, 2), 8000)]
    assert series(tmp_path, "sound", "step") == [(1, 1.0)]
