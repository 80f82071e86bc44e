"""``python -m fluxloop``: what is installed here, and a table and a picture of runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import fluxloop
from fluxloop import Checkpointer, EarlyStopping, Metrics, Recorder
from fluxloop.__main__ import in_words, main
from fluxloop.testing import toy_learner


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, callbacks in (("first", []), ("deep/second", [EarlyStopping(1, min_delta=1e6)])):
        toy_learner(Recorder(), Metrics(), Checkpointer(f"runs/{name}"), *callbacks, num_batches=2).fit(3)
    return tmp_path / "runs"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


def test_info_tells_versions_devices_threads_and_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fluxloop", "info"])
    monkeypatch.setattr("fluxloop.__main__.OPTIONAL", ("numpy", "no-such-package"))
    main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fluxloop"] == fluxloop.__version__
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["devices"].startswith("cpu")
    assert "tqdm" in lines["packages"]
    assert "numpy" in lines["packages"]
    assert lines["not"] == "found  no-such-package"


def test_the_package_is_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fluxloop", "info"])
    monkeypatch.delitem(sys.modules, "fluxloop.__main__")
    runpy.run_module("fluxloop", run_name="__main__")
    assert capsys.readouterr().out.startswith("fluxloop ")


def test_runs_are_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs", "runs"])
    heading, second, first = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "run"
    cells = [cell.strip() for cell in first.split("  ") if cell.strip()]
    assert (cells[0], cells[1], cells[3], cells[4]) == ("first", "2", "3", "6")
    assert "training/loss" in cells[6]
    assert "validation/loss" in cells[6]
    assert second.startswith("deep/second ")
    assert second.endswith("(EarlyStopping, NoImprovement(n=1, min_delta=1000000.0))")


def test_a_checkpoint_that_cannot_be_read_is_named_below_the_table(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = max((runs / "first").glob("epoch-*.pt"))
    newest.write_bytes(b"")
    main(["runs", "runs"])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"first: the checkpoint runs/first/{newest.name}")


def test_a_picture_is_written_where_it_says(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(runs.rglob("*"))
    main(["runs", "runs", "--plot"])
    picture = Path("fluxloop-runs.png").resolve()
    assert capsys.readouterr().out.endswith(f"the metrics of 2 runs are drawn in {picture}\n")
    assert matplotlib.image.imread(picture).std() > 0
    main(["runs", "runs", "--plot", "other.svg"])
    assert Path("other.svg").read_text().count('<g id="axes_') == 1
    assert sorted(runs.rglob("*")) == before


def test_what_cannot_be_done_is_said(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "missing is no folder" in refusal(capsys, "runs", "missing")
    assert "lies in the folder of a run" in refusal(capsys, "runs", "runs", "--plot", "runs/first/picture.png")
    assert not (runs / "first" / "picture.png").exists()
    toy_learner(Checkpointer("unmeasured"), num_batches=1).fit(1)
    assert "no metric was recorded" in refusal(capsys, "runs", "unmeasured", "--plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib: pip install" in refusal(capsys, "runs", "runs", "--plot")


def test_a_folder_without_a_run_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs", str(tmp_path)])
    assert capsys.readouterr().out == f"there is no run of a Checkpointer below {tmp_path}\n"


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4e15, "4,000.0 TB")])
def test_sizes_have_units_that_fit_them(size: float, words: str) -> None:
    assert in_words(size) == words
