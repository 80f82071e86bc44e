from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure as Drawing
from matplotlib.image import imread

from fluxloop.logging import CSV, JSONL, Audio, Figure, File, Histogram, HyperParameters, Image, Scalar, Text, log_to


def rows(path: Path) -> list[tuple[int, str, str, Any]]:
    """Read a log of either kind back."""
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["step"], "/".join(row["group"]), row["name"], row["value"]) for row in found]
    with path.open(newline="") as file:
        return [(int(row["step"]), row["group"], row["name"], row["value"]) for row in csv.DictReader(file)]


def test_csv_has_one_row_per_value(tmp_path: Path) -> None:
    backend = CSV(tmp_path / "new" / "log.csv")
    log_to(backend, Scalar(0.1), "loss", 1, ("epoch", "training"))
    log_to(backend, Scalar(float("nan")), "loss", 2, ("epoch", "training"))
    log_to(backend, Text('two "words",\nand a line'), "note", 2)
    log_to(backend, HyperParameters({"lr": 1e-3, "on": True, "none": None, "limit": float("inf")}), "chosen", 0)
    backend.close()
    assert rows(backend.path) == [
        (1, "epoch/training", "loss", "0.1"),
        (2, "epoch/training", "loss", "nan"),
        (2, "", "note", 'two "words",\nand a line'),
        (0, "chosen", "lr", "0.001"),
        (0, "chosen", "on", "true"),
        (0, "chosen", "none", "null"),
        (0, "chosen", "limit", "inf"),
    ]


def test_each_json_line_is_valid_by_itself(tmp_path: Path) -> None:
    backend = JSONL(tmp_path / "log.jsonl")
    log_to(backend, Scalar(0.1), "loss", 1, ("epoch", "training"))
    log_to(backend, Scalar(float("-inf")), "loss", 2, "epoch")
    log_to(backend, Text("ü\n"), "note", 2)
    log_to(backend, Histogram([0.0, 1.0]), "weights", 3)
    log_to(backend, HyperParameters({"a": {"b": float("nan")}}), "chosen", 0)
    backend.close()
    found = rows(backend.path)
    assert found[:3] == [(1, "epoch/training", "loss", 0.1), (2, "epoch", "loss", "-inf"), (2, "", "note", "ü\n")]
    assert sum(found[3][3]["counts"]) == 2
    assert (found[3][3]["edges"][0], found[3][3]["edges"][-1]) == (0, 1)
    assert found[4] == (0, "chosen", "a.b", "nan")


@pytest.mark.parametrize("backend", [CSV("log.csv"), JSONL("log.jsonl")], ids=["csv", "jsonl"])
def test_images_and_the_like_lie_beside_the_file(
    backend: CSV | JSONL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    log_to(backend, Image(torch.ones(3, 2, 2)), "G@ema", 3, ("epoch", "images"))
    log_to(backend, Figure(Drawing()), "a/figure", 4)
    log_to(backend, Audio(torch.zeros(9)), "sound", 5)
    log_to(backend, File("notes.txt"), "notes", 6)
    backend.close()
    values = [value for *_, value in rows(backend.path)]
    assert values == [
        "log_files/epoch/images/G@ema-000003.png",
        "log_files/a_figure-000004.png",
        "log_files/sound-000005.wav",
        "log_files/notes-000006.txt",
    ]
    assert imread(tmp_path / values[0]).min() == 1
    assert (tmp_path / values[3]).read_text() == "words"


def test_nothing_is_written_before_the_first_value(tmp_path: Path) -> None:
    backend = CSV(tmp_path / "log.csv")
    backend.begin()
    backend.flush()
    backend.close()
    assert list(tmp_path.iterdir()) == []


def test_many_lines_do_not_wait_for_the_end_of_an_epoch(tmp_path: Path) -> None:
    backend = JSONL(tmp_path / "log.jsonl")
    for step in range(250):
        log_to(backend, Scalar(step), "loss", step)
    assert len(rows(backend.path)) == 200
    backend.flush()
    assert [step for step, *_ in rows(backend.path)] == list(range(250))


@pytest.mark.parametrize("cls", [CSV, JSONL])
def test_resumed_the_file_is_cut_to_where_the_state_was_taken(cls: Any, tmp_path: Path) -> None:
    first = cls(tmp_path / f"log.{cls.__name__.lower()}")
    for step in (1, 2):
        log_to(first, Scalar(step), "loss", step)
    state = first.state_dict()
    log_to(first, Scalar(-3), "loss", 3)
    first.close()
    with first.path.open("a") as file:
        file.write('4,lo"')  # a kill in the middle of a line
    second = cls(first.path)
    second.load_state_dict(state)
    assert second.state_dict() == state
    second.begin(resumed=True)
    assert len(first.path.read_text()) > state["position"]  # nothing is cut before something is written
    log_to(second, Scalar(3), "loss", 3)
    second.close()
    assert [(step, float(value)) for step, _, _, value in rows(first.path)] == [(1, 1), (2, 2), (3, 3)]


def log_steps(backend: CSV | JSONL, steps: range) -> None:
    for step in steps:
        log_to(backend, Scalar(step / 3), "loss", step, ("step", "training"))


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from([CSV, JSONL]), st.integers(1, 250))
def test_killed_at_any_byte_after_the_state_the_resumed_file_is_that_of_a_run_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, cls: Any, steps: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log_steps(whole := cls(folder / "whole"), range(steps))
    whole.close()
    taken = data.draw(st.integers(0, steps), label="state taken after")
    log_steps(killed := cls(folder / "log"), range(taken))
    state = killed.state_dict()
    log_steps(killed, range(taken, steps))
    killed.close()
    written = killed.path.stat().st_size
    os.truncate(killed.path, data.draw(st.integers(state["position"] or 0, written), label="bytes written"))
    resumed = cls(folder / "log")
    resumed.load_state_dict(state)
    resumed.begin(resumed=True)
    log_steps(resumed, range(taken, steps))
    resumed.close()
    if taken < steps:
        assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_a_state_from_before_the_first_value_takes_everything_back(tmp_path: Path) -> None:
    first = CSV(tmp_path / "log.csv")
    state = first.state_dict()
    log_to(first, Scalar(1), "loss", 1)
    first.close()
    second = CSV(tmp_path / "log.csv")
    second.load_state_dict(state)
    second.begin(resumed=True)
    log_to(second, Scalar(2), "loss", 1)
    second.close()
    assert rows(tmp_path / "log.csv") == [(1, "", "loss", "2.0")]


def test_resumed_without_the_file_it_begins_a_new_one(tmp_path: Path) -> None:
    backend = CSV(tmp_path / "log.csv")
    backend.load_state_dict({"position": 500})
    backend.begin(resumed=True)
    log_to(backend, Scalar(2), "loss", 7)
    backend.close()
    assert rows(tmp_path / "log.csv") == [(7, "", "loss", "2.0")]


def test_what_was_added_by_others_after_closing_stays(tmp_path: Path) -> None:
    backend = CSV(tmp_path / "log.csv")
    log_to(backend, Scalar(1), "loss", 1)
    backend.close()
    with backend.path.open("a") as file:
        file.write("9,,note,by hand\n")
    log_to(backend, Scalar(2), "loss", 2)
    backend.close()
    assert [step for step, *_ in rows(backend.path)] == [1, 9, 2]


def test_a_full_disk_and_a_path_that_cannot_be_are_warned_about(tmp_path: Path) -> None:
    full = CSV("/dev/full")
    log_to(full, Scalar(1), "loss", 1)
    with pytest.warns(UserWarning, match=r"CSV\('/dev/full'\) failed to be flushed.*No space left"):
        full.flush()
    (tmp_path / "file").touch()
    below = JSONL(tmp_path / "file" / "log.jsonl")
    with pytest.warns(UserWarning, match=r"JSONL\(.*\) failed to .*NotADirectoryError|failed to be opened"):
        log_to(below, Scalar(1), "loss", 1)
